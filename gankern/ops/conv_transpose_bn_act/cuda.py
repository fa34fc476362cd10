"""Adapter of the CUDA C++ kernels in csrc/cuda/batch_norm_act.cu."""

from __future__ import annotations

import itertools
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern._native import ACTIVATIONS, acc_dtype
from gankern.ops.conv_transpose_bn_act import passes, reference
from gankern.ops.conv_transpose_bn_act.passes import PACK_BYTES, Activation, Affine, Cut, Shape, Stats, Sums

__all__ = [
    "KERNELS",
    "backward",
    "forward_eval",
    "forward_train",
    "forward_train_from_sums",
    "refuse",
    "statistics",
    "update_running",
]

# Threads of a block.
_PLANES, _ROWS = 256, 512
# Bytes of a row that a block takes; and values, where they are read one by one.
_ROW_BYTES, _ROW_VALUES = 64, 32

_NAMES = (
    "batch_norm_statistics",
    "batch_norm_act_forward",
    "batch_norm_act_grad_sums",
    "batch_norm_act_input_grad",
    "batch_norm_finish",
    "batch_norm_update",
)


def _kernel(number: int, dtype: torch.dtype, **defines: Any) -> _cuda.Kernel:
    return _cuda.kernel("batch_norm_act", _NAMES[number], dtype, PASS=number, **defines)


def _finish(dtype: torch.dtype, sums: torch.dtype) -> _cuda.Kernel:
    return _kernel(4, dtype, SUMS=_cuda.TYPES[sums])


#: Every specialisation that may be launched.
KERNELS = [
    *(
        _kernel(number, dtype, ROWS=rows, VALUES=values)
        for dtype, rows, number in itertools.product(_cuda.TYPES, (0, 1), range(4))
        for values in (1, PACK_BYTES // dtype.itemsize)
    ),
    *(_finish(*dtypes) for dtypes in itertools.combinations_with_replacement((torch.float32, torch.float64), 2)),
    *(_kernel(5, dtype) for dtype in (torch.float32, torch.float64)),
]


class _Plan(NamedTuple):
    """How the passes over inputs of one shape and type are launched."""

    cut: Cut
    kernels: tuple[_cuda.Kernel, ...]
    block: int
    sizes: tuple[int, ...]


@lru_cache(maxsize=4096)
def _plan(shape: Shape, dtype: torch.dtype) -> _Plan:
    columns, block = 1, _PLANES  # threads beside each other over the channels
    if shape.rows:
        columns = min(
            _ROW_VALUES if shape.values == 1 else _ROW_BYTES // PACK_BYTES, 1 << (shape.packs - 1).bit_length()
        )
        block = _ROWS
    across = -(-shape.packs // columns) if shape.rows else shape.c
    cut = passes.cut(shape, dtype.itemsize, across, block // columns, block)
    kernels = tuple(_kernel(number, dtype, ROWS=shape.rows, VALUES=shape.values) for number in range(4))
    return _Plan(cut, kernels, block, (shape.n, shape.c, shape.hw, cut.units, across, columns))


class _Passes(passes.Passes):
    def _cut(self) -> Cut:
        self._plan = _plan(self.shape, self.input.dtype)
        return self._plan.cut

    def _launch(self, number: int, *arguments: Any, strides: tuple[int, int, int] = (0, 0, 0)) -> None:
        (across, parts, _), kernels, block, sizes = self._plan
        _cuda.launch(kernels[number], across * parts, block, *arguments, *sizes, *strides, device=self.input.device)

    def sum_values(self, sums: Sums, shift: Tensor) -> None:
        self._launch(0, self.input, sums.values, shift, strides=sums.strides)

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
        arguments = (self.input, output, *affine, *stats, sums.values, shift, sums.parts, float(eps))
        self._launch(1, *arguments, *_numbers(act), strides=sums.strides)

    def forward_constant(self, output: Tensor, affine: Affine, mean: Tensor, invstd: Tensor, act: Activation) -> None:
        self._launch(1, self.input, output, *affine, mean, invstd, None, None, None, 0, 0.0, *_numbers(act))

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
        arguments = (grad_output, self.input, grad_input, *affine, mean, invstd, sums.values)
        self._launch(2, *arguments, *_numbers(act), strides=sums.strides)

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
        arguments = (grad_output, self.input, grad_input, *affine, mean, invstd, sums.values, sums.parts, *grads)
        self._launch(3, *arguments, *_numbers(act), strides=sums.strides)

    def finish_stats(self, sums: Sums, shift: Tensor | None, stats: Stats, eps: float) -> None:
        self._finish(sums, shift, stats, (None, None), float(eps))

    def finish_grads(self, sums: Sums, invstd: Tensor, grads: tuple[Tensor, Tensor]) -> None:
        self._finish(sums, None, (None, invstd, None), grads, 0.0)

    def _finish(self, sums: Sums, shift: Tensor | None, stats: Any, grads: Any, eps: float) -> None:
        s, kernel = self.shape, _finish(acc_dtype(self.input.dtype), sums.values.dtype)
        arguments = (sums.values, shift, sums.parts, *stats, *grads, float(s.n * s.hw), eps, s.c)
        _cuda.launch(kernel, -(-s.c // _ROW_VALUES), _ROWS, *arguments, device=self.input.device)


def _numbers(act: Activation) -> tuple[float, int]:
    name, slope = act
    return float(slope), ACTIVATIONS[name]


statistics = partial(passes.statistics, _Passes)
forward_train = partial(passes.forward_train, _Passes)
forward_train_from_sums = partial(passes.forward_train_from_sums, _Passes)
forward_eval = partial(passes.forward_eval, _Passes)
backward = partial(passes.backward, _Passes)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbiased: float
) -> None:
    """As in reference.py, in one launch."""
    first, second = running_mean.data_ptr(), running_var.data_ptr()
    same = all(t.dtype == mean.dtype and t.is_contiguous() for t in (running_mean, running_var))
    if not same or abs(first - second) < mean.nbytes:
        reference.update_running(running_mean, running_var, mean, var, momentum, unbiased)
        return
    c = mean.numel()
    arguments = (running_mean, running_var, mean, var, float(momentum), float(unbiased), c)
    _cuda.launch(_kernel(5, mean.dtype), -(-c // _PLANES), _PLANES, *arguments, device=mean.device)
