"""Average pooling: linear, so that its derivatives need the input's shape and not the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AvgPool2d(torch.autograd.Function):
    """Average pooling with the arguments of ``aten.avg_pool2d``; stock keeps the whole input alive for its backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.options, ctx.layout = options, (input.shape, input.stride())
        ctx.set_materialize_grads(False)
        return torch.ops.aten.avg_pool2d.default(input, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_output is None:
            return None, None
        return AvgPool2dGrad.apply(grad_output, ctx.options, ctx.layout), None


class AvgPool2dGrad(torch.autograd.Function):
    """Gradient of the pooling's input: the transposed map, whose own transpose is the pooling."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, options: tuple[Any, ...], layout: tuple[Any, Any]) -> Tensor:
        ctx.options = options
        ctx.set_materialize_grads(False)
        # Only its shape and layout are read: memory that is never touched.
        like = grad_output.new_empty_strided(*layout)
        return torch.ops.aten.avg_pool2d_backward.default(grad_output, like, *options)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, None, None]:
        return (None if tangent is None else AvgPool2d.apply(tangent, ctx.options)), None, None
