"""Operators and derivatives of L1 distances and minibatch discrimination.

A backward takes the operator itself where nobody differentiates it, which torch.compile traces; else a Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gankern import _autograd, _cuda, _library, _triton, backends
from gankern.ops.minibatch_discrimination import cpu, reference

for _op in ("l1_distance", "minibatch_discrimination"):
    backends.register(
        _op,
        cpu=cpu,
        reference=reference,
        triton=_triton.adapter("gankern.ops.minibatch_discrimination.triton"),
        cuda=_cuda.adapter("gankern.ops.minibatch_discrimination.cuda"),
    )


def _kernel(op: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        return getattr(backends.select(op, *tensors), name)(*args)

    return run


def _like_m(grad_output: Tensor, m: Tensor) -> Tensor:
    return m.new_empty(m.shape)


def _pairs(m: Tensor) -> Tensor:
    n, b, _ = m.shape
    return m.new_empty((n, n, b))


_features_op = _library.define_direct(
    "minibatch_discrimination(Tensor m, bool include_self) -> Tensor",
    _kernel("minibatch_discrimination", "features"),
    lambda m, include_self: m.new_empty(m.shape[:2]),
)
_features_backward_op = _library.define_direct(
    "minibatch_discrimination_backward(Tensor grad_output, Tensor m) -> Tensor",
    _kernel("minibatch_discrimination", "features_backward"),
    _like_m,
)
_features_double_backward_op = _library.define_direct(
    "minibatch_discrimination_double_backward(Tensor cotangent, Tensor grad_output, Tensor m)"
    " -> (Tensor grad_grad_output, Tensor grad_m)",
    _kernel("minibatch_discrimination", "features_double_backward"),
    lambda cotangent, grad_output, m: (m.new_empty(m.shape[:2]), m.new_empty(m.shape)),
)
_distance_op = _library.define_direct("l1_distance(Tensor m) -> Tensor", _kernel("l1_distance", "distance"), _pairs)
_distance_backward_op = _library.define_direct(
    "l1_distance_backward(Tensor grad_output, Tensor m) -> Tensor",
    _kernel("l1_distance", "distance_backward"),
    _like_m,
)
_distance_tangent_op = _library.define_direct(
    "l1_distance_tangent(Tensor tangent, Tensor m) -> Tensor",
    _kernel("l1_distance", "distance_tangent"),
    lambda tangent, m: _pairs(m),
)


def _derivative(
    function: type[torch.autograd.Function], op: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """What makes a gradient: functorch's transforms know neither of the first two."""
    if _autograd.is_transformed():
        return plain
    return function.apply if torch.is_grad_enabled() else op


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, include_self: bool) -> Tensor:
        ctx.save_for_backward(m)
        return _features_op(m, include_self)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        run = _derivative(FeaturesBackward, _features_backward_op, reference.features_backward)
        return run(grad_output, *ctx.saved_tensors), None


class FeaturesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(grad_output, m)
        return _features_backward_op(grad_output, m)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        run = _derivative(_FeaturesDoubleBackward, _features_double_backward_op, reference.features_double_backward)
        return run(cotangent, *ctx.saved_tensors)


class _FeaturesDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, grad_output: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cotangent, grad_output, m)
        return _features_double_backward_op(cotangent, grad_output, m)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Third and higher orders: plain torch.
        again = reference.features_double_backward
        return tuple(_autograd.gradients(again, ctx.saved_tensors, grads, ctx.needs_input_grad))


# The distances' backward is linear in grad_output and their tangent its transpose: each is the other's derivative, to
# any order, and neither changes with m except at ties.


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return _distance_op(m)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        run = _derivative(DistanceBackward, _distance_backward_op, reference.distance_backward)
        return run(grad_output, *ctx.saved_tensors)


class DistanceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return _distance_backward_op(grad_output, m)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        run = _derivative(_DistanceTangent, _distance_tangent_op, reference.distance_tangent)
        return run(tangent, *ctx.saved_tensors), None


class _DistanceTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tangent: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return _distance_tangent_op(tangent, m)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        run = _derivative(DistanceBackward, _distance_backward_op, reference.distance_backward)
        return run(grad_output, *ctx.saved_tensors), None


def minibatch_discrimination(m: Tensor, include_self: bool) -> Tensor:
    if torch.is_grad_enabled() and m.requires_grad:
        return _Features.apply(m, include_self)
    return _features_op(m, include_self)


def l1_distance(m: Tensor) -> Tensor:
    return _Distance.apply(m) if torch.is_grad_enabled() and m.requires_grad else _distance_op(m)
