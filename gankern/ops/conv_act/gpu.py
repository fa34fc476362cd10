"""Convolutions as the GPU's kernels see them, and what their adapters share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from gankern import backends
from gankern._layout import memory_format
from gankern._native import acc_dtype
from gankern.dispatch import convolves_in_tf32
from gankern.ops.conv_act import reference
from gankern.ops.conv_act.reference import ConvOptions

Pair = tuple[int, int]

# Blocks of a weight's gradient that fill a GPU; the same on every one, so that its bits are.
_BLOCKS = 264
# Pixels of one tile at most.
_MOST_ROWS = 128
# Pixels that one block sums up at least.
_LEAST_PIXELS = 256


class Problem(NamedTuple):
    """Images as sums over taps of others: a convolution, a transposed one, or either's input gradient.

    In each dim, the pixels origin + result_step * g of the result are the phase of that origin. Its first tap is the
    first i >= 0 for which result_step divides origin + offset - dilation * i; the quotient + source_step * g is the
    source's pixel there. Every tap_step taps the pixel moves by reach.
    """

    images: int
    source: tuple[int, int, int]  # height, width, channels
    result: tuple[int, int, int]
    kernel: Pair
    result_step: Pair
    source_step: Pair
    offset: Pair
    dilation: Pair
    tap_step: Pair
    reach: Pair
    widens: bool  # whether the result's channels are the weight's second dim

    def numbers(self) -> tuple[int, ...]:
        """All in the order in which the kernels take them."""
        return (self.images, *(n for pair in self[1:-1] for n in pair))

    def grid(self) -> tuple[int, int]:
        """Number of phases, and of pixels of the largest one."""
        sizes = [-(-n // s) for n, s in zip(self.result, self.result_step, strict=False)]
        return self.result_step[0] * self.result_step[1], self.images * sizes[0] * sizes[1]


def problem(
    source: Sequence[int], result: Sequence[int], kernel: Sequence[int], options: ConvOptions, widens: bool
) -> Problem:
    """Of images (N, C, H, W), from the side with the stride to that without one, or back (`widens`)."""

    def last(shape: Sequence[int]) -> tuple[int, int, int]:
        return shape[2], shape[3], shape[1]

    (s0, s1), (p0, p1), (d0, d1) = options.stride, options.padding, options.dilation
    sizes = (source[0], last(source), last(result), (kernel[0], kernel[1]))
    if not widens:
        return Problem(*sizes, (1, 1), (s0, s1), (-p0, -p1), (0, 0), (1, 1), (d0, d1), False)
    g0, g1 = gcd(s0, d0), gcd(s1, d1)
    steps, reach = (s0 // g0, s1 // g1), (-d0 // g0, -d1 // g1)
    return Problem(*sizes, (s0, s1), (1, 1), (p0, p1), (d0, d1), steps, reach, True)


class Finish(NamedTuple):
    """What becomes of a sum on its way to memory: ``* scale + shift``, then an activation.

    With `activated`, an activation's output, it is multiplied by the activation's derivative there instead. Where
    `statistics` are wanted, the kernel also sums up, for each tile, the results and their squares.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"
    negative_slope: float = 0.0
    activated: Tensor | None = None
    statistics: bool = False


#: From images and a weight to a result and, where wanted, sums: float64, of shape (tiles, 2, C).
Convolve = Callable[[Problem, Tensor, Tensor, Tensor, Finish], Tensor | None]
#: Sums of the products of two sides' pixels into a channels_last weight.
WeightGrad = Callable[[Tensor, Tensor, Tensor, ConvOptions], None]


def _check(what: Problem) -> None:
    """Refuse images beyond the 32 bits in which kernels count pixels, and offsets from a tile's first image."""
    least = max(1, what.result[0] // what.result_step[0] * (what.result[1] // what.result_step[1]))
    seen = min(what.images, _MOST_ROWS // least + 2)
    pixels = max(what.images * h * w for h, w, _ in (what.source, what.result))
    values = seen * max(h * w * c for h, w, c in (what.source, what.result))
    weight = what.source[2] * what.result[2] * what.kernel[0] * what.kernel[1]
    if max(pixels + _MOST_ROWS, values, weight) >= 1 << 31:
        sizes = f"{what.images} images of {what.source} and {what.result}"
        raise backends.BackendUnavailable(f"the GPU's convolutions need sizes that 32 bits can count; got {sizes}")


def channels_last(tensor: Tensor) -> Tensor:
    """In the layout in which the values that a sum runs over lie side by side."""
    return tensor.contiguous(memory_format=torch.channels_last)


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether products may be rounded as torch's own convolutions round them."""
    return dtype == torch.float32 and convolves_in_tf32()


def parts(pixels: int, tiles: int, depth: int) -> tuple[int, int]:
    """A sum over pixels, cut so that `tiles` of results fill the GPU: a part's pixels, in `depth`s, and the parts."""
    count = max(1, min(-(-_BLOCKS // tiles), pixels // _LEAST_PIXELS))
    share = -(-pixels // (count * depth)) * depth
    return share, -(-pixels // share)


class Kernels(NamedTuple):
    """The functions of an adapter, made of two kernels."""

    convolve: Convolve
    weight_grad: WeightGrad

    def _run(
        self, source: Tensor, weight: Tensor, shape: Sequence[int], options: ConvOptions, widens: bool, finish: Finish
    ) -> tuple[Tensor, Tensor | None]:
        source, weight = channels_last(source), channels_last(weight)
        result = torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=torch.channels_last)
        what = problem(source.shape, shape, weight.shape[2:], options, widens)
        _check(what)
        return result, self.convolve(what, source, weight, result, finish)

    def conv(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions,
        activation: str = "none",
        negative_slope: float = 0.0,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Convolution, transposed or not, and what :class:`Finish` does."""
        finish = Finish(*_affine(input.dtype, bias, scale, shift), activation, negative_slope)
        shape = reference.conv_shape(input.shape, weight.shape, options)
        return self._run(input, weight, shape, options, options.transposed, finish)[0]

    def conv_statistics(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions
    ) -> tuple[Tensor, Tensor]:
        """Convolution, and the sums of its values and of their squares before rounding.

        Shape (parts, 2, C), float64: each part of the pixels adds up differences to one of them in the type of the
        arithmetic, so that the variance loses no digits of float32 to a large mean.
        """
        finish = Finish(*_affine(input.dtype, bias, None, None), statistics=True)
        shape = reference.conv_shape(input.shape, weight.shape, options)
        output, sums = self._run(input, weight, shape, options, options.transposed, finish)
        assert sums is not None
        return output, sums

    def conv_input_grad(
        self,
        grad_output: Tensor,
        weight: Tensor,
        input: Tensor,
        options: ConvOptions,
        activation: str = "none",
        negative_slope: float = 0.0,
    ) -> Tensor:
        """As in cpu.py."""
        activated = None if activation == "none" else channels_last(input)
        finish = Finish(None, None, activation, negative_slope, activated)
        return self._run(grad_output, weight, input.shape, options, not options.transposed, finish)[0]

    def conv_weight_grad(self, grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
        """As in cpu.py."""
        narrow, wide = (input, grad_output) if options.transposed else (grad_output, input)
        _check(problem(wide.shape, narrow.shape, weight.shape[2:], options, False))
        grad_weight = torch.empty_like(weight, memory_format=memory_format(weight))
        last = grad_weight
        if not last.is_contiguous(memory_format=torch.channels_last):
            last = torch.empty_like(weight, memory_format=torch.channels_last)
        self.weight_grad(channels_last(narrow), channels_last(wide), last, options)
        return grad_weight if last is grad_weight else grad_weight.copy_(last)


def _affine(
    dtype: torch.dtype, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Factor and offset in the type of the arithmetic, the bias in the offset."""
    scale, shift, bias = (None if t is None else t.to(acc_dtype(dtype)).contiguous() for t in (scale, shift, bias))
    if bias is not None:
        bias = bias if scale is None else bias * scale
        shift = bias if shift is None else shift + bias
    return scale, shift
