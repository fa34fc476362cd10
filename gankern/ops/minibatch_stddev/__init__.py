"""Minibatch standard deviation: how much the samples of a group differ, as further channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from gankern._autograd import is_stand_in, is_transformed
from gankern._native import acc_dtype
from gankern.ops import _check

__all__ = ["minibatch_stddev"]


def minibatch_stddev(input: Tensor, group_size: int = 4, num_channels: int = 1, eps: float = 1e-8) -> Tensor:
    """Append to each sample's channels the standard deviation over its group of samples.

    With G samples in a group, ``s = sqrt(mean over the group of (x - mean over the group of x)^2 + eps)`` for every
    channel and pixel; s is averaged over all pixels and over each of num_channels equal parts of the channels, and
    each of these numbers fills one new channel of every sample of the group.

    Parameters
    ----------
    input : Tensor
        Shape (N, C, H, W), floating-point, any layout.
    group_size : int, optional
        Samples of a group; the whole batch where it has fewer. With ``G = min(group_size, N)``, N must be a multiple
        of G; sample i is in group ``i % (N // G)``.
    num_channels : int, optional
        Channels to append; C must be a multiple of it.
    eps : float, optional
        Greater than 0: keeps gradients finite where all samples of a group are equal.

    Returns
    -------
    Tensor
        Shape (N, C + num_channels, H, W), of input's dtype; channels_last where input is.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Plain torch, differentiable to any order. float16 and bfloat16 are computed in float32.

    References
    ----------
    Karras, Aila, Laine and Lehtinen, "Progressive Growing of GANs for Improved Quality, Stability, and Variation",
    2018, section 3; groups and parts of channels as in Karras et al., "Analyzing and Improving the Image Quality of
    StyleGAN", 2020.

    Examples
    --------
    >>> minibatch_stddev(torch.randn(8, 16, 4, 4)).shape
    torch.Size([8, 17, 4, 4])
    """
    if is_stand_in(input):
        return handle_torch_function(minibatch_stddev, (input,), input, group_size, num_channels, eps)
    _check.floating("input", input)
    _check.ndim("input", input, 4, "(N, C, H, W)")
    group_size, num_channels, eps = check_options(group_size, num_channels, eps)
    n, channels, height, width = input.shape
    if channels == 0 or channels % num_channels:
        raise ValueError(f"input must have a multiple of num_channels={num_channels} channels; got {channels}")
    # An empty batch is one group of no samples.
    group = min(group_size, n) or 1
    if n % group:
        raise ValueError(f"input must have a multiple of group_size={group} samples; got {n}")
    x = input.to(acc_dtype(input.dtype)).unflatten(1, (num_channels, -1)).unflatten(0, (group, n // group))
    deviation = x - x.mean(0)
    stddev = (deviation.square().mean(0) + eps).sqrt().mean((2, 3, 4))
    added = stddev.to(input.dtype).repeat(group, 1)[:, :, None, None].expand(-1, -1, height, width)
    if not is_transformed() and input.is_contiguous(memory_format=torch.channels_last):
        # Expanded numbers have no layout, and cat keeps only one that all of its inputs have.
        added = added.contiguous(memory_format=torch.channels_last)
    return torch.cat([input, added], 1)


def check_options(group_size: int, num_channels: int, eps: float) -> tuple[int, int, float]:
    group_size = _check.positive_int("group_size", group_size)
    num_channels = _check.positive_int("num_channels", num_channels)
    eps = _check.number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps must be greater than 0; got {eps!r}")
    return group_size, num_channels, eps
