"""Plain torch: the oracle of tests and benchmarks, and the ``reference`` backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern._native import acc_dtype
from gankern.ops.conv_act.reference import activate


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
) -> Tensor:
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate(z, activation, negative_slope)


def conv_transpose2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
) -> Tensor:
    y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return activate(z, activation, negative_slope)


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
) -> Tensor:
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return activate(z, activation, negative_slope)


# The kernels' own functions, in terms of the statistics; differentiable to any order.


def refuse(*tensors: Tensor) -> str | None:
    return None


def _channels(stat: Tensor, input: Tensor) -> Tensor:
    return stat.view(1, -1, *[1] * (input.dim() - 2))


def _reduced(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(var + eps) and biased variance of each channel."""
    wide = input.double() if input.dtype == torch.float64 else input.float()
    var, mean = torch.var_mean(wide, _reduced(input), correction=0)
    return mean, (var + eps).rsqrt(), var


def normalize(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    z = (input - _channels(mean, input)) * _channels(scale, input)
    return z if bias is None else z + _channels(bias, input)


def forward_train(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = input.double() if input.dtype == torch.float64 else input.float()
    mean, invstd, var = statistics(wide, eps)
    output = activate(normalize(wide, weight, bias, mean, invstd), activation, negative_slope)
    return output.to(input.dtype), mean, invstd, var


def statistics_of_sums(input: Tensor, sums: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`statistics`, of the sums of an input's values and of their squares: (parts, 2, C) in float64."""
    count = input.numel() // input.size(1)
    mean, square = sums.sum(0) / count
    var = (square - mean * mean).clamp(min=0)
    acc = acc_dtype(input.dtype)
    return mean.to(acc), (var + eps).rsqrt().to(acc), var.to(acc)


def forward_train_from_sums(
    input: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in passes.py."""
    mean, invstd, var = statistics_of_sums(input, sums, eps)
    return forward_eval(input, weight, bias, mean, invstd, activation, negative_slope), mean, invstd, var


def forward_eval(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    wide = input.double() if input.dtype == torch.float64 else input.float()
    return activate(normalize(wide, weight, bias, mean, invstd), activation, negative_slope).to(input.dtype)


def activation_grad(grad: Tensor, z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Gradient of an activation's input z. Of a NaN, ReLU lets it through, as in torch."""
    if activation == "relu":
        return torch.where(z <= 0, 0, grad)
    if activation == "leaky_relu":
        return torch.where(z > 0, grad, grad * negative_slope)
    return grad * (1 - torch.tanh(z).square()) if activation == "tanh" else grad


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias (Ioffe and Szegedy 2015, section 3, behind the activation's derivative)."""
    wide, grad = input.to(mean.dtype), grad_output.to(mean.dtype)
    grad = activation_grad(grad, normalize(wide, weight, bias, mean, invstd), activation, negative_slope)
    dims = _reduced(input)
    normalized = (wide - _channels(mean, input)) * _channels(invstd, input)
    grad_bias = grad.sum(dims)
    grad_weight = (grad * normalized).sum(dims)
    if training:
        count = input.numel() // input.size(1)
        grad = grad - _channels(grad_bias / count, input) - normalized * _channels(grad_weight / count, input)
    scale = invstd if weight is None else invstd * weight
    return (grad * _channels(scale, input)).to(input.dtype), grad_weight, grad_bias


@torch.no_grad()
def update(running: Tensor, batch: Tensor, momentum: float) -> None:
    """Let a batch's statistic into a running one.

    As in stock, autograd does not see it: a graph of a call in evaluation mode stays valid.
    """
    if not torch.compiler.is_compiling():
        running = running.data
    if running.dtype == batch.dtype:
        running.mul_(1 - momentum).add_(batch, alpha=momentum)
    else:
        wide = torch.promote_types(running.dtype, batch.dtype)
        running.copy_(running.to(wide) * (1 - momentum) + batch.to(wide) * momentum)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbiased: float
) -> None:
    """Let a batch's statistics into the running ones; `unbiased` makes its variance an estimate of the population's."""
    if running_mean.dtype == running_var.dtype == mean.dtype and not torch.compiler.is_compiling():
        # As in update, in fewer calls.
        running_mean.data.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.data.mul_(1 - momentum).add_(var, alpha=momentum * unbiased)
        return
    update(running_mean, mean, momentum)
    update(running_var, var * unbiased, momentum)
