"""Tensors of all ranks of a process group, with gradients to each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gankern._native import acc_dtype


def check_group(name: str, value: Any) -> None:
    """Whether value is None, "world" or a process group of which this rank is a member."""
    known = value is None or (isinstance(value, str) and value == "world")
    if not known and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(f'{name} must be None, "world" or a ProcessGroup of this rank; got {value!r}')


def world_size(group: Any) -> int:
    """Ranks of the group; "world" is this process alone where torch.distributed is not initialised."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(_resolved(group))


def rank(group: Any) -> int:
    """This rank's number in the group."""
    return dist.get_rank(_resolved(group))


# Collectives inside of a Function are not traced.
@torch.compiler.disable
def gather(input: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, which have one shape, stacked: (ranks, *input.shape).

    Differentiable to any order; a gradient is the sum of all ranks' gradients, so that all of them must call backward.
    """
    return _Gather.apply(input, _resolved(group))


@torch.compiler.disable
def gather_ints(values: tuple[int, ...], device: torch.device, group: Any) -> list[list[int]]:
    """The numbers of all ranks, a list each."""
    return _gathered(torch.tensor(values, dtype=torch.int64, device=device), _resolved(group)).tolist()


def _resolved(group: Any) -> Any:
    return dist.group.WORLD if isinstance(group, str) else group


def _gathered(input: Tensor, group: Any) -> Tensor:
    output = input.new_empty((dist.get_world_size(group), *input.shape))
    dist.all_gather(list(output.unbind(0)), input.contiguous(), group=group)
    return output


# Each is the other's derivative, to any order.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(input, group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad_output, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """This rank's row of the sum over ranks, by an all-reduce: gloo has no reduce-scatter in older versions."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = torch.empty(input.shape, dtype=acc_dtype(input.dtype), device=input.device).copy_(input)
        dist.all_reduce(total, group=group)
        return total[dist.get_rank(group)].to(input.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad_output, ctx.group), None
