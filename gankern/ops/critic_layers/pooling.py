"""Average pooling: linear, so that its derivatives need only the input's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import backends
from gankern._layout import memory_format
from gankern.ops.critic_layers.options import ints
from gankern.ops.critic_layers.scope import Scope


class Windows(NamedTuple):
    """Arguments of ``aten.avg_pool2d`` and ``avg_pool3d`` behind the input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None


class Adaptive(NamedTuple):
    """Argument of ``aten._adaptive_avg_pool2d`` and ``3d``."""

    size: tuple[int, ...]


class Images(NamedTuple):
    """All that pooling's backward knows of the input."""

    shape: torch.Size
    memory_format: torch.memory_format


def _tiles(options: Windows | Adaptive, images: Images) -> bool:
    """Whether gankern's kernels do it: for channels_last aten's are as fast as memory."""
    return (
        isinstance(options, Windows)
        and len(images.shape) == 4
        and images.memory_format == torch.contiguous_format
        and options.kernel == options.stride
        # Sums in stock's order wait for each other: over wide windows aten is as fast.
        and options.kernel[1] <= 4
        and not any(options.padding)
        and options.divisor_override is None
        and all(size >= k for size, k in zip(images.shape[2:], options.kernel, strict=True))
        and not (options.ceil_mode and any(s % k for s, k in zip(images.shape[2:], options.kernel, strict=True)))
    )


def _aten(name: str, options: Windows | Adaptive, images: Images, ending: str = "") -> Any:
    prefix = "_adaptive_" if isinstance(options, Adaptive) else ""
    return getattr(torch.ops.aten, f"{prefix}{name}{len(images.shape) - 2}d{ending}").default


def _pool(input: Tensor, options: Windows | Adaptive) -> Tensor:
    images = Images(input.shape, memory_format(input))
    if _tiles(options, images):
        assert isinstance(options, Windows)
        return backends.select("critic_layers", input).avg_pool2d(input, options.kernel)
    return _aten("avg_pool", options, images)(input, *options)


def _pool_backward(grad_output: Tensor, images: Images, options: Windows | Adaptive) -> Tensor:
    if _tiles(options, images):
        assert isinstance(options, Windows)
        return backends.select("critic_layers", grad_output).avg_pool2d_backward(
            grad_output, images.shape, options.kernel
        )
    grad_input = backends.select("critic_layers", grad_output).room(grad_output, *images)
    grad_output = grad_output.contiguous(memory_format=images.memory_format)
    # Of the input, its second argument, aten takes the shape.
    if isinstance(options, Windows) and len(images.shape) == 4:
        backward = torch.ops.aten.avg_pool2d_backward.grad_input
        return backward(grad_output, grad_input, *options, grad_input=grad_input)
    arguments = options if isinstance(options, Windows) else ()
    return _aten("avg_pool", options, images, "_backward")(grad_output, grad_input, *arguments)


class Pool(torch.autograd.Function):
    """Average pooling of (N, C, H, W) or (N, C, D, H, W)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, options: Windows | Adaptive) -> Tensor:
        ctx.images, ctx.options = Images(input.shape, memory_format(input)), options
        ctx.set_materialize_grads(False)
        return _pool(input, options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_output is None:
            return None, None
        return PoolInputGrad.apply(grad_output, ctx.images, ctx.options), None


class PoolInputGrad(torch.autograd.Function):
    """Gradient of a pooling's input: linear in that of the output, and pooling is its derivative."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, images: Images, options: Windows | Adaptive) -> Tensor:
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _pool_backward(grad_output, images, options)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, None, None]:
        return None if tangent is None else Pool.apply(tangent, ctx.options), None, None


def _apply(input: Tensor, options: Windows | Adaptive, dims: int) -> Any:
    # Autocast runs some of these in float32.
    if input.dim() != dims + 2 or not input.numel() or torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    return Pool.apply(input.unsqueeze(2), options).squeeze(2) if dims == 1 else Pool.apply(input, options)


def avg_pool(dims: int) -> Callable[..., Any]:
    """:func:`torch.nn.functional.avg_pool1d`, ``2d`` or ``3d``."""

    def pool(
        scope: Scope,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        kernel, pads = ints(kernel_size, dims), ints(padding, dims)
        steps = kernel if stride is None or stride == () or stride == [] else ints(stride, dims)
        if dims == 1:
            kernel, steps, pads = (1, *kernel), (1, *steps), (0, *pads)
        return _apply(input, Windows(kernel, steps, pads, ceil_mode, count_include_pad, divisor_override), dims)

    return pool


def adaptive_avg_pool(dims: int) -> Callable[..., Any]:
    """:func:`torch.nn.functional.adaptive_avg_pool1d`, ``2d`` or ``3d``."""

    def pool(scope: Scope, input: Tensor, output_size: Any) -> Any:
        if input.dim() != dims + 2:
            return NotImplemented
        given = (output_size,) * dims if output_size is None else ints(output_size, dims)
        sizes = list(input.shape[2:])
        wanted = [size if want is None else want for want, size in zip(given, sizes, strict=True)]
        if any(want < 1 for want in wanted):
            return NotImplemented
        if dims == 1:
            sizes, wanted = [1, *sizes], [1, *wanted]
        if any(size % want for size, want in zip(sizes, wanted, strict=True)):
            return _apply(input, Adaptive(tuple(wanted)), dims)
        kernel = tuple(size // want for size, want in zip(sizes, wanted, strict=True))
        return _apply(input, Windows(kernel, kernel, (0,) * len(kernel), False, True, None), dims)

    return pool
