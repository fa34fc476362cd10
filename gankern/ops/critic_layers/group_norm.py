"""Group norm and instance norm: forward, backward and double backward as one kernel each (Wu and He 2018)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import backends
from gankern._layout import dense, not_a_view
from gankern.ops.critic_layers import reference
from gankern.ops.critic_layers.scope import Scope


class Running(NamedTuple):
    """Instance norm's running statistics, which its forward moves."""

    mean: Tensor
    var: Tensor
    momentum: float


def _plain(groups: int, eps: float) -> Any:
    """Group norm by its formula: stock's third derivative takes the mean and deviation for constants."""

    def function(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = input.reshape(input.size(0), groups, -1)
        var, mean = torch.var_mean(rows, 2, correction=0, keepdim=True)
        output = ((rows - mean) * (var + eps).rsqrt()).reshape(input.shape)
        output = output if weight is None else output * weight.unsqueeze(1)
        return output if bias is None else output + bias.unsqueeze(1)

    return function


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
        running: Running | None,
    ) -> Tensor:
        adapter = backends.select("critic_layers", input)
        output, mean, rstd = adapter.group_norm_forward(input, weight, bias, groups, eps)
        if running is not None:
            _move(running, mean, rstd.pow(-2) - eps, input.size(2))
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.groups, ctx.eps, ctx.scope = groups, eps, scope
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if grad_output is None:
            return None, None, None, *rest
        input, weight, bias, mean, rstd = ctx.saved_tensors
        if ctx.scope.input_gradient_only:
            return GroupNormInputGrad.apply(grad_output, input, weight, mean, rstd, ctx.eps), None, None, *rest
        if torch.is_grad_enabled():
            plain = _plain(ctx.groups, ctx.eps)
            return *reference.vjp(plain, (input, weight, bias), grad_output, create_graph=True), *rest
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
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangent is None:
            return None, None, None, None, None, None
        grad_output, input, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = reference.input_grad_vjp(_plain(mean.size(1), ctx.eps), grad_output, input, weight, tangent)
            return *grads, None, None, None
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


def _move(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves running statistics as stock does: each sample's by itself, then their mean."""
    unbiased = var.clamp_min(0) * (count / (count - 1))
    for kept, new in ((running.mean, mean), (running.var, unbiased)):
        kept.copy_(kept.lerp(new.mean(0).to(kept.dtype), running.momentum))


def _apply(
    scope: Scope,
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None = None,
) -> Any:
    params = [t for t in (weight, bias) if t is not None]
    if (
        not input.numel()
        or any(t.dtype != input.dtype or t.shape != input.shape[1:2] for t in params)
        or torch.is_autocast_enabled(input.device.type)
    ):
        return NotImplemented
    affine = [None if t is None else t.contiguous() for t in (weight, bias)]
    values = dense(input).view(*input.shape[:2], -1)
    return Unflatten.apply(GroupNorm.apply(values, *affine, groups, eps, scope, running), input.shape)


def group_norm(
    scope: Scope,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """:func:`torch.nn.functional.group_norm` and :func:`torch.group_norm`; NotImplemented for what stock refuses."""
    if input.dim() < 2 or num_groups < 1 or input.size(1) % num_groups or input.numel() == num_groups:
        return NotImplemented
    return _apply(scope, input, num_groups, weight, bias, eps)


def instance_norm(
    scope: Scope,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """:func:`torch.nn.functional.instance_norm` by the input's statistics: group norm with a channel a group."""
    if not use_input_stats or input.dim() < 3 or input.shape[2:].numel() < 2:
        return NotImplemented
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, momentum)
        if any(t.shape != input.shape[1:2] or t.requires_grad for t in running[:2]):
            return NotImplemented
    elif running_mean is not None or running_var is not None:
        return NotImplemented
    return _apply(scope, input, input.size(1), weight, bias, eps, running)
