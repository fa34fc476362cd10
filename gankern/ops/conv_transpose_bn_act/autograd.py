"""Operators and derivatives of batch norm + activation.

The convolutions in front are torch's own; what is fused is all that follows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gankern import _autograd, _cuda, _library, _native, _triton, backends, dispatch
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
    kernels = backends.select("batch_norm_act", input)
    run = getattr(kernels, "forward_train_from_sums", None)
    # What has no use for the sums adds up again.
    return kernels.forward_train(input, *args) if run is None else run(input, sums, *args)


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


_train_op = _library.define_direct(
    "batch_norm_act_train(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation, float negative_slope)"
    " -> (Tensor output, Tensor mean, Tensor invstd, Tensor var)",
    _train,
    _train_fake,
)
_train_from_sums_op = _library.define_direct(
    "batch_norm_act_train_from_sums(Tensor input, Tensor sums, Tensor? weight, Tensor? bias, float eps, str activation,"
    " float negative_slope) -> (Tensor output, Tensor mean, Tensor invstd, Tensor var)",
    _train_from_sums,
    _train_from_sums_fake,
)
_eval_op = _library.define_direct(
    "batch_norm_act_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, str activation,"
    " float negative_slope) -> Tensor",
    _eval,
    _eval_fake,
)
_backward_op = _library.define_direct(
    "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor invstd, bool training, str activation, float negative_slope)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _backward_fake,
)


def by_output(
    grad_output: Tensor, output: Sequence[Tensor], activation: str, negative_slope: float
) -> tuple[Tensor, str, float]:
    """The gradient before the activation where that is told by the output, and the activation that is left.

    First derivatives are by the kernel of ReLU, and where the output is rounded to half its digits.
    """
    if output and (_is_differentiated() or (activation == "tanh" and grad_output.element_size() >= 4)):
        return _autograd.BY_OUTPUT[activation](grad_output, output[0]), "none", 0.0
    return grad_output, activation, negative_slope


# What is saved are the tensors that the caller has, of any layout and type: changed in place, they raise as in stock.
# The bias, which stock does not need, is a copy.


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
        arguments = _acc(weight, input), bias, eps, activation, negative_slope
        if sums is None:
            output, mean, invstd, var = _train_op(dense(input), *arguments)
        else:
            output, mean, invstd, var = _train_from_sums_op(dense(input), sums, *arguments)
        ctx.save_for_backward(
            input, weight, bias, mean, invstd, *([output] if activation in _autograd.BY_OUTPUT else [])
        )
        ctx.mark_non_differentiable(mean, var)
        ctx.args = eps, activation, negative_slope
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, invstd, *output = ctx.saved_tensors
        eps, *act = ctx.args
        grad_output, activation, negative_slope = by_output(grad_output, output, *act)
        input, weight = dense(input), _acc(weight, input)
        if _is_differentiated():
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
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        mean, invstd = _constants(input, running_mean, running_var, eps)
        output = _eval_op(dense(input), _acc(weight, input), bias, mean, invstd, activation, negative_slope)
        kept = [output] if activation in _autograd.BY_OUTPUT else []
        ctx.save_for_backward(input, weight, bias, running_mean, running_var, mean, invstd, *kept)
        ctx.args = eps, activation, negative_slope
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, running_mean, running_var, mean, invstd, *output = ctx.saved_tensors
        eps, *act = ctx.args
        grad_output, *act = by_output(grad_output, output, *act)
        input, weight = dense(input), _acc(weight, input)
        run = reference.backward if _is_differentiated() else _backward_op
        if not torch.compiler.is_compiling():
            now = _constants(input, running_mean, running_var, eps)
            if not all(map(torch.equal, now, (mean, invstd))):
                # A call in training mode has come between. Stock's activation knows nothing of it, its batch norm does.
                before = reference.normalize(input.to(mean.dtype), weight, bias, mean, invstd)
                grad_output = reference.activation_grad(grad_output.to(mean.dtype), before, *act).to(grad_output.dtype)
                (mean, invstd), act = now, ["none", 0.0]
        grads = run(grad_output, input, weight, bias, mean, invstd, False, *act)
        return (*_wanted(grads, weight, bias), None, None, None, None, None)


def _is_differentiated() -> bool:
    """Whether a gradient is to be made of torch's functions: it is differentiated or transformed itself."""
    return torch.is_grad_enabled() or _autograd.is_transformed()


def _acc(vector: Tensor | None, input: Tensor, copy: bool = False) -> Tensor | None:
    """Numbers of the channels as kernels read them."""
    return None if vector is None else vector.to(_native.acc_dtype(input.dtype), copy=copy).contiguous()


def _constants(input: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) as they are now."""
    acc = _native.acc_dtype(input.dtype)
    mean = running_mean.to(acc, copy=True, memory_format=torch.contiguous_format)
    return mean, (running_var.to(acc) + eps).rsqrt().contiguous()


def _update_running(
    input: Tensor, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> None:
    count = input.numel() // input.size(1)
    run = reference.update_running
    if not torch.compiler.is_compiling() and _cuda.refuse(running_mean) is None and not _library.is_watched():
        run = getattr(backends.select("batch_norm_act", input), "update_running", run)
    run(running_mean, running_var, mean, var, momentum, count / max(count - 1, 1))


def _is_odd(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    updates: bool,
) -> bool:
    """Whether stock runs a call: for a transform, or since what it makes of such statistics is its own matter."""
    if not _autograd.is_plain(input, running_mean, running_var, weight, bias):
        return True
    if input.numel() == 0 or _autograd.is_recorded(running_mean, running_var):
        return True
    if torch.compiler.is_compiling() or not updates or running_mean is None or running_var is None:
        return False
    # One tensor in several places, which is written and read in stock's order.
    places = [t.data_ptr() for t in (running_mean, running_var, weight, bias) if t is not None]
    return len(set(places)) < len(places)


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
    uses_batch = training or running_mean is None or running_var is None
    small = sums is None and dispatch.is_small(input)
    if small or _is_odd(input, running_mean, running_var, weight, bias, uses_batch):
        statistics: dict[str, Any] = {"training": uses_batch, "momentum": momentum, "eps": eps}
        act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
        return reference.batch_norm_act(input, running_mean, running_var, weight, bias, **statistics, **act)
    bias = _acc(bias, input, copy=_autograd.is_recorded(input, weight, bias))
    if uses_batch:
        output, mean, var = _Train.apply(input, weight, bias, eps, activation, negative_slope, sums)
        if running_mean is not None and running_var is not None:
            _update_running(input, running_mean, running_var, mean, var, momentum)
        return output
    return _Eval.apply(input, weight, bias, running_mean, running_var, eps, activation, negative_slope)
