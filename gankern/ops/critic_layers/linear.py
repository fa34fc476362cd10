"""Convolutions and linear layers: linear in the input, so that the second derivative needs no third pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gankern import _phases, backends
from gankern.ops.conv_act.reference import ConvOptions
from gankern.ops.critic_layers import reference
from gankern.ops.critic_layers.scope import Scope

WEIGHT_GRADIENT = "penalty/weight gradient"


def _layers(*tensors: Tensor) -> Any:
    return backends.select("critic_layers", *tensors)


class Act(NamedTuple):
    """ReLU or LeakyReLU, by its slope."""

    negative_slope: float

    @property
    def name(self) -> str:
        return "leaky_relu" if self.negative_slope else "relu"


class Conv(torch.autograd.Function):
    """Convolution of any dimension, transposed or not; ``first`` if nobody wants its input's gradient but the inner.

    Of an activation's `activated` output, where it is given: the input stands for that of the activation, and gets its
    gradient. An activation `after` is applied to the output, of which its own derivative knows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions,
        scope: Scope,
        first: bool,
        activated: tuple[Tensor, Act] | None,
        after: Act | None,
    ) -> Tensor:
        values, ctx.before = (input, None) if activated is None else activated
        ctx.save_for_backward(values, weight)
        ctx.options, ctx.scope, ctx.has_bias, ctx.first = options, scope, bias is not None, first
        ctx.set_materialize_grads(False)
        layers = _layers(values, weight)
        finish = () if after is None else (after.name, after.negative_slope)
        if scope.as_stock:
            # In channels_last stock has other bits than kernels that turn images.
            layers = reference if layers.TURNS and not scope.turns else layers
            return layers.conv_as_stock(values, weight, bias, options, *finish)
        return layers.conv(values, weight, bias, options, *finish)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None, None, None)
        if grad_output is None:
            return None, None, None, *nothing
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and (ctx.scope.input_gradient_only or not ctx.first):
            grad_input = ConvInputGrad.apply(grad_output, weight, input.detach(), ctx.options, ctx.before)
        if ctx.scope.wants_parameters():
            if ctx.needs_input_grad[1]:
                with _phases.phase(WEIGHT_GRADIENT):
                    grad_weight = _layers(input, weight).conv_weight_grad(grad_output, input, weight, ctx.options)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                grad_bias = grad_output.sum((0, *range(2, grad_output.dim())))
        return grad_input, grad_weight, grad_bias, *nothing


class ConvInputGrad(torch.autograd.Function):
    """Gradient of a convolution's input: linear in the gradient of the output and in the weight.

    Multiplied by the derivative of the activation `before`, of which the input is the output.
    """

    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, weight: Tensor, input: Tensor, options: ConvOptions, before: Act | None
    ) -> Tensor:
        layers = _layers(grad_output, weight)
        turned = layers.channels_last(grad_output)
        # Saved, not attributes: autograd lets go of them as soon as the backward has run.
        saved = (grad_output, weight, turned)
        ctx.options, ctx.before = options, before
        ctx.set_materialize_grads(False)
        if before is None:
            # Of the input only its shape is used.
            ctx.save_for_backward(*saved)
            return layers.conv_input_grad(turned, weight, input, options)
        input = layers.channels_last(input)
        ctx.save_for_backward(*saved, input)
        return layers.conv_input_grad(turned, weight, input, options, before.name, before.negative_slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangent is None:
            return None, None, None, None, None
        grad_output, weight, turned, *activated = ctx.saved_tensors
        layers = _layers(tangent, weight)
        grad_output, tangent = turned, layers.channels_last(tangent)
        if activated:
            output = layers.like_layout(activated[0], tangent)
            tangent = layers.leaky_relu_backward(tangent, output, ctx.before.negative_slope)
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[1]:
            with _phases.phase(WEIGHT_GRADIENT):
                grad_weight = layers.conv_weight_grad(grad_output, tangent, weight, ctx.options)
        # What was saved makes room for the largest tensor of the pass.
        del grad_output, turned, activated
        ctx.maybe_clear_saved_tensors()
        if ctx.needs_input_grad[0]:
            grad_grad_output = layers.conv(tangent, weight, None, ctx.options)
        return grad_grad_output, grad_weight, None, None, None


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
        if ctx.scope.wants_parameters():
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
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if tangent is None:
            return None, None
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = tangent @ weight.t() if ctx.needs_input_grad[0] else None
        return grad_grad_output, _outer(grad_output, tangent) if ctx.needs_input_grad[1] else None


def _outer(grad_output: Tensor, input: Tensor) -> Tensor:
    """Weight gradient: sum over all samples of the outer products."""
    with _phases.phase(WEIGHT_GRADIENT):
        return grad_output.reshape(-1, grad_output.size(-1)).t() @ input.reshape(-1, input.size(-1))
