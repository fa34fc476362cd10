"""Operators and derivatives of convolution + activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gankern import _library, backends
from gankern._layout import memory_format
from gankern.ops.conv_act import cpu, reference
from gankern.ops.conv_act.reference import ConvOptions

backends.register("conv2d_act", cpu=cpu, reference=reference)


def _options(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> ConvOptions:
    return ConvOptions(tuple(stride), tuple(padding), tuple(dilation), False, (0, 0), 1)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    negative_slope: float,
) -> Tensor:
    # There are no bits of stock's to keep in channels_last, where it sums up in an order of its own.
    conv = cpu.conv_as_stock if memory_format(weight) == torch.contiguous_format else cpu.conv
    output = conv(input, weight, bias, _options(stride, padding, dilation), activation, negative_slope)
    return cpu.channels_last(output)


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *args: Any,
) -> Tensor:
    shape = reference.conv_shape(input.shape, weight.shape, _options(stride, padding, dilation))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def _backward(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    negative_slope: float,
    want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(stride, padding, dilation)
    grad = cpu.activate_backward(cpu.channels_last(grad_output), output, activation, negative_slope)
    nothing = input.new_empty(0)
    return (
        cpu.channels_last(cpu.conv_input_grad(grad, weight, input, options)) if want[0] else nothing,
        cpu.conv_weight_grad(grad, input, weight, options) if want[1] else nothing.clone(),
        grad.sum((0, 2, 3)) if want[2] else nothing.clone(),
    )


def _backward_fake(
    grad_output: Tensor, output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    want = args[-1]
    nothing = input.new_empty(0)
    return (
        torch.empty_like(input, memory_format=torch.channels_last) if want[0] else nothing,
        torch.empty_like(weight) if want[1] else nothing.clone(),
        weight.new_empty(weight.size(0)) if want[2] else nothing.clone(),
    )


_forward_op = _library.define(
    "conv2d_act(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
    " str activation, float negative_slope) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = _library.define(
    "conv2d_act_backward(Tensor grad_output, Tensor output, Tensor input, Tensor weight, int[] stride, int[] padding,"
    " int[] dilation, str activation, float negative_slope, bool[] want)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _backward_fake,
)


class _ConvAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions,
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        output = _forward_op(input, weight, bias, *options[:3], activation, negative_slope)
        ctx.save_for_backward(input, weight, bias, output)
        ctx.options = (options, activation, negative_slope)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, output = ctx.saved_tensors
        options, activation, negative_slope = ctx.options
        want = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            given = [t for t, w in zip((input, weight, bias), want, strict=True) if w]
            again = reference.conv2d_act(input, weight, bias, options, activation, negative_slope)
            found = iter(torch.autograd.grad(again, given, grad_output, create_graph=True))
            return *(next(found) if w else None for w in want), None, None, None
        arguments = *options[:3], activation, negative_slope, want
        grads = _backward_op(grad_output, output, input, weight, *arguments)
        return *(g if w else None for g, w in zip(grads, want, strict=True)), None, None, None


def _refusal(options: ConvOptions, negative_slope: float) -> str | None:
    if options.groups != 1:
        return f"needs one group; got {options.groups}"
    if negative_slope < 0:
        return f"needs a negative_slope of 0 or more; got {negative_slope}"
    return "needs autocast to be off" if torch.is_autocast_enabled("cpu") else None


def conv2d_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, activation: str, negative_slope: float
) -> Tensor:
    """By the kernels, where they are chosen and take it; else by torch's autograd."""
    # In a compiled graph the operators below would hide the convolution from the compiler.
    if torch.compiler.is_compiling() or backends.select("conv2d_act", input, weight) is not cpu:
        return reference.conv2d_act(input, weight, bias, options, activation, negative_slope)
    reason = _refusal(options, negative_slope)
    if reason is not None or input.numel() == 0:
        if reason is not None and backends.requested() == "cpu":
            raise backends.BackendUnavailable(f"conv2d_act cannot run on the cpu backend: {reason}")
        return reference.conv2d_act(input, weight, bias, options, activation, negative_slope)
    return _ConvAct.apply(input, weight, bias, options, activation, negative_slope)
