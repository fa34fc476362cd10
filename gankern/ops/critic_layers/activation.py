"""ReLU and LeakyReLU: piecewise linear, so that no second derivative reaches the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import backends
from gankern.ops.critic_layers.fork import Sum


def _layers(*tensors: Tensor) -> Any:
    return backends.select("critic_layers", *tensors)


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor of that shape for autograd to follow: its elements share one place, which nobody reads."""
    one = torch.empty(1, dtype=tensor.dtype, device=tensor.device)
    # Not a view, which autograd would follow.
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        one.untyped_storage(), 0, tensor.shape, [0] * tensor.dim()
    )


class LeakyRelu(torch.autograd.Function):
    """``input`` where positive, ``negative_slope * input`` elsewhere; ReLU with slope 0. In place if asked.

    The second output stands for the input: its gradient is added to the input's. With `applied` the input's values are
    the output's already.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, negative_slope: float, inplace: bool, applied: bool = False
    ) -> tuple[Tensor, Tensor]:
        if inplace:
            ctx.mark_dirty(input)
            output = input
            if not applied:
                output = F.relu_(input) if negative_slope == 0 else F.leaky_relu_(input, negative_slope)
        else:
            output = _layers(input).leaky_relu(input, negative_slope)
        # With a slope of zero or more the output is positive just where the input is.
        ctx.save_for_backward(output)
        ctx.negative_slope = negative_slope
        ctx.set_materialize_grads(False)
        return output, _without_memory(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_edge: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return grad_edge, None, None, None
        (output,) = ctx.saved_tensors
        grad_input = LeakyReluGrad.apply(grad_output, output.detach(), ctx.negative_slope)
        if grad_edge is not None:
            grad_input = Sum.apply(grad_input, grad_edge)
        return grad_input, None, None, None


class LeakyReluGrad(torch.autograd.Function):
    """Multiplication by the slope at a point: linear, its own derivative."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, output: Tensor, negative_slope: float) -> Tensor:
        # Once here, for both passes, instead of a walk over two layouts in each.
        layers = _layers(grad_output, output)
        output = layers.like_layout(output, grad_output)
        ctx.save_for_backward(output)
        ctx.negative_slope = negative_slope
        ctx.set_materialize_grads(False)
        return layers.leaky_relu_backward(grad_output, output, negative_slope)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, None, None]:
        if tangent is None:
            return None, None, None
        return LeakyReluGrad.apply(tangent, ctx.saved_tensors[0], ctx.negative_slope), None, None
