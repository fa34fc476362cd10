"""Convolutions and linear layers: linear in the input, so that the second derivative needs no third pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import backends
from gankern._layout import memory_format
from gankern.ops.critic_layers.scope import Scope


class ConvOptions(NamedTuple):
    """Arguments of ``aten.convolution`` behind the weight and bias."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def _conv_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    bias_size = [grad_output.size(1)]
    return torch.ops.aten.convolution_backward.default(grad_output, input, weight, bias_size, *options, mask)


def channels_last(tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors in channels_last, in which all passes of a 2-d convolution on the CPU are nearer the peak."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dim() != 4 or first.dtype not in (torch.float32, torch.bfloat16):
        return tensors
    # Not contiguous(), which leaves images of one pixel as they are: convolutions go by the strides.
    return tuple(
        t if memory_format(t) == torch.channels_last else t.clone(memory_format=torch.channels_last) for t in tensors
    )


# Up to so many channels the vectors of a matrix product run along the taps, where torch's would be mostly empty.
_FEW_CHANNELS = 4


def _input_grad(grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    """Gradient of the input, of which only the shape and the layout are used."""
    if (
        input.dim() == 4
        and input.size(1) <= _FEW_CHANNELS
        and input.dtype == torch.float32
        and options.groups == 1
        and not options.transposed
        and weight.is_contiguous(memory_format=torch.channels_last)
    ):
        with torch.profiler.record_function("gankern::conv_input_grad"):
            adapter = backends.select("critic_layers", grad_output, input, weight)
            return adapter.conv_input_grad(grad_output, input, weight, *options[:3])
    return _conv_backward(grad_output, input, weight, options, [True, False, False])[0]


def ints(value: Any, dims: int) -> list[int]:
    """An option of a convolution or a pooling, one number a dimension."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


class Conv(torch.autograd.Function):
    """Convolution of any dimension, transposed or not; ``first`` if its input is ``scope.points``."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, scope: Scope, first: bool
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.options, ctx.scope, ctx.has_bias, ctx.first = options, scope, bias is not None, first
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution.default(input, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None, None
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        mask = [False, ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        wanted = ctx.needs_input_grad[0] and (ctx.scope.input_gradient_only or not ctx.first)
        if wanted and (torch.is_grad_enabled() or ctx.scope.input_gradient_only):
            grad_input = ConvInputGrad.apply(grad_output, weight, input.detach(), ctx.options)
        elif wanted:
            mask[0] = True
        if any(mask) and not ctx.scope.input_gradient_only:
            grads = _conv_backward(grad_output, input, weight, ctx.options, mask)
            grad_input = grads[0] if mask[0] else grad_input
            grad_weight = grads[1] if mask[1] else None
            grad_bias = grads[2] if mask[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None


class ConvInputGrad(torch.autograd.Function):
    """Gradient of a convolution's input: linear in the gradient of the output and in the weight."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, weight: Tensor, input: Tensor, options: ConvOptions) -> Tensor:
        # Of the input only its shape is used.
        ctx.save_for_backward(grad_output, weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.turned = channels_last((grad_output, weight))
        grad_output, weight = ctx.turned
        if memory_format(weight) == torch.channels_last:
            input = torch.empty_like(input, memory_format=torch.channels_last)
        return _input_grad(grad_output, input, weight, options)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangent is None:
            return None, None, None, None
        # Asked for in any case: that is where torch notices values that were overwritten since.
        saved = ctx.saved_tensors
        grad_output, weight = saved if torch.is_grad_enabled() else ctx.turned
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = torch.ops.aten.convolution.default(tangent, weight, None, *ctx.options)
        if ctx.needs_input_grad[1]:
            grad_weight = _conv_backward(grad_output, tangent, weight, ctx.options, [False, True, False])[1]
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
