"""Norms on the GPU: what the adapters of both languages do around their kernels.

Layer norm's rows (M, D) are M samples of D channels of one value, group norm's (N, C, L) are N samples of C channels.
Sums over a group's tiles come first, one entry a tile or a channel of it; a small launch makes them the numbers of a
group; a last one writes the results. Gradients of parameters are summed up over some samples in registers by the last,
and their parts in one more launch. The formulas are in csrc/include/gankern/layer_norm.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gankern._native import acc_dtype

# Blocks that fill a GPU.
_BLOCKS = 512

#: Sums of each element that the forward, the backward and its derivative need.
SUMS = (2, 2, 5)


class Shape(NamedTuple):
    """Samples of channels of values; with `last`, a value's channels lie side by side."""

    samples: int
    channels: int
    inner: int
    groups: int
    last: bool

    @property
    def whole(self) -> bool:
        """Whether a sample is one group, so that a tile has one entry."""
        return self.groups == 1

    @property
    def rows(self) -> int:
        return self.samples * self.groups


class Tile(NamedTuple):
    """Channels and values of each that a block takes."""

    channels: int
    inner: int

    def counts(self, shape: Shape) -> tuple[int, int]:
        return -(-shape.channels // self.channels), -(-shape.inner // self.inner)


class Tiles(NamedTuple):
    """Of the launch that adds up, and of the one that writes the results."""

    sums: Tile
    results: Tile


class Given(NamedTuple):
    """Inputs of a pass: none but the first two for the forward, no tangent for the backward."""

    input: Tensor
    weight: Tensor | None
    grad_output: Tensor | None = None
    tangent: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None

    @property
    def order(self) -> int:
        return 0 if self.grad_output is None else 1 if self.tangent is None else 2


class Kernels(Protocol):
    """Launches of one language; an order is 0 for the forward, 1 for the backward, 2 for the double backward."""

    def tiles(self, given: Given, shape: Shape) -> Tiles: ...

    def sums(self, given: Given, shape: Shape, tile: Tile, entries: Tensor) -> None:
        """Entries (N, C or its tiles, tiles of L, sums)."""

    def finish(self, given: Given, shape: Shape, entries: Tensor, eps: float, numbers: Tensor) -> None:
        """Numbers of each group: mean and rstd, or the means of the sums and, for the last, the curvature."""

    def apply(
        self,
        given: Given,
        shape: Shape,
        tile: Tile,
        numbers: Tensor,
        bias: Tensor | None,
        results: list[Tensor],
        parts: Tensor | None,
        each: int,
    ) -> None:
        """Results, and with `parts` (gradients of parameters, parts, C) those of `each` samples a part."""

    def add_parts(self, parts: Tensor, results: list[Tensor]) -> None: ...


class Norms:
    """The norms' functions of an adapter: those of :mod:`gankern.ops.critic_layers.cpu`."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def _run(
        self, given: Given, shape: Shape, bias: Tensor | None, eps: float, params: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Numbers of the groups, results like the input, and gradients of so many parameters."""
        x = given.input
        tiles = self._kernels.tiles(given, shape)
        summed, written = tiles.sums.counts(shape), tiles.results.counts(shape)
        count = SUMS[given.order]
        entries = torch.empty(
            *(shape.samples, summed[0] if shape.whole else shape.channels, summed[1], count),
            dtype=torch.float64,
            device=x.device,
        )
        self._kernels.sums(given, shape, tiles.sums, entries)
        numbers = torch.empty(count, shape.rows, dtype=acc_dtype(x.dtype), device=x.device)
        self._kernels.finish(given, shape, entries, eps, numbers)
        results = [torch.empty_like(x) for _ in range(2 if given.order == 2 else 1)]
        each, parts = 1, None
        if params:
            each = -(-shape.samples // -(-_BLOCKS // (written[0] * written[1])))
            sizes = params, -(-shape.samples // each) * written[1], shape.channels
            parts = torch.empty(sizes, dtype=acc_dtype(x.dtype), device=x.device)
        self._kernels.apply(given, shape, tiles.results, numbers, bias, results, parts, each)
        grads = [x.new_empty(shape.channels) for _ in range(params)]
        if parts is not None:
            self._kernels.add_parts(parts, grads)
        return numbers, results, grads

    def _forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Shape, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        numbers, (output,), _ = self._run(Given(input, weight), shape, bias, eps, 0)
        mean, rstd = numbers.unbind()
        return output, mean, rstd

    def _backward(self, given: Given, shape: Shape, want_params: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        _, (grad_input,), grads = self._run(given, shape, None, 0.0, 2 if want_params else 0)
        return grad_input, *(grads if want_params else (None, None))

    def _double_backward(self, given: Given, shape: Shape, want_weight: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        _, results, grads = self._run(given, shape, None, 0.0, int(want_weight))
        return results[0], results[1], grads[0] if want_weight else None

    def layer_norm_forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        input = input.contiguous()
        return self._forward(input, weight, bias, _of_rows(input), eps)

    def layer_norm_backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        want_params: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        input = input.contiguous()
        given = Given(input, weight, grad_output.contiguous(), None, mean, rstd)
        return self._backward(given, _of_rows(input), want_params)

    def layer_norm_double_backward(
        self,
        tangent: Tensor,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        want_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        input = input.contiguous()
        given = Given(input, weight, grad_output.contiguous(), tangent.contiguous(), mean, rstd)
        return self._double_backward(given, _of_rows(input), want_weight)

    def group_norm_forward(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = self._forward(input, weight, bias, _of_channels(input, groups), eps)
        return output, mean.view(-1, groups), rstd.view(-1, groups)

    def group_norm_backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        want_params: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = Given(input, weight, _as(grad_output, input), None, mean, rstd)
        return self._backward(given, _of_channels(input, mean.size(1)), want_params)

    def group_norm_double_backward(
        self,
        tangent: Tensor,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        want_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        given = Given(input, weight, _as(grad_output, input), _as(tangent, input), mean, rstd)
        return self._double_backward(given, _of_channels(input, mean.size(1)), want_weight)


def _of_rows(input: Tensor) -> Shape:
    return Shape(input.size(0), input.size(1), 1, 1, True)


def _of_channels(input: Tensor, groups: int) -> Shape:
    samples, channels, inner = input.shape
    return Shape(samples, channels, inner, groups, not input.is_contiguous())


def _as(tensor: Tensor, input: Tensor) -> Tensor:
    """The tensor in the memory order of the input."""
    if input.is_contiguous():
        return tensor.contiguous()
    return tensor if tensor.stride() == input.stride() else torch.empty_like(input).copy_(tensor)


def functions(kernels: Kernels) -> tuple[Any, ...]:
    """Forward, backward and double backward of layer norm and of group norm."""
    norms = Norms(kernels)
    layer = norms.layer_norm_forward, norms.layer_norm_backward, norms.layer_norm_double_backward
    return *layer, norms.group_norm_forward, norms.group_norm_backward, norms.group_norm_double_backward
