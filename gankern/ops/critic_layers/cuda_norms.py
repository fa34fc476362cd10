"""Launches of the CUDA C++ kernels in csrc/cuda/norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import _cuda
from gankern.ops.critic_layers.norms import SUMS, Given, Shape, Tile, Tiles

__all__ = ["KERNELS", "CudaNorms"]

_THREADS = 256  # as in the source
_ROWS = 4  # groups that a block finishes
# Values that a thread adds up of each array, in packs.
_REPEAT = 4

_PASSES = ("sums", "finish", "apply", "add_parts")


def _kernel(name: str, dtype: torch.dtype, order: int) -> _cuda.Kernel:
    return _cuda.kernel("norm", f"norm_{name}", dtype, ORDER=order, PASS=_PASSES.index(name))


#: Every specialisation that may be launched.
KERNELS = [
    _kernel(name, dtype, order)
    for dtype in _cuda.TYPES
    for order in range(len(SUMS))
    for name in (_PASSES if order else _PASSES[:3])
]


def _ceil_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _packed(given: Given, shape: Shape) -> bool:
    """Whether packs of neighbours are of one sample, and of one channel where they are of values."""
    dense = shape.channels if shape.last else shape.inner
    return _cuda.packed(dense, given.input, given.grad_output, given.tangent)


def _threads(given: Given, shape: Shape) -> tuple[int, int, int]:
    """Neighbours of a thread, threads along what is dense in memory, and threads along the rest."""
    lanes = 16 // given.input.element_size() if _packed(given, shape) else 1
    dense, rest = (shape.channels, shape.inner) if shape.last else (shape.inner, shape.channels)
    across = min(_THREADS, _ceil_power(-(-dense // lanes)))
    return lanes, across, min(_THREADS // across, _ceil_power(rest))


class CudaNorms:
    """The launches that :mod:`gankern.ops.critic_layers.norms` asks for."""

    def tiles(self, given: Given, shape: Shape) -> Tiles:
        lanes, across, down = _threads(given, shape)
        # A thread has its channels for good where each has an entry or a gradient.
        repeat = _REPEAT if shape.whole else 1
        if shape.last:
            inner = down * (_REPEAT if shape.inner > down else 1)
            return Tiles(Tile(across * lanes * repeat, inner), Tile(across * lanes, inner))
        inner = across * lanes * (_REPEAT if shape.inner > across * lanes else 1)
        return Tiles(Tile(down * repeat, inner), Tile(down, inner))

    def sums(self, given: Given, shape: Shape, tile: Tile, entries: Tensor) -> None:
        x = given.input
        arrays = (x, given.grad_output, given.tangent, given.weight, given.mean, given.rstd, entries)
        self._start("sums", given, shape, tile, shape.samples, *arrays)

    def finish(self, given: Given, shape: Shape, entries: Tensor, eps: float, numbers: Tensor) -> None:
        count = entries.numel() // (shape.rows * entries.size(3))
        arguments = (entries, given.input, numbers, shape.rows, count, *shape[1:], float(eps))
        kernel = _kernel("finish", given.input.dtype, given.order)
        _cuda.launch(kernel, -(-shape.rows // _ROWS), 32 * _ROWS, *arguments, device=given.input.device)

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
        mean, rstd = numbers.unbind() if given.order == 0 else (given.mean, given.rstd)
        outputs = results[0], results[1] if given.order == 2 else None
        inputs = given.input, given.grad_output, given.tangent, given.weight, bias, mean, rstd, numbers
        self._start("apply", given, shape, tile, -(-shape.samples // each), *inputs, *outputs, parts, last=(each,))

    def _start(
        self,
        name: str,
        given: Given,
        shape: Shape,
        tile: Tile,
        samples: int,
        *arrays: Tensor | None,
        last: tuple[int, ...] = (),
    ) -> None:
        _, across, down = _threads(given, shape)
        tiles = tile.counts(shape)
        kernel = _kernel(name, given.input.dtype, given.order)
        arguments = (*arrays, *shape, *tiles, *tile, across, _packed(given, shape), *last)
        grid = samples * tiles[0] * tiles[1]
        _cuda.launch(kernel, grid, across * down, *arguments, device=given.input.device)

    def add_parts(self, parts: Tensor, results: list[Tensor]) -> None:
        params, count, channels = parts.shape
        kernel = _kernel("add_parts", results[0].dtype, 3 - params)
        arguments = (parts, results[0], results[1] if params == 2 else None, count, channels)
        threads = 32 * min(32, _ceil_power(count))
        _cuda.launch(kernel, -(-channels // 32), threads, *arguments, device=parts.device)
