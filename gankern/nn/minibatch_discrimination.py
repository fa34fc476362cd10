"""The minibatch discrimination layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gankern import ops
from gankern.nn import over_ranks
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
    bias : bool, optional
        Whether to add a learned number to each appended feature.
    weight_norm : bool, optional
        Whether to normalise T over in_features and scale it by a learned factor:
        ``M = f (T * exp(log_weight_scale) / sqrt(sum over in_features of T^2))``.
    include_self : bool, optional
        Whether to let j run over i too, which adds 1 to each appended feature.
    process_group : ProcessGroup, "world" or None, optional
        Whose samples each sample is compared to: None, this rank's; else those of all ranks of the group, with
        gradients to all of them. "world" is the default group at the time of the call, or this process alone where
        ``torch.distributed`` is not initialised.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    T : nn.Parameter
        Shape (in_features, out_features, kernel_dims). Starts normal with a standard deviation of
        ``1 / (kernel_dims * sqrt(in_features))``: between independent samples of unit-variance features, distances are
        then about 1 at any size, where N(0, 1) makes every exponential and its gradient vanish. With weight_norm, of
        ``1 / sqrt(in_features)``, and log_weight_scale has the rest.
    log_weight_scale : nn.Parameter or None
        Shape (out_features, kernel_dims); starts as ``-log(kernel_dims)``.
    bias : nn.Parameter or None
        Shape (out_features,); starts as -1.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Call with ``layer(input, groups=1)``: input (N, in_features), output (N, in_features + out_features); groups cuts
    the batch into that many equal consecutive parts, real and fake samples for instance, which do not see each other,
    as if the layer was called on each. See :func:`gankern.ops.minibatch_discrimination` for dtypes and derivatives.

    With ``bias=True, weight_norm=True`` the function is that of the authors' code (``nn.MinibatchLayer`` of
    openai/improved-gan, with theta for T), which leaves out the pairs of a sample with itself too; its initialisation
    by the statistics of a first batch is not done here.

    With a process group every rank must make the same calls, forward and backward, with equally many samples and
    groups; this is checked by a gather of two integers. A gradient of T is the share of this rank's samples in the sum
    of all ranks' losses: add them up over ranks, or average them as ``DistributedDataParallel`` does. Each rank
    computes the features of all samples and keeps its own.

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

    bias: nn.Parameter | None
    log_weight_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_dims: int,
        *,
        bias: bool = False,
        weight_norm: bool = False,
        include_self: bool = False,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check.positive_int("in_features", in_features)
        _check.positive_int("out_features", out_features)
        _check.positive_int("kernel_dims", kernel_dims)
        _check.boolean("bias", bias)
        _check.boolean("weight_norm", weight_norm)
        _check.boolean("include_self", include_self)
        over_ranks.check_group("process_group", process_group)
        self.in_features, self.out_features, self.kernel_dims = in_features, out_features, kernel_dims
        self.include_self, self.process_group = include_self, process_group

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.T = parameter(in_features, out_features, kernel_dims)
        self.register_parameter("log_weight_scale", parameter(out_features, kernel_dims) if weight_norm else None)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw T anew and set the other parameters to what they start as."""
        std = 1 / math.sqrt(self.in_features)
        if self.log_weight_scale is None:
            std /= self.kernel_dims
        else:
            nn.init.constant_(self.log_weight_scale, -math.log(self.kernel_dims))
        nn.init.normal_(self.T, std=std)
        if self.bias is not None:
            nn.init.constant_(self.bias, -1.0)

    def forward(self, input: Tensor, groups: int = 1) -> Tensor:
        _check.floating("input", input)
        if input.dim() != 2 or input.size(1) != self.in_features:
            raise ValueError(f"input must have shape (N, {self.in_features}); got {tuple(input.shape)}")
        _check.positive_int("groups", groups)
        if input.size(0) % groups:
            raise ValueError(f"input must have a multiple of groups={groups} samples; got {input.size(0)}")
        weight = self.T
        if self.log_weight_scale is not None:
            weight = weight * (self.log_weight_scale.exp() / torch.linalg.vector_norm(weight, dim=0))
        m = (input @ weight.flatten(1)).view(-1, self.out_features, self.kernel_dims)
        features = self._features(m, groups)
        if self.bias is not None:
            features = features + self.bias
        return torch.cat([input, features], 1)

    def _features(self, m: Tensor, groups: int) -> Tensor:
        n, part = m.size(0), m.size(0) // groups
        ranks = over_ranks.world_size(self.process_group)
        if ranks > 1:
            # Imported where it is needed: torch.compile, which it marks its functions with, takes longer than torch.
            from gankern.nn import gathering

            self._check_ranks(gathering.gather_ints((n, groups), m.device, self.process_group))
            m = gathering.gather(m, self.process_group).view(ranks, groups, part, *m.shape[1:])
            m = m.transpose(1, 2).flatten(0, 1)
        elif groups > 1:
            m = m.unflatten(0, (groups, part)).transpose(0, 1)
        else:
            return ops.minibatch_discrimination(m, include_self=self.include_self)
        # Features do not see each other: a part's are features of their own, and all parts take one call.
        features = ops.minibatch_discrimination(m.flatten(1, 2), include_self=self.include_self)
        if ranks > 1:
            features = features.unflatten(0, (ranks, part))[over_ranks.rank(self.process_group)]
        return features.unflatten(1, (groups, self.out_features)).transpose(0, 1).reshape(n, self.out_features)

    def _check_ranks(self, sizes: list[list[int]]) -> None:
        if any(other != sizes[0] for other in sizes):
            received = ", ".join(f"{samples} in {parts}" for samples, parts in sizes)
            raise ValueError(f"input must have equally many samples and groups on all ranks; got {received}")

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, kernel_dims={self.kernel_dims}"
        options = {
            "bias": self.bias is not None,
            "weight_norm": self.log_weight_scale is not None,
            "include_self": self.include_self,
        }
        text += "".join(f", {name}=True" for name, value in options.items() if value)
        return text if self.process_group is None else f"{text}, process_group={self.process_group!r}"
