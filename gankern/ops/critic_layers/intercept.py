"""Puts the critic layers in the place of stock functions while a critic runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gankern.ops.critic_layers.activation import LeakyRelu
from gankern.ops.critic_layers.layer_norm import LayerNorm
from gankern.ops.critic_layers.linear import Conv, ConvOptions, Linear
from gankern.ops.critic_layers.pooling import AvgPool2d
from gankern.ops.critic_layers.scope import Scope


def _ints(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as autocast would in front of a convolution or matrix product."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def _conv(dims: int) -> Callable[..., Tensor]:
    def conv(
        scope: Scope,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if isinstance(padding, str) or input.dim() != dims + 2:
            return NotImplemented
        zeros = [0] * dims
        options = ConvOptions(_ints(stride, dims), _ints(padding, dims), _ints(dilation, dims), False, zeros, groups)
        return Conv.apply(*_autocast(input, weight, bias), options, scope)

    return conv


def _conv_transpose(dims: int) -> Callable[..., Tensor]:
    def conv_transpose(
        scope: Scope,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if input.dim() != dims + 2:
            return NotImplemented
        pads = _ints(padding, dims), _ints(dilation, dims)
        options = ConvOptions(_ints(stride, dims), *pads, True, _ints(output_padding, dims), groups)
        return Conv.apply(*_autocast(input, weight, bias), options, scope)

    return conv_transpose


def _linear(scope: Scope, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return Linear.apply(*_autocast(input, weight, bias), scope)


def _relu(scope: Scope, input: Tensor, inplace: bool = False) -> Tensor:
    return LeakyRelu.apply(input, 0.0, inplace)


def _relu_(scope: Scope, input: Tensor) -> Tensor:
    return LeakyRelu.apply(input, 0.0, True)


def _leaky_relu(scope: Scope, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return LeakyRelu.apply(input, negative_slope, inplace) if negative_slope >= 0 else NotImplemented


def _leaky_relu_(scope: Scope, input: Tensor, negative_slope: float = 0.01) -> Any:
    return _leaky_relu(scope, input, negative_slope, True)


def _layer_norm(
    scope: Scope,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    dims = len(normalized_shape)
    params = [t for t in (weight, bias) if t is not None]
    if (
        not input.numel()
        or tuple(input.shape[-dims:]) != tuple(normalized_shape)
        or any(t.dtype != input.dtype for t in params)
        or torch.is_autocast_enabled(input.device.type)
    ):
        return NotImplemented
    rows = input.contiguous().view(-1, math.prod(normalized_shape))
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    return LayerNorm.apply(rows, *flat, eps, scope).view(input.shape)


def _avg_pool2d(
    scope: Scope,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if input.dim() != 4:
        return NotImplemented
    kernel = _ints(kernel_size, 2)
    # An empty stride means the kernel's size too.
    stride = kernel if stride is None or stride == () or stride == [] else _ints(stride, 2)
    options = (kernel, stride, _ints(padding, 2), ceil_mode, count_include_pad, divisor_override)
    return AvgPool2d.apply(input, options)


_TAKEN: dict[Any, Callable[..., Any]] = {
    F.conv1d: _conv(1),
    F.conv2d: _conv(2),
    F.conv3d: _conv(3),
    F.conv_transpose1d: _conv_transpose(1),
    F.conv_transpose2d: _conv_transpose(2),
    F.conv_transpose3d: _conv_transpose(3),
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.layer_norm: _layer_norm,
    F.avg_pool2d: _avg_pool2d,
}


class CriticLayers(TorchFunctionMode):
    """Runs the functions that gankern knows by its own layers, and all others as they are.

    Parameters
    ----------
    scope : Scope
        Handed to every layer.

    Attributes
    ----------
    taken, stock : Counter
        Calls by function name: those that gankern's layers ran, and differentiable ones left to stock autograd.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self.taken: Counter[str] = Counter()
        self.stock: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _TAKEN.get(func)
        if replacement is not None:
            result = replacement(self.scope, *args, **kwargs)
            if result is not NotImplemented:
                self.taken[func.__name__] += 1
                return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.grad_fn is not None:
            self.stock[getattr(func, "__name__", str(func))] += 1
        return result
