"""Layer norm: forward, backward and double backward as one kernel each (Ba et al. 2016)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gankern import _cuda, _triton, backends
from gankern._layout import memory_format, not_a_view
from gankern.ops.critic_layers import cpu, reference
from gankern.ops.critic_layers.fork import Fork, large
from gankern.ops.critic_layers.scope import Scope

backends.register(
    "critic_layers",
    cpu=cpu,
    reference=reference,
    triton=_triton.adapter("gankern.ops.critic_layers.triton"),
    cuda=_cuda.adapter("gankern.ops.critic_layers.cuda"),
)


class Rows(NamedTuple):
    """How samples lie in memory that are normalised each for itself: as rows (M, D), channels_last where `turned`."""

    shape: torch.Size
    size: int
    turned: bool

    def of(self, tensor: Tensor) -> Tensor:
        # A reshape leaves rows apart that are: kernels read them one after the other.
        return (tensor.permute(0, 2, 3, 1) if self.turned else tensor).reshape(-1, self.size).contiguous()

    def back(self, rows: Tensor) -> Tensor:
        if not self.turned:
            return rows.view(self.shape)
        n, c, h, w = self.shape
        return rows.view(n, h, w, c).permute(0, 3, 1, 2)

    def fresh(self, rows: Tensor) -> Tensor:
        """Back, for a result that nobody else has."""
        return not_a_view(self.back(rows))


def layer_norm(
    scope: Scope,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """:func:`torch.nn.functional.layer_norm`."""
    dims = len(normalized_shape)
    params = [t for t in (weight, bias) if t is not None]
    if (
        not input.numel()
        or tuple(input.shape[-dims:]) != tuple(normalized_shape)
        or any(t.dtype != input.dtype or tuple(t.shape) != tuple(normalized_shape) for t in params)
        or torch.is_autocast_enabled(input.device.type)
    ):
        return NotImplemented
    # The statistics do not ask for an order: only the weights' few elements move.
    turned = dims == 3 and memory_format(input) == torch.channels_last
    rows = Rows(input.shape, math.prod(normalized_shape), turned)
    order = (1, 2, 0) if turned else range(dims)
    flat = [None if t is None else t.permute(*order).reshape(-1).contiguous() for t in (weight, bias)]
    # Used twice: by the norm, and by its input's gradient.
    input, again = Fork.apply(input) if input.requires_grad and large(input) else (input, input)
    return LayerNorm.apply(input, again, *flat, rows, eps, scope)


class LayerNorm(torch.autograd.Function):
    """Normalised samples, with weight and bias (D,) in the order of the rows or None; `again` is the input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        again: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows,
        eps: float,
        scope: Scope,
    ) -> Tensor:
        adapter = backends.select("critic_layers", input)
        output, mean, rstd = adapter.layer_norm_forward(rows.of(input), weight, bias, eps)
        ctx.save_for_backward(again, weight, mean, rstd)
        ctx.rows, ctx.eps, ctx.scope = rows, eps, scope
        ctx.set_materialize_grads(False)
        return rows.fresh(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None)
        if grad_output is None:
            return None, None, None, None, *nothing
        input, weight, mean, rstd = ctx.saved_tensors
        rows, eps = ctx.rows, ctx.eps
        if not ctx.scope.wants_parameters():
            grad_input = LayerNormInputGrad.apply(grad_output, input, weight, mean, rstd, rows, eps)
            return grad_input, None, None, None, *nothing
        want = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        adapter = backends.select("critic_layers", input)
        grad_input, *grads = adapter.layer_norm_backward(rows.of(grad_output), rows.of(input), weight, mean, rstd, want)
        grads = [g if w else None for g, w in zip(grads, ctx.needs_input_grad[2:], strict=False)]
        return rows.fresh(grad_input), None, *grads, *nothing


class LayerNormInputGrad(torch.autograd.Function):
    """Gradient of a layer norm's input, as a function of the output's gradient, the input and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        rows: Rows,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(grad_output, input, weight, mean, rstd)
        ctx.rows, ctx.eps = rows, eps
        ctx.set_materialize_grads(False)
        adapter = backends.select("critic_layers", input)
        grads = adapter.layer_norm_backward(rows.of(grad_output), rows.of(input), weight, mean, rstd, False)
        return rows.fresh(grads[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None, None)
        if tangent is None:
            return None, None, None, *nothing
        grad_output, input, weight, mean, rstd = ctx.saved_tensors
        rows: Rows = ctx.rows
        adapter = backends.select("critic_layers", input)
        grad_grad_output, grad_input, grad_weight = adapter.layer_norm_double_backward(
            rows.of(tangent),
            rows.of(grad_output),
            rows.of(input),
            weight,
            mean,
            rstd,
            weight is not None and ctx.needs_input_grad[2],
        )
        return rows.fresh(grad_grad_output), rows.fresh(grad_input), grad_weight, *nothing
