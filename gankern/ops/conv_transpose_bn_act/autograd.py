"""Operators and derivatives of batch norm + activation.

The convolutions in front are torch's own; what is fused is all that follows them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import _cuda, _library, _native, _triton, backends
from gankern._layout import dense, memory_format
from gankern.ops.conv_transpose_bn_act import cpu, reference

OPS = ("batch_norm_act", "conv_transpose2d_bn_act", "conv2d_bn_act")
for _op in OPS:
    backends.register(
        _op,
        cpu=cpu,
        reference=reference,
        triton=_triton.adapter("gankern.ops.conv_transpose_bn_act.triton"),
        cuda=_cuda.adapter("gankern.ops.conv_transpose_bn_act.cuda"),
    )


def _train(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.select("batch_norm_act", input).forward_train(input, *args)


def _train_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stat = input.new_empty(input.size(1), dtype=_native.acc_dtype(input.dtype))
    output = torch.empty_like(input, memory_format=memory_format(input))
    return output, stat, torch.empty_like(stat), torch.empty_like(stat)


def _train_from_sums(input: Tensor, sums: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.select("batch_norm_act", input).forward_train_from_sums(input, sums, *args)


def _train_from_sums_fake(input: Tensor, sums: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _train_fake(input, *args)


def _eval(input: Tensor, *args: Any) -> Tensor:
    return backends.select("batch_norm_act", input).forward_eval(input, *args)


def _eval_fake(input: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def _backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backends.select("batch_norm_act", grad_output, input).backward(grad_output, input, *args)


def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input = torch.empty_like(input, memory_format=memory_format(input))
    return grad_input, torch.empty_like(mean), torch.empty_like(mean)


_train_op = _library.define(
    "batch_norm_act_train(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation, float negative_slope)"
    " -> (Tensor output, Tensor mean, Tensor invstd, Tensor var)",
    _train,
    _train_fake,
)
_train_from_sums_op = _library.define(
    "batch_norm_act_train_from_sums(Tensor input, Tensor sums, Tensor? weight, Tensor? bias, float eps, str activation,"
    " float negative_slope) -> (Tensor output, Tensor mean, Tensor invstd, Tensor var)",
    _train_from_sums,
    _train_from_sums_fake,
)
_eval_op = _library.define(
    "batch_norm_act_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, str activation,"
    " float negative_slope) -> Tensor",
    _eval,
    _eval_fake,
)
_backward_op = _library.define(
    "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor invstd, bool training, str activation, float negative_slope)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _backward_fake,
)


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str,
        negative_slope: float,
        sums: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = weight, bias, eps, activation, negative_slope
        if sums is None:
            output, mean, invstd, var = _train_op(input, *arguments)
        else:
            output, mean, invstd, var = _train_from_sums_op(input, sums, *arguments)
        ctx.save_for_backward(input, weight, bias, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        ctx.args = eps, activation, negative_slope
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, invstd = ctx.saved_tensors
        eps, activation, negative_slope = ctx.args
        if torch.is_grad_enabled():
            # Someone differentiates this gradient: plain torch, with the statistics as functions of the input.
            mean, invstd, _var = reference.statistics(input.to(mean.dtype), eps)
            grads = reference.backward(grad_output, input, weight, bias, mean, invstd, True, activation, negative_slope)
        else:
            grads = _backward_op(grad_output, input, weight, bias, mean, invstd, True, activation, negative_slope)
        return (*_wanted(grads, weight, bias), None, None, None, None)


class _Eval(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, bias, mean, invstd)
        ctx.args = activation, negative_slope
        return _eval_op(input, weight, bias, mean, invstd, activation, negative_slope)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, invstd = ctx.saved_tensors
        run = reference.backward if torch.is_grad_enabled() else _backward_op
        grads = run(grad_output, input, weight, bias, mean, invstd, False, *ctx.args)
        return (*_wanted(grads, weight, bias), None, None, None, None)


def _wanted(
    grads: tuple[Tensor, Tensor, Tensor], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_input, grad_weight, grad_bias = grads
    return grad_input, None if weight is None else grad_weight, None if bias is None else grad_bias


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    sums: Tensor | None = None,
) -> Tensor:
    """`sums` are what the batch's statistics are made of, where the input's maker has left them."""
    input = dense(input)
    acc = _native.acc_dtype(input.dtype)
    weight = None if weight is None else weight.to(acc).contiguous()
    bias = None if bias is None else bias.to(acc).contiguous()
    if training or running_mean is None or running_var is None:
        output, mean, var = _Train.apply(input, weight, bias, eps, activation, negative_slope, sums)
        if running_mean is not None and running_var is not None:
            count = input.numel() // input.size(1)
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
        return output
    mean = running_mean.to(acc).contiguous()
    invstd = (running_var.to(acc) + eps).rsqrt().contiguous()
    return _Eval.apply(input, weight, bias, mean, invstd, activation, negative_slope)
