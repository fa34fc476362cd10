"""Sums of activations, and of the gradients of what is used twice, in memory that is kept.

Autograd's own sums allocate a tensor each.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from gankern import backends
from gankern.ops.critic_layers.scope import Scope

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
        return input.view_as(input), input.view_as(input)

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


class Forks:
    """The tensors that a critic has used, each with a handle for its next use."""

    def __init__(self) -> None:
        self._handles: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def use(self, tensor: Any) -> Any:
        """A handle on a large activation that another use of it does not share; anything else as it is."""
        if not isinstance(tensor, Tensor) or tensor.grad_fn is None or not large(tensor):
            return tensor
        known = self._handles.get(id(tensor))
        # Not where it was changed in place since: it is another value with another history.
        fresh = known is None or known[0]() is not tensor or known[1] != tensor._version
        handle, rest = Fork.apply(tensor if known is None or fresh else known[2])
        self._handles[id(tensor)] = weakref.ref(tensor), tensor._version, rest
        return handle

    def clear(self) -> None:
        self._handles.clear()


def add(scope: Scope, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """:func:`torch.add` of activations."""
    if (
        not isinstance(input, Tensor)
        or not isinstance(other, Tensor)
        or alpha != 1
        or input.shape != other.shape
        or input.dtype != other.dtype
        or not input.is_floating_point()
    ):
        return NotImplemented
    return Sum.apply(input, other)
