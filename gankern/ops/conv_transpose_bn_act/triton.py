"""Adapter of the Triton kernels in triton_kernels.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gankern import _triton
from gankern._native import ACTIVATIONS
from gankern._triton import bits, refuse
from gankern.ops.conv_transpose_bn_act import passes
from gankern.ops.conv_transpose_bn_act import triton_kernels as kernels
from gankern.ops.conv_transpose_bn_act.passes import PACK_BYTES, Activation, Affine, Cut, Stats, Sums

__all__ = ["COMPILED", "backward", "forward_eval", "forward_train", "forward_train_from_sums", "refuse", "statistics"]

_WARPS = 8
# Of a tile, a pack for each thread; of a row of it; and values of a plane, where they are read one by one.
_BYTES, _ROW_BYTES, _VALUES = 4096, 64, 1024


def _tiles(dtype: torch.dtype, rows: bool, values: int) -> dict[str, Any]:
    """How a tensor is read."""
    width = _ROW_BYTES // dtype.itemsize if rows else values
    size = _VALUES if width == 1 else _BYTES // dtype.itemsize
    return {"ROWS": rows, "R": size // width, "W": width}


def _compiled(
    kernel: Any, dtype: torch.dtype, pointers: tuple[tuple[str, str], ...] = (), **constants: Any
) -> _triton.Compiled:
    storage = dict.fromkeys(("x", "y", "dy", "dx"), "T*")
    integers = dict.fromkeys((*kernels.INTEGERS, "c"), "i64") | dict.fromkeys(("parts", "flags", "act"), "i32")
    signature = {name: (storage | integers | dict(pointers)).get(name, "A*") for name in kernel.arg_names}
    return _triton.Compiled(kernel, signature, constants, dtype, {"num_warps": _WARPS})


#: Every specialisation that may be launched.
COMPILED = [
    *(
        _compiled(kernel, dtype, **_tiles(dtype, rows, values))
        for dtype in _triton.TYPES
        for rows, values in ((False, 1), (False, PACK_BYTES // dtype.itemsize), (True, 1))
        for kernel in (kernels.sum_values, kernels.forward, kernels.sum_grads, kernels.input_grad)
    ),
    *(_compiled(kernels.finish, dtype) for dtype in (torch.float32, torch.float64)),
    _compiled(kernels.finish, torch.float32, (("sums", "*fp64"),)),
]


class _Passes(passes.Passes):
    def _cut(self) -> Cut:
        s, dtype = self.shape, self.input.dtype
        self._tiles = _tiles(dtype, s.rows, s.values)
        across = -(-s.c // self._tiles["W"]) if s.rows else s.c
        return passes.cut(s, dtype.itemsize, across, self._tiles["R"], 32 * _WARPS)

    def _launch(self, kernel: Any, *arguments: Any, strides: tuple[int, int, int] = (0, 0, 0)) -> None:
        s, (across, parts, units) = self.shape, self.cut
        sizes = (s.n, s.c, s.hw if s.rows else s.hw // s.values, units)
        types = _triton.types(self.input.dtype)
        constants = {k: v for k, v in (types | self._tiles).items() if k in kernel.arg_names}
        sized, device = (*arguments, *sizes, *strides), self.input.device
        _triton.start(kernel, (across * parts,), *sized, device=device, **constants, num_warps=_WARPS)

    def sum_values(self, sums: Sums, shift: Tensor) -> None:
        self._launch(kernels.sum_values, self.input, sums.values, shift, strides=sums.strides)

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
        given, flags = _given(sums.values, *affine)
        arguments = (self.input, output, *given, *stats, sums.values, shift, sums.parts, bits(eps))
        self._launch(kernels.forward, *arguments, flags | kernels.SUMS.value, *_numbers(act), strides=sums.strides)

    def forward_constant(self, output: Tensor, affine: Affine, mean: Tensor, invstd: Tensor, act: Activation) -> None:
        given, flags = _given(mean, *affine)
        arguments = (self.input, output, *given, mean, invstd, mean, mean, mean, 0, 0)
        self._launch(kernels.forward, *arguments, flags, *_numbers(act))

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
        given, flags = _given(mean, *affine)
        if grad_input is None:
            grad_input, flags = grad_output, flags | kernels.SUMS.value
        arguments = (grad_output, self.input, grad_input, *given, mean, invstd, sums.values, flags)
        self._launch(kernels.sum_grads, *arguments, *_numbers(act), strides=sums.strides)

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
        given, flags = _given(mean, *affine)
        arguments = (grad_output, self.input, grad_input, *given, mean, invstd, sums.values, sums.parts, *grads, flags)
        self._launch(kernels.input_grad, *arguments, *_numbers(act), strides=sums.strides)

    def finish_stats(self, sums: Sums, shift: Tensor | None, stats: Stats, eps: float) -> None:
        flags = kernels.SUMS.value | (0 if shift is None else kernels.SHIFT.value)
        offset = stats[0] if shift is None else shift
        self._finish(sums, offset, stats, (stats[0], stats[0]), eps, flags)

    def finish_grads(self, sums: Sums, invstd: Tensor, grads: tuple[Tensor, Tensor]) -> None:
        self._finish(sums, invstd, (invstd, invstd, invstd), grads, 0.0, 0)

    def _finish(
        self, sums: Sums, shift: Tensor, stats: Stats, grads: tuple[Tensor, Tensor], eps: float, flags: int
    ) -> None:
        s, accumulated = self.shape, _triton.types(self.input.dtype)["A"]
        arguments = (sums.values, shift, sums.parts, *stats, *grads, s.n * s.hw, bits(eps), flags, s.c, accumulated)
        grid, device = (-(-s.c // kernels.COLUMNS.value),), self.input.device
        _triton.start(kernels.finish, grid, *arguments, device=device, num_warps=_WARPS)


def _given(other: Tensor, *tensors: Tensor | None) -> tuple[list[Tensor], int]:
    """Weight and bias, with another tensor for those that are not there, and the flags of those that are."""
    flags = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    return [other if t is None else t for t in tensors], flags


def _numbers(act: Activation) -> tuple[int, int]:
    name, slope = act
    return bits(slope), ACTIVATIONS[name]


statistics = partial(passes.statistics, _Passes)
forward_train = partial(passes.forward_train, _Passes)
forward_train_from_sums = partial(passes.forward_train_from_sums, _Passes)
forward_eval = partial(passes.forward_eval, _Passes)
backward = partial(passes.backward, _Passes)
