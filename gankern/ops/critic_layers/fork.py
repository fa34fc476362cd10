"""Sums of activations, and of the gradients of what is used twice, in memory that is kept.

Autograd's own sums allocate a tensor each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import backends

# Below so many bytes malloc keeps the memory.
_LARGE = 1 << 20


def large(tensor: Tensor) -> bool:
    """Whether the sum of its gradients is worth a node of its own."""
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() >= _LARGE


class Fork(torch.autograd.Function):
    """Two handles on one tensor, whose gradients are summed here."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return torch.ops.aten.alias.default(input), torch.ops.aten.alias.default(input)

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        if first is None or second is None:
            return second if first is None else first
        return Sum.apply(first, second)


class Sum(torch.autograd.Function):
    """``first + second`` of one shape."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return backends.select("critic_layers", first, second).add(first, second)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad_output is None or not torch.is_grad_enabled():
            return grad_output, grad_output
        return Fork.apply(grad_output)
