"""The penalty as one operator: second order inside, first order outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from gankern import _compiling, _cuda, _library, _phases, _triton, backends, workspace
from gankern._layout import memory_format
from gankern.ops.critic_layers import CriticLayers, Scope
from gankern.ops.gradient_penalty import cpu, reference

backends.register(
    "gradient_penalty",
    cpu=cpu,
    reference=reference,
    triton=_triton.adapter("gankern.ops.gradient_penalty.triton"),
    cuda=_cuda.adapter("gankern.ops.gradient_penalty.cuda"),
)

Critic = Callable[..., Tensor]


def inner_module(critic: Critic) -> Critic:
    """The module inside the wrappers of torch.compile, which refuses double backward (2.13), and of DDP."""
    while isinstance(critic, nn.Module):
        if isinstance(critic, DistributedDataParallel):
            critic = critic.module
        elif _compiling.is_compiled(critic):
            critic = critic._orig_mod
        else:
            break
    return critic


class _Hole:
    """Stands for a tensor among a critic's further arguments, which reaches it through the operator."""


def split(arguments: Any) -> tuple[list[Tensor], Any]:
    """Tensors of a tree, and the tree with holes in their places."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return tensors, pytree.tree_map(lambda leaf: _Hole if isinstance(leaf, Tensor) else leaf, arguments)


def _fill(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The tree that :func:`split` took apart."""
    rest = iter(tensors)
    return pytree.tree_map(lambda leaf: next(rest) if leaf is _Hole else leaf, template)


NO_ARGUMENTS: Any = ((), {})


@dataclass(frozen=True)
class Registered:
    """A critic that operators know by number, and the parameters whose gradients they return.

    Attributes
    ----------
    critic : callable
        Returns the critic, or None where it is gone.
    params : sequence of Tensor or None
        None for all of a module's.
    template : tuple
        Arguments after the points and keyword arguments, with holes for tensors.
    """

    critic: Callable[[], Critic | None]
    params: Sequence[Tensor] | None
    template: Any = NO_ARGUMENTS

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


def _register_call(critic: nn.Module, template: Any) -> int:
    """Number of a module with further arguments, kept for the module's life: one for each graph traced with it."""
    handle = next(_numbers)
    _registered[handle] = Registered(weakref.ref(critic), None, template)
    weakref.finalize(critic, _registered.pop, handle, None)
    return handle


# Dynamo runs these while it traces and keeps the number.
_register_module_constant = _compiling.constant(_register_module)
_register_call_constant = _compiling.constant(_register_call)


def module_handle(critic: nn.Module) -> int:
    return _register_module_constant(critic) if torch.compiler.is_compiling() else _register_module(critic)


def call_handle(critic: nn.Module, template: Any) -> AbstractContextManager[int]:
    """Number of a module with further arguments: a constant of a compiled graph, else for the length of one call."""
    if torch.compiler.is_compiling():
        return nullcontext(_register_call_constant(critic, template))
    return callable_handle(critic, None, template)


@contextmanager
def callable_handle(critic: Critic, params: Sequence[Tensor] | None, template: Any = NO_ARGUMENTS) -> Iterator[int]:
    """Number of a callable for the length of one call."""
    handle = next(_numbers)
    _registered[handle] = Registered(lambda: critic, params, template)
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


def check_scores(scores: Any) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"critic must return a Tensor; got {type(scores).__name__}")


def check_input_gradient(grad: Tensor | None) -> None:
    if grad is None:
        raise ValueError("critic must depend on its input; its output does not")


def first_order_only() -> None:
    """Refuse, in a backward pass, to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the penalty's graph is first order: its gradients are already computed. Pass create_graph=True to "
            "gradient_penalty to differentiate them again"
        )


def _penalty(
    points: Tensor,
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    handle: int,
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
    want_params: bool,
    want_points: bool,
    want_inputs: Sequence[bool],
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
        inputs = [t.detach().requires_grad_(want) for t, want in zip(inputs, want_inputs, strict=True)]
        args, kwargs = _fill(registered.template, inputs)
        turns = _turns(x) and memory_format(x) == torch.contiguous_format
        scope = Scope(None if want_points else x, not _has_norm(critic), turns, fuses=True)
        with _phases.phase("penalty/inner forward"), CriticLayers(scope), mixed:
            scores = critic(x, *args, **kwargs)
        check_scores(scores)
        wanted = [*params, *(t for t in inputs if t.requires_grad), *([x] if want_points else [])]
        with _phases.phase("penalty/inner gradient"), scope.input_gradient():
            (grad,) = torch.autograd.grad(
                scores, x, torch.ones_like(scores), create_graph=bool(wanted), allow_unused=True
            )
        check_input_gradient(grad)
        with _phases.phase("penalty/tail"):
            loss, cotangent = adapter.tail(grad.detach(), weight, target, one_sided, squared)
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and grad.requires_grad:
            # Around the parts of it that are the weight gradient.
            with _phases.phase("penalty/tangent"):
                found = torch.autograd.grad(grad, wanted, cotangent, allow_unused=True)
    # Zeros where the penalty does not depend on a parameter, so that every one takes part (DDP); the layout is the
    # parameter's, as the fake promises.
    grads = _apart([_gradient_like(p, g) for p, g in zip(wanted, found, strict=True)])
    return loss, grads.pop() if want_points else points.new_empty(0), grads


def _turns(points: Tensor) -> bool:
    """Whether images are turned into channels_last: by the kernels of the CPU."""
    return bool(backends.select("critic_layers", points).TURNS)


def _has_norm(critic: Critic) -> bool:
    """Whether a norm's kernels round otherwise than stock's, so that the forward pass has not stock's bits anyway."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    return isinstance(critic, nn.Module) and any(isinstance(m, norms) for m in critic.modules())


def _gradient_like(param: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.zeros_like(param)
    dense = param.is_contiguous() or param.is_contiguous(memory_format=torch.channels_last)
    strides = param.stride() if dense else torch.empty_like(param, device="meta").stride()
    if grad.stride() == strides and grad.dtype == param.dtype:
        return grad
    return torch.empty_like(param).copy_(grad)


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """No two in one storage: autograd hands the terms of a sum one tensor, compiled code overwrites each output."""
    seen: set[int] = set()
    result = []
    for t in tensors:
        t = t.clone() if t.numel() and t.data_ptr() in seen else t
        seen.add(t.data_ptr())
        result.append(t)
    return result


def _penalty_fake(
    points: Tensor, params: Sequence[Tensor], inputs: Sequence[Tensor], *args: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    want_params, want_points, want_inputs = args[5:8]
    grads = [torch.empty_like(p) for p in params] if want_params else []
    grads += [torch.empty_like(t) for t, want in zip(inputs, want_inputs, strict=True) if want]
    return points.new_empty(()), torch.empty_like(points) if want_points else points.new_empty(0), grads


_penalty_op = _library.define(
    "gradient_penalty(Tensor points, Tensor[] params, Tensor[] inputs, int critic, float weight, float target,"
    " bool one_sided, bool squared, bool want_params, bool want_points, bool[] want_inputs, ScalarType? autocast)"
    " -> (Tensor loss, Tensor grad_points, Tensor[] grads)",
    _penalty,
    _penalty_fake,
)


def _times(grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return [g * factor for g in grads]
    if factor.device.type != "cpu":
        # One launch for all; the factor stays on the device.
        same = all(g.dtype == factor.dtype for g in grads)
        return list(torch._foreach_mul(grads, factor)) if grads and same else [g * factor for g in grads]
    large = [g.numel() * g.element_size() >= workspace.SMALLEST and g.dtype == factor.dtype for g in grads]
    small = [g for g, is_large in zip(grads, large, strict=True) if not is_large]
    rest = iter(torch._foreach_mul(small, factor) if small else ())
    return [
        torch.mul(g, factor, out=workspace.like(g)) if is_large else next(rest)
        for g, is_large in zip(grads, large, strict=True)
    ]


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        points: Tensor,
        options: tuple[Any, ...],
        want_points: bool,
        want_inputs: list[bool],
        autocast: torch.dtype | None,
        *tensors: Tensor,
    ) -> Tensor:
        n = len(tensors) - len(want_inputs)
        run: Callable[..., Any] = _penalty if _phases.inline else _penalty_op
        loss, grad_points, grads = run(
            points, tensors[:n], tensors[n:], *options, n > 0, want_points, want_inputs, autocast
        )
        ctx.save_for_backward(grad_points, *grads)
        ctx.want_points = want_points
        ctx.wanted = [True] * n + want_inputs
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only()
        grad_points, *grads = ctx.saved_tensors
        rest = _times(grads, grad_loss)
        tensors = [rest.pop(0) if wanted else None for wanted in ctx.wanted]
        return (grad_points * grad_loss if ctx.want_points else None), None, None, None, None, *tensors


def penalty(
    handle: int,
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    points: Tensor,
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
) -> Tensor:
    """Penalty at points; its graph is one node that holds the gradients."""
    device = points.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    options = (handle, weight, target, one_sided, squared)
    want_inputs = [t.requires_grad for t in inputs]
    if torch.is_grad_enabled() and (points.requires_grad or params or any(want_inputs)):
        return _Penalty.apply(points, options, points.requires_grad, want_inputs, autocast, *params, *inputs)
    nothing = [False] * len(inputs)
    return _penalty_op(points.detach(), [], [t.detach() for t in inputs], *options, False, False, nothing, autocast)[0]


def differentiable_penalty(
    critic: Critic, points: Tensor, inputs: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
) -> Tensor:
    """The same with a graph of any order: through the critic layers, whose third derivatives are exact."""

    def scores(x: Tensor) -> Tensor:
        with CriticLayers(Scope(turns=_turns(x))):
            return critic(x, *inputs, **kwargs)

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
    return torch.empty_like(real, memory_format=memory_format(real))


_interpolate_op = _library.define(
    "interpolate(Tensor real, Tensor fake, Tensor alpha) -> Tensor", _interpolate, _interpolate_fake
)


def torch_may_run(points: Tensor) -> bool:
    """Whether torch's own functions may be taken where they are faster: they compute the same and nothing is traced.

    In bfloat16 they do not: the second derivative of torch's convolution is wrong for a broadcast gradient.
    """
    return (
        not torch.compiler.is_compiling()
        and points.device.type == "cpu"
        and points.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and backends.requested() == "auto"
    )


# Up to so many values torch's arithmetic, of the same bits, is done before a kernel of ours is called.
_FEW_VALUES = 1 << 14


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """``alpha * real + (1 - alpha) * fake`` with one alpha a sample, shape (N,)."""
    with _phases.phase("penalty/interpolation"):
        if real.numel() <= _FEW_VALUES and torch_may_run(real):
            return reference.interpolate(real, fake, alpha)
        return _Interpolate.apply(real, fake, alpha)
