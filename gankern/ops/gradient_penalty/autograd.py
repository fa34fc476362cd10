"""The penalty as one operator: second order inside, first order outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from gankern import _library, backends
from gankern.ops.critic_layers import CriticLayers, Scope
from gankern.ops.gradient_penalty import cpu, reference

backends.register("gradient_penalty", cpu=cpu, reference=reference)

Critic = Callable[..., Tensor]


@dataclass(frozen=True)
class Registered:
    """A critic that operators know by number, and the parameters whose gradients they return."""

    critic: Callable[[], Critic | None]
    params: Sequence[Tensor] | None

    def parameters(self) -> list[Tensor]:
        critic = self.critic()
        params = critic.parameters() if self.params is None and isinstance(critic, nn.Module) else self.params
        return [p for p in params or () if p.requires_grad]


_registered: dict[int, Registered] = {}
_handles: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_numbers = count(1)


def _register_module(critic: nn.Module) -> int:
    """Number of a module: the same for its life, and not a reference to it."""
    handle = _handles.get(critic)
    if handle is None:
        handle = next(_numbers)
        _registered[handle] = Registered(weakref.ref(critic), None)
        _handles[critic] = handle
        weakref.finalize(critic, _registered.pop, handle, None)
    return handle


# Dynamo runs this while it traces and keeps the number.
_register_module_constant = torch._dynamo.assume_constant_result(_register_module)


def module_handle(critic: nn.Module) -> int:
    return _register_module_constant(critic) if torch.compiler.is_compiling() else _register_module(critic)


@contextmanager
def callable_handle(critic: Critic, params: Sequence[Tensor]) -> Iterator[int]:
    """Number of a callable for the length of one call."""
    handle = next(_numbers)
    _registered[handle] = Registered(lambda: critic, params)
    try:
        yield handle
    finally:
        del _registered[handle]


_AUTOGRAD_KEYS = [
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "ADInplaceOrView", "AutogradOther", "AutogradCPU", "AutogradCUDA")
]


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record inside an operator, below which its dispatch keys are excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _penalty(
    points: Tensor,
    params: Sequence[Tensor],
    handle: int,
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
    want_params: bool,
    want_points: bool,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    registered = _registered[handle]
    critic = registered.critic()
    assert critic is not None
    params = registered.parameters() if want_params else []
    adapter = backends.select("gradient_penalty", points)
    mixed = nullcontext() if autocast is None else torch.autocast(points.device.type, autocast)
    with _recording():
        x = points.detach().requires_grad_()
        scope = Scope(None if want_points else x, _has_norm(critic))
        with CriticLayers(scope), mixed:
            scores = critic(x)
        if not isinstance(scores, Tensor):
            raise TypeError(f"critic must return a Tensor; got {type(scores).__name__}")
        wanted = [*params, x] if want_points else params
        with scope.input_gradient():
            (grad,) = torch.autograd.grad(
                scores, x, torch.ones_like(scores), create_graph=bool(wanted), allow_unused=True
            )
        if grad is None:
            raise ValueError("critic must depend on its input; its output does not")
        loss, cotangent = adapter.tail(grad.detach(), weight, target, one_sided, squared)
        found = (
            torch.autograd.grad(grad, wanted, cotangent, allow_unused=True)
            if wanted and grad.requires_grad
            else [None] * len(wanted)
        )
    # Zeros where the penalty does not depend on a parameter, so that every one takes part (DDP); the layout is the
    # parameter's, as the fake promises.
    grads = [_gradient_like(p, g) for p, g in zip(wanted, found, strict=True)]
    return loss, grads.pop() if want_points else points.new_empty(0), grads


def _has_norm(critic: Critic) -> bool:
    """Whether a norm's kernels round otherwise than stock's, so that the forward pass has not stock's bits anyway."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    return isinstance(critic, nn.Module) and any(isinstance(m, norms) for m in critic.modules())


def _gradient_like(param: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.zeros_like(param)
    if grad.stride() == torch.empty_like(param, device="meta").stride() and grad.dtype == param.dtype:
        return grad
    return torch.empty_like(param).copy_(grad)


def _penalty_fake(points: Tensor, params: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    want_params, want_points = args[5], args[6]
    grads = [torch.empty_like(p) for p in params] if want_params else []
    return points.new_empty(()), torch.empty_like(points) if want_points else points.new_empty(0), grads


_penalty_op = _library.define(
    "gradient_penalty(Tensor points, Tensor[] params, int critic, float weight, float target, bool one_sided,"
    " bool squared, bool want_params, bool want_points, ScalarType? autocast)"
    " -> (Tensor loss, Tensor grad_points, Tensor[] grads)",
    _penalty,
    _penalty_fake,
)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, want_points: bool, args: tuple[Any, ...], *params: Tensor) -> Tensor:
        loss, grad_points, grads = _penalty_op(points, params, *args[:-1], bool(params), want_points, args[-1])
        ctx.save_for_backward(grad_points, *grads)
        ctx.want_points = want_points
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the penalty's graph is first order: its gradients are already computed. Pass create_graph=True to "
                "gradient_penalty to differentiate them again"
            )
        grad_points, *grads = ctx.saved_tensors
        return (grad_points * grad_loss if ctx.want_points else None), None, None, *(g * grad_loss for g in grads)


def penalty(
    handle: int,
    params: Sequence[Tensor],
    points: Tensor,
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
) -> Tensor:
    """Penalty at points; its graph is one node that holds the gradients."""
    device = points.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    args = (handle, weight, target, one_sided, squared)
    if torch.is_grad_enabled() and (points.requires_grad or params):
        return _Penalty.apply(points, points.requires_grad, (*args, autocast), *params)
    return _penalty_op(points.detach(), [], *args, False, False, autocast)[0]


def differentiable_penalty(critic: Critic, points: Tensor, **options: Any) -> Tensor:
    """The same with a graph of any order: through the critic layers, whose third derivatives are exact."""

    def scores(x: Tensor) -> Tensor:
        with CriticLayers(Scope()):
            return critic(x)

    return reference.penalty_at(scores, points, **options)


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        return _interpolate_op(real, fake, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (alpha,) = ctx.saved_tensors
        alpha = alpha.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype)
        return alpha * grad, (1 - alpha) * grad, None


def _interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return backends.select("gradient_penalty", real, fake).interpolate(real, fake, alpha)


def _interpolate_fake(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(real, memory_format=torch.contiguous_format)


_interpolate_op = _library.define(
    "interpolate(Tensor real, Tensor fake, Tensor alpha) -> Tensor", _interpolate, _interpolate_fake
)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """``alpha * real + (1 - alpha) * fake`` with one alpha a sample, shape (N,)."""
    return _Interpolate.apply(real, fake, alpha)
