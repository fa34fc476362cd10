"""The minibatch discrimination layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gankern import ops
from gankern.ops import _check


class MinibatchDiscrimination(nn.Module):
    """Appends to each sample's features how close it is to the other samples of the minibatch.

    Projects the features by a learned tensor, ``M = f T``, and concatenates to them
    ``o[i, b] = sum over j != i of exp(-||M[i, b] - M[j, b]||_1)``: a discriminator that has these sees a generator
    which collapses to one point.

    Parameters
    ----------
    in_features : int
        Features a sample brings (the paper's A).
    out_features : int
        Features that are appended (B).
    kernel_dims : int
        Dimensions in which each of them measures its distances (C).
    device, dtype
        Of the parameter.

    Attributes
    ----------
    T : nn.Parameter
        Shape (in_features, out_features, kernel_dims). Starts normal with a standard deviation of
        ``1 / (kernel_dims * sqrt(in_features))``: between independent samples of unit-variance features, distances are
        then about 1 at any size, where N(0, 1) makes every exponential and its gradient vanish.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Input (N, in_features), output (N, in_features + out_features). See
    :func:`gankern.ops.minibatch_discrimination` for dtypes and derivatives.

    References
    ----------
    Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen, "Improved Techniques for Training GANs", 2016,
    section 3.2.

    Examples
    --------
    >>> layer = MinibatchDiscrimination(256, 100, 16)
    >>> layer(torch.randn(64, 256)).shape
    torch.Size([64, 356])
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_dims: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _check.positive_int("in_features", in_features)
        _check.positive_int("out_features", out_features)
        _check.positive_int("kernel_dims", kernel_dims)
        self.in_features, self.out_features, self.kernel_dims = in_features, out_features, kernel_dims
        self.T = nn.Parameter(torch.empty(in_features, out_features, kernel_dims, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw T anew."""
        nn.init.normal_(self.T, std=1 / (self.kernel_dims * math.sqrt(self.in_features)))

    def forward(self, input: Tensor) -> Tensor:
        _check.floating("input", input)
        if input.dim() != 2 or input.size(1) != self.in_features:
            raise ValueError(f"input must have shape (N, {self.in_features}); got {tuple(input.shape)}")
        m = (input @ self.T.flatten(1)).view(-1, self.out_features, self.kernel_dims)
        return torch.cat([input, ops.minibatch_discrimination(m)], 1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel_dims={self.kernel_dims}"
