"""Plain torch: the ``reference`` backend of the critic layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern._layout import like_layout
from gankern._native import acc_dtype
from gankern.ops.conv_act.reference import (
    activate_backward,
    channels_last,
    conv,
    conv_as_stock,
    conv_input_grad,
    conv_weight_grad,
)

__all__ = [
    "TURNS",
    "add",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "channels_last",
    "conv",
    "conv_as_stock",
    "conv_input_grad",
    "conv_weight_grad",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_forward",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "layer_norm_forward",
    "leaky_relu",
    "leaky_relu_backward",
    "like_layout",
    "refuse",
    "room",
]

#: Whether the layers have images turned into channels_last that stock keeps contiguous.
TURNS = False


def refuse(*tensors: Tensor) -> str | None:
    return None


def add(first: Tensor, second: Tensor) -> Tensor:
    return first + second


def leaky_relu(input: Tensor, negative_slope: float) -> Tensor:
    return F.relu(input) if negative_slope == 0 else F.leaky_relu(input, negative_slope)


def leaky_relu_backward(grad_output: Tensor, output: Tensor, negative_slope: float) -> Tensor:
    """Gradient of the input, by the signs of the output."""
    return activate_backward(grad_output, output, "leaky_relu" if negative_slope else "relu", negative_slope)


def layer_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (M, D) normalised; the mean and 1 / sqrt(var + eps) of each, in float64."""
    var, mean = torch.var_mean(input.double(), 1, correction=0)
    return F.layer_norm(input, input.shape[1:], weight, bias, eps), mean, (var + eps).rsqrt()


def _normalize(input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rstd = rstd.to(input.dtype).unsqueeze(1)
    return (input - mean.to(input.dtype).unsqueeze(1)) * rstd, rstd


def _project(u: Tensor, normalized: Tensor, dims: tuple[int, ...] = (1,)) -> Tensor:
    return u - u.mean(dims, keepdim=True) - normalized * (u * normalized).mean(dims, keepdim=True)


def layer_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, want_params: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of input and, if wanted, of weight and bias."""
    normalized, scale = _normalize(input, weight, mean, rstd)
    grad_input = scale * _project(grad_output if weight is None else grad_output * weight, normalized)
    if not want_params:
        return grad_input, None, None
    return grad_input, (grad_output * normalized).sum(0), grad_output.sum(0)


def layer_norm_double_backward(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives of ``grad_input`` along a cotangent, to grad_output, input and weight: see csrc's layer_norm.h."""
    normalized, scale = _normalize(input, weight, mean, rstd)
    weighted = grad_output if weight is None else grad_output * weight
    pv, pa = _project(tangent, normalized), _project(weighted, normalized)
    p = (tangent * normalized).mean(1, keepdim=True)
    q = (weighted * normalized).mean(1, keepdim=True)
    curvature = (pv * weighted).mean(1, keepdim=True)
    grad_input = -scale.square() * (curvature * normalized + q * pv + p * pa)
    grad_grad_output = scale * pv if weight is None else scale * pv * weight
    return grad_grad_output, grad_input, (grad_output * scale * pv).sum(0) if want_weight else None


def _rows(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(tensor.size(0) * groups, -1)


def group_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of the channels of (N, C, L) normalised; the mean and 1 / sqrt(var + eps) of each (N, groups), float64."""
    var, mean = torch.var_mean(input.double().reshape(input.size(0), groups, -1), 2, correction=0)
    return torch.group_norm(input, groups, weight, bias, eps), mean, (var + eps).rsqrt()


def group_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, want_params: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of input and, if wanted, of weight and bias."""
    rows, mean, rstd = _rows(input, mean.size(1)), mean.flatten(), rstd.flatten()
    weighted = grad_output if weight is None else grad_output * weight.unsqueeze(1)
    grad_input = layer_norm_backward(weighted.reshape(rows.shape), rows, None, mean, rstd, False)[0].reshape(
        input.shape
    )
    if not want_params:
        return grad_input, None, None
    normalized = _normalize(rows, None, mean, rstd)[0].reshape(input.shape)
    return grad_input, (grad_output * normalized).sum((0, 2)), grad_output.sum((0, 2))


def group_norm_double_backward(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives of ``grad_input`` along a cotangent, to grad_output, input and weight."""
    rows, mean, rstd = _rows(input, mean.size(1)), mean.flatten(), rstd.flatten()
    weighted = grad_output if weight is None else grad_output * weight.unsqueeze(1)
    grad_weighted, grad_input, _ = layer_norm_double_backward(
        tangent.reshape(rows.shape), weighted.reshape(rows.shape), rows, None, mean, rstd, False
    )
    grad_weighted = grad_weighted.reshape(input.shape)
    return (
        grad_weighted if weight is None else grad_weighted * weight.unsqueeze(1),
        grad_input.reshape(input.shape),
        (grad_output * grad_weighted).sum((0, 2)) if want_weight else None,
    )


def batch_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channels of (N, C, ...) normalised; mean, 1 / sqrt(var + eps) and unbiased variance of each, in float64."""
    running = torch.zeros(2, input.size(1), dtype=acc_dtype(input.dtype), device=input.device)
    output, mean, rstd = torch.native_batch_norm(input, weight, bias, running[0], running[1], True, 1.0, eps)
    return output, mean.double(), rstd.double(), running[1].double()


def batch_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, want_params: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of input and, if wanted, of weight and bias."""
    mean, rstd = mean.to(acc_dtype(input.dtype)), rstd.to(acc_dtype(input.dtype))
    mask = [True, want_params, want_params]
    grads: tuple[Tensor, Tensor | None, Tensor | None] = torch.ops.aten.native_batch_norm_backward.default(
        grad_output, input, weight, None, None, mean, rstd, True, 0.0, mask
    )
    return grads if want_params else (grads[0], None, None)


def batch_norm_double_backward(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Derivatives of ``grad_input`` along a cotangent, to grad_output, input and weight."""
    dims = (0, *range(2, input.dim()))

    def spread(numbers: Tensor) -> Tensor:
        return numbers.to(input.dtype).view(-1, *[1] * (input.dim() - 2))

    scale = spread(rstd)
    normalized = (input - spread(mean)) * scale
    pv, pg = _project(tangent, normalized, dims), _project(grad_output, normalized, dims)
    p, q = ((u * normalized).mean(dims, keepdim=True) for u in (tangent, grad_output))
    curvature = (pv * grad_output).mean(dims, keepdim=True)
    grad_weight = (grad_output * pv).sum(dims) * rstd.to(input.dtype) if want_weight else None
    weighted = scale if weight is None else scale * spread(weight)
    grad_input = -weighted * scale * (curvature * normalized + q * pv + p * pg)
    return weighted * pv, grad_input, grad_weight


def room(tensor: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """Memory for images like a tensor's, of another shape."""
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)


def avg_pool2d(input: Tensor, kernel: list[int]) -> Tensor:
    """Means over windows that tile the images."""
    return torch.ops.aten.avg_pool2d.default(input, kernel, kernel)


def avg_pool2d_backward(grad_output: Tensor, shape: torch.Size, kernel: list[int]) -> Tensor:
    """The windows' gradients, spread over images of a shape."""
    images = grad_output.new_empty(shape)  # of which only the shape counts
    options = kernel, kernel, [0] * len(kernel), False, True, None
    return torch.ops.aten.avg_pool2d_backward.default(grad_output, images, *options)
