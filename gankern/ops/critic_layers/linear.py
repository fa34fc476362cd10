"""Convolutions and linear layers: linear in the input, so that the second derivative needs no third pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import backends
from gankern.ops.conv_act.reference import ConvOptions
from gankern.ops.critic_layers import reference
from gankern.ops.critic_layers.scope import Scope


def _layers(*tensors: Tensor) -> Any:
    """Kernels for tensors of which no graph is recorded; else torch's."""
    return reference if torch.is_grad_enabled() else backends.select("critic_layers", *tensors)


class Conv(torch.autograd.Function):
    """Convolution of any dimension, transposed or not; ``first`` if its input is ``scope.points``."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, scope: Scope, first: bool
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.options, ctx.scope, ctx.has_bias, ctx.first = options, scope, bias is not None, first
        ctx.set_materialize_grads(False)
        layers = _layers(input, weight)
        if scope.as_stock:
            layers = layers if scope.turns else reference
            return layers.conv_as_stock(input, weight, bias, options)
        return layers.conv(input, weight, bias, options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None, None
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and (ctx.scope.input_gradient_only or not ctx.first):
            grad_input = ConvInputGrad.apply(grad_output, weight, input.detach(), ctx.options)
        if not ctx.scope.input_gradient_only:
            if ctx.needs_input_grad[1]:
                grad_weight = _layers(input, weight).conv_weight_grad(grad_output, input, weight, ctx.options)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad_output.sum((0, *range(2, grad_output.dim())))
        return grad_input, grad_weight, grad_bias, None, None, None


class ConvInputGrad(torch.autograd.Function):
    """Gradient of a convolution's input: linear in the gradient of the output and in the weight."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, weight: Tensor, input: Tensor, options: ConvOptions) -> Tensor:
        # Of the input only its shape is used.
        layers = _layers(grad_output, weight)
        turned = layers.channels_last(grad_output)
        # Saved, not an attribute: autograd lets go of it as soon as the backward has run.
        ctx.save_for_backward(grad_output, weight, turned)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return layers.conv_input_grad(turned, weight, input, options)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangent is None:
            return None, None, None, None
        grad_output, weight, turned = ctx.saved_tensors
        layers = _layers(tangent, weight)
        if not torch.is_grad_enabled():
            grad_output, tangent = turned, layers.channels_last(tangent)
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = layers.conv(tangent, weight, None, ctx.options)
        if ctx.needs_input_grad[1]:
            grad_weight = layers.conv_weight_grad(grad_output, tangent, weight, ctx.options)
        return grad_grad_output, grad_weight, None, None


class Linear(torch.autograd.Function):
    """``input @ weight.T + bias``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, scope: Scope) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.scope, ctx.has_bias = scope, bias is not None
        ctx.set_materialize_grads(False)
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = LinearInputGrad.apply(grad_output, weight)
        if not ctx.scope.input_gradient_only:
            if ctx.needs_input_grad[1]:
                grad_weight = _outer(grad_output, input)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad_output.flatten(0, -2).sum(0) if grad_output.dim() > 1 else grad_output
        return grad_input, grad_weight, grad_bias, None


class LinearInputGrad(torch.autograd.Function):
    """``grad_output @ weight``."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(grad_output, weight)
        ctx.set_materialize_grads(False)
        return grad_output @ weight

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if tangent is None:
            return None, None
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = tangent @ weight.t() if ctx.needs_input_grad[0] else None
        return grad_grad_output, _outer(grad_output, tangent) if ctx.needs_input_grad[1] else None


def _outer(grad_output: Tensor, input: Tensor) -> Tensor:
    """Weight gradient: sum over all samples of the outer products."""
    return grad_output.reshape(-1, grad_output.size(-1)).t() @ input.reshape(-1, input.size(-1))
