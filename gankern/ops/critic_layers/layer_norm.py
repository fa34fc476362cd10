"""Layer norm: forward, backward and double backward as one kernel each (Ba et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import backends
from gankern.ops.critic_layers import cpu, reference
from gankern.ops.critic_layers.scope import Scope

backends.register("critic_layers", cpu=cpu, reference=reference)


def _plain(eps: float) -> Any:
    """Layer norm by its formula: stock's third derivative takes the mean and deviation for constants."""

    def function(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        var, mean = torch.var_mean(input, 1, correction=0, keepdim=True)
        output = (input - mean) * (var + eps).rsqrt()
        output = output if weight is None else output * weight
        return output if bias is None else output + bias

    return function


class LayerNorm(torch.autograd.Function):
    """Normalised rows (M, D), with weight and bias (D,) or None."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scope: Scope
    ) -> Tensor:
        adapter = backends.select("critic_layers", input)
        output, mean, rstd = adapter.layer_norm_forward(input, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.eps, ctx.scope = eps, scope
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        input, weight, bias, mean, rstd = ctx.saved_tensors
        if ctx.scope.input_gradient_only:
            return LayerNormInputGrad.apply(grad_output, input, weight, mean, rstd, ctx.eps), None, None, None, None
        if torch.is_grad_enabled():
            return *reference.vjp(_plain(ctx.eps), (input, weight, bias), grad_output, create_graph=True), None, None
        want = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        adapter = backends.select("critic_layers", input)
        grads = adapter.layer_norm_backward(grad_output, input, weight, mean, rstd, want)
        return (*(g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False)), None, None)


class LayerNormInputGrad(torch.autograd.Function):
    """Gradient of a layer norm's input, as a function of the output's gradient, the input and the weight."""

    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(grad_output, input, weight, mean, rstd)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        adapter = backends.select("critic_layers", input)
        return adapter.layer_norm_backward(grad_output, input, weight, mean, rstd, False)[0]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangent is None:
            return None, None, None, None, None, None
        grad_output, input, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = reference.input_grad_vjp(_plain(ctx.eps), grad_output, input, weight, tangent)
            return *grads, None, None, None
        adapter = backends.select("critic_layers", input)
        grads = adapter.layer_norm_double_backward(
            tangent, grad_output, input, weight, mean, rstd, weight is not None and ctx.needs_input_grad[2]
        )
        return *grads, None, None, None
