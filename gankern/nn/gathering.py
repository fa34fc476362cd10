"""Tensors of all ranks of a process group, with gradients to each of them; its import is that of torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gankern._native import acc_dtype
from gankern.nn.over_ranks import resolved


# Collectives inside of a Function are not traced.
@torch.compiler.disable
def gather(input: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, which have one shape, stacked: (ranks, *input.shape).

    Differentiable to any order; a gradient is the sum of all ranks' gradients, so that all of them must call backward.
    """
    return _Gather.apply(input, resolved(group))


@torch.compiler.disable
def gather_ints(values: tuple[int, ...], device: torch.device, group: Any) -> list[list[int]]:
    """The numbers of all ranks, a list each."""
    return _gathered(torch.tensor(values, dtype=torch.int64, device=device), resolved(group)).tolist()


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
