"""Batch norm + activation on a GPU, in the passes over memory that its kernels make; each backend brings the passes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gankern._layout import like_layout, memory_format
from gankern._native import acc_dtype

# Multiprocessors of an H100, and threads that each holds at a time.
_PROCESSORS, _THREADS = 132, 2048
# Blocks of a pass for each that runs at a time, so that none is waited for long.
_WAVES = 4
PACK_BYTES = 16

Affine = tuple[Tensor | None, Tensor | None]  # weight and bias
Activation = tuple[str, float]  # name and negative slope
Stats = tuple[Tensor, Tensor, Tensor]  # mean, 1 / sqrt(var + eps) and var


class Shape(NamedTuple):
    """Planes of hw values for each of n images and c channels; or rows of c values, where hw is 1."""

    n: int
    c: int
    hw: int
    values: int  # that are read and written at once

    @property
    def rows(self) -> bool:
        return self.hw == 1

    @property
    def packs(self) -> int:
        """Of a row."""
        return -(-self.c // self.values)

    @property
    def units(self) -> int:
        """What parts are made of: rows, or packs of one channel."""
        return self.n if self.rows else self.n * self.hw // self.values


def shape_of(input: Tensor, *others: Tensor | None) -> Shape:
    """Of a tensor that is contiguous or channels_last and not empty; `others` are read or written beside it."""
    n, c = input.size(0), input.size(1)
    hw = input.numel() // (n * c)
    if hw == 1 or not input.is_contiguous():
        n, hw = n * hw, 1
    values, addresses = PACK_BYTES // input.element_size(), input.data_ptr()
    for other in others:
        if other is not None:
            addresses |= other.data_ptr()
    aligned = addresses % PACK_BYTES == 0
    return Shape(n, c, hw, values if aligned and (c if hw == 1 else hw) % values == 0 else 1)


class Cut(NamedTuple):
    """The blocks of a pass: so many beside each other for the channels, times the parts of so many units each."""

    across: int
    parts: int
    units: int


def cut(shape: Shape, itemsize: int, across: int, at_once: int, threads: int) -> Cut:
    """For blocks of so many threads, which take so many units at once."""
    most = max(1, _WAVES * _PROCESSORS * _THREADS // threads // across)
    if shape.rows:
        # Each block of the next pass reads two sums a part and channel: a quarter of its own bytes at most.
        most = min(most, max(1, math.isqrt(shape.n * itemsize // 32)), 128)
        count = -(-shape.units // at_once)
    else:
        # Several packs for each thread, where there are enough for all processors.
        most = min(most, 256)
        count = max(-(-shape.units // (4 * at_once)), min(-(-shape.units // at_once), -(-_PROCESSORS // across)))
    units = -(-shape.units // min(most, count))
    return Cut(across, -(-shape.units // units), units)


class Sums(NamedTuple):
    """Two sums of each part and channel, and the strides from part to part, from first to second, over channels."""

    values: Tensor
    parts: int
    strides: tuple[int, int, int]

    @staticmethod
    def table(values: Tensor) -> Sums:
        """Of shape (parts, 2, C)."""
        parts, _, c = values.shape
        return Sums(values, parts, (2 * c, c, 1))


class Passes(ABC):
    """The kernels, for one input and what is walked beside it."""

    def __init__(self, input: Tensor, *others: Tensor | None) -> None:
        self.input = input
        self.shape = shape_of(input, *others)
        self.cut = self._cut()

    @abstractmethod
    def _cut(self) -> Cut: ...

    @abstractmethod
    def sum_values(self, sums: Sums, shift: Tensor) -> None:
        """Write the sums of x - shift and of its square, and the shift of each channel."""

    @abstractmethod
    def forward(
        self,
        output: Tensor,
        affine: Affine,
        stats: Stats,
        sums: Sums,
        shift: Tensor,
        eps: float,
        act: Activation,
    ) -> None:
        """Make statistics of the sums, then normalise and activate."""

    @abstractmethod
    def forward_constant(self, output: Tensor, affine: Affine, mean: Tensor, invstd: Tensor, act: Activation) -> None:
        """Normalise with given statistics and activate."""

    @abstractmethod
    def sum_grads(
        self,
        grad_output: Tensor,
        grad_input: Tensor | None,
        affine: Affine,
        mean: Tensor,
        invstd: Tensor,
        sums: Sums,
        act: Activation,
    ) -> None:
        """Write the sums of dz and dz * (x - mean), and the input's gradient for constant statistics if it is given."""

    @abstractmethod
    def backward(
        self,
        grad_output: Tensor,
        grad_input: Tensor,
        affine: Affine,
        mean: Tensor,
        invstd: Tensor,
        sums: Sums,
        grads: tuple[Tensor, Tensor],
        act: Activation,
    ) -> None:
        """Make the gradients of weight and bias of the sums, then the input's."""

    @abstractmethod
    def finish_stats(self, sums: Sums, shift: Tensor | None, stats: Stats, eps: float) -> None:
        """Make statistics of a table of sums."""

    @abstractmethod
    def finish_grads(self, sums: Sums, invstd: Tensor, grads: tuple[Tensor, Tensor]) -> None:
        """Make the gradients of weight and bias of a table of sums."""

    def scratch(self, *, table: bool) -> Sums:
        """For the sums of a pass; as a table, or as the next pass reads them best."""
        parts, c = self.cut.parts, self.shape.c
        values = self.input.new_empty(parts, 2, c, dtype=acc_dtype(self.input.dtype))
        return Sums.table(values) if table or self.shape.rows else Sums(values, parts, (1, parts, 2 * parts))

    def sums_of_values(self, *, table: bool = False) -> tuple[Sums, Tensor]:
        sums = self.scratch(table=table)
        shift = sums.values.new_empty(self.shape.c)
        self.sum_values(sums, shift)
        return sums, shift


def _stats(input: Tensor) -> Stats:
    def empty() -> Tensor:
        return input.new_empty(input.size(1), dtype=acc_dtype(input.dtype))

    return empty(), empty(), empty()


def _no_stats(input: Tensor) -> Stats:
    """Of no values, as in stock."""
    mean, invstd, var = (t.fill_(math.nan) for t in _stats(input))
    return mean, invstd, var


def _output(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def statistics(kind: type[Passes], input: Tensor, eps: float) -> Stats:
    if input.numel() == 0:
        return _no_stats(input)
    passes, stats = kind(input), _stats(input)
    passes.finish_stats(*passes.sums_of_values(table=True), stats, eps)
    return stats


def forward_train(
    kind: type[Passes],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = _output(input)
    if input.numel() == 0:
        return output, *_no_stats(input)
    passes, stats = kind(input, output), _stats(input)
    sums, shift = passes.sums_of_values()
    passes.forward(output, (weight, bias), stats, sums, shift, eps, (activation, negative_slope))
    return output, *stats


def forward_train_from_sums(
    kind: type[Passes],
    input: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward_train` of an input whose maker has added it up already: its first pass is left out.

    Parameters
    ----------
    input : Tensor
        Contiguous or channels_last.
    sums : Tensor
        Shape (parts, 2, C), contiguous, float64. For each part, however the input is cut into them, and each channel:
        ``[:, 0]`` the sum of its values, ``[:, 1]`` that of their squares.
    weight, bias, eps, activation, negative_slope
        As in :func:`forward_train`.
    """
    output = _output(input)
    if input.numel() == 0:
        return output, *_no_stats(input)
    passes, stats, act = kind(input, output), _stats(input), (activation, negative_slope)
    passes.finish_stats(Sums.table(sums), None, stats, eps)
    passes.forward_constant(output, (weight, bias), stats[0], stats[1], act)
    return output, *stats


def forward_eval(
    kind: type[Passes],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    output = _output(input)
    if input.numel():
        kind(input, output).forward_constant(output, (weight, bias), mean, invstd, (activation, negative_slope))
    return output


def backward(
    kind: type[Passes],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, grad_input = like_layout(grad_output, input), _output(input)
    if input.numel() == 0:
        return grad_input, torch.zeros_like(mean), torch.zeros_like(mean)
    grads = torch.empty_like(mean), torch.empty_like(mean)
    passes, affine, act = kind(input, grad_output, grad_input), (weight, bias), (activation, negative_slope)
    sums = passes.scratch(table=not training)
    passes.sum_grads(grad_output, None if training else grad_input, affine, mean, invstd, sums, act)
    if training:
        passes.backward(grad_output, grad_input, affine, mean, invstd, sums, grads, act)
    else:
        passes.finish_grads(sums, invstd, grads)
    return grad_input, *grads
