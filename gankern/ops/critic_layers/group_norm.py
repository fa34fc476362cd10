"""Group norm and instance norm: forward, backward and double backward as one kernel each (Wu and He 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gankern import backends
from gankern._layout import dense, not_a_view
from gankern.ops.critic_layers.scope import Scope


class GroupNorm(torch.autograd.Function):
    """Normalised groups of the channels of (N, C, L), with weight and bias (C,) or None.

    The input is contiguous or has the channels last, and the output is laid out as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        scope: Scope,
    ) -> Tensor:
        adapter = backends.select("critic_layers", input)
        output, mean, rstd = adapter.group_norm_forward(input, weight, bias, groups, eps)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.groups, ctx.eps, ctx.scope = groups, eps, scope
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 3
        if grad_output is None:
            return None, None, None, *rest
        input, weight, mean, rstd = ctx.saved_tensors
        if not ctx.scope.wants_parameters():
            return GroupNormInputGrad.apply(grad_output, input, weight, mean, rstd, ctx.eps), None, None, *rest
        want = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        adapter = backends.select("critic_layers", input)
        grads = adapter.group_norm_backward(grad_output, input, weight, mean, rstd, want)
        return (*(g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False)), *rest)


class GroupNormInputGrad(torch.autograd.Function):
    """Gradient of a group norm's input, as a function of the output's gradient, the input and the weight."""

    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(grad_output, input, weight, mean, rstd)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        adapter = backends.select("critic_layers", input)
        return adapter.group_norm_backward(grad_output, input, weight, mean, rstd, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangent is None:
            return None, None, None, None, None, None
        grad_output, input, weight, mean, rstd = ctx.saved_tensors
        adapter = backends.select("critic_layers", input)
        grads = adapter.group_norm_double_backward(
            tangent, grad_output, input, weight, mean, rstd, weight is not None and ctx.needs_input_grad[2]
        )
        return *grads, None, None, None


class Unflatten(torch.autograd.Function):
    """(N, C, L) in another shape; not a view, so that what follows may change it in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = values.shape
        ctx.set_materialize_grads(False)
        return not_a_view(values.view(shape))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad_output is None else grad_output.reshape(ctx.shape), None


def _apply(scope: Scope, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    params = [t for t in (weight, bias) if t is not None]
    if (
        not input.numel()
        or any(t.dtype != input.dtype or t.shape != input.shape[1:2] for t in params)
        or torch.is_autocast_enabled(input.device.type)
    ):
        return NotImplemented
    affine = [None if t is None else t.contiguous() for t in (weight, bias)]
    values = dense(input).view(*input.shape[:2], -1)
    return Unflatten.apply(GroupNorm.apply(values, *affine, groups, eps, scope), input.shape)


def group_norm(
    scope: Scope,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """:func:`torch.nn.functional.group_norm`; NotImplemented for what stock refuses."""
    if input.dim() < 2 or num_groups < 1 or input.size(1) % num_groups or input.numel() == num_groups:
        return NotImplemented
    return _apply(scope, input, num_groups, weight, bias, eps)


def instance_norm(
    scope: Scope, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    """:func:`torch.nn.functional.instance_norm` by the input's statistics: group norm with a channel a group."""
    if input.dim() < 3 or input.shape[2:].numel() < 2:
        return NotImplemented
    return _apply(scope, input, input.size(1), weight, bias, eps)
