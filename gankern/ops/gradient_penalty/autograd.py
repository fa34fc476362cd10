"""The penalty, by gankern's layers, a plan or stock autograd; the first two are one node, of first order outside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gankern import _compiling, _cuda, _library, _phases, _stock, _triton, backends, dispatch, workspace
from gankern._layout import memory_format
from gankern.ops.critic_layers import Chain, Declined, Scope, find
from gankern.ops.gradient_penalty import cpu, reference
from gankern.ops.gradient_penalty.choice import watched

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


def is_distributed(critic: Critic) -> bool:
    """Whether one of a critic's wrappers is DistributedDataParallel."""
    if _compiling.is_compiled(critic):
        return is_distributed(critic._orig_mod)
    return isinstance(critic, DistributedDataParallel)


# Critics that operators know by number: not references to them.
_registered: dict[int, weakref.ref[nn.Module]] = {}
_handles: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_numbers = count(1)


# Dynamo runs this while it traces and keeps the result.
@_compiling.constant
def capturable(critic: nn.Module) -> tuple[int, list[bool]]:
    """Number of a critic for a compiled graph, and which of its parameters get gradients; 0 where none may hold it.

    A graph takes the parameters as inputs; what else a critic reads when it runs, or writes, it does not see.
    """
    chain = find(critic)
    if isinstance(chain, str) or [*map(id, chain.params)] != [*map(id, critic.parameters())]:
        return 0, []
    casts = torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")
    if (casts and not chain.casts) or any(hasattr(step.module, "p") for step in chain.steps):
        return 0, []
    handle = _handles.get(critic)
    if handle is None:
        handle = _handles[critic] = next(_numbers)
        _registered[handle] = weakref.ref(critic)
        weakref.finalize(critic, _registered.pop, handle, None)
    return handle, chain.gets_gradients()


def _chain_of(handle: int) -> Chain:
    """The chain of a critic that a compiled graph holds."""
    critic = _registered[handle]()
    chain = find(critic)
    if isinstance(chain, str):
        raise RuntimeError(
            f"the critic is another than the one whose penalty torch.compile captured: {chain}. Call "
            "torch.compiler.reset() after the change"
        )
    return chain


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
    critic: int | Chain,
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
    want_points: bool,
    wanted: Sequence[bool],
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    chain = _chain_of(critic) if isinstance(critic, int) else critic
    adapter = backends.select("gradient_penalty", points)
    device = points.device.type
    mixed = nullcontext() if autocast is None else torch.autocast(device, autocast)
    with _recording(), nullcontext() if autocast is None else torch.autocast(device, enabled=False):
        x = points.detach().requires_grad_()
        # Hooks of the parameters are for the gradients that the node hands on.
        values = [p.detach().requires_grad_(want) for p, want in zip(params, wanted, strict=True)]
        turns = _turns(x) and memory_format(x) == torch.contiguous_format
        scope = Scope(want_points, not chain.has_norm, turns)
        with _phases.phase("penalty/inner forward"), mixed:
            scores = chain.run(scope, x, values)
        # Stock multiplies what is not finite by its zeros. To find out, a GPU would have to be waited for.
        if adapter is cpu and not isinstance(critic, int) and not scores.isfinite().all():
            raise Declined("scores that are not finite")
        leaves = [*(v for v in values if v.requires_grad), *([x] if want_points else [])]
        with _phases.phase("penalty/inner gradient"), scope.input_gradient():
            (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=bool(leaves))
        with _phases.phase("penalty/tail"):
            loss, cotangent = adapter.tail(grad.detach(), weight, target, one_sided, squared)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if leaves and grad.requires_grad:
            # Around the parts of it that are the weight gradient.
            with _phases.phase("penalty/tangent"):
                found = torch.autograd.grad(grad, leaves, cotangent, allow_unused=True)
    # Zeros where layers know of a zero that stock computes; the layout is the parameter's, as the fake promises.
    grads = _apart([_gradient_like(p, g) for p, g in zip(leaves, found, strict=True)])
    return loss, grads.pop() if want_points else points.new_empty(0), grads


def _turns(points: Tensor) -> bool:
    """Whether images are turned into channels_last: by the kernels of the CPU."""
    return bool(backends.select("critic_layers", points).TURNS)


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


def _penalty_fake(points: Tensor, params: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    want_points, wanted = args[5:7]
    grads = [torch.empty_like(p) for p, want in zip(params, wanted, strict=True) if want]
    return points.new_empty(()), torch.empty_like(points) if want_points else points.new_empty(0), grads


_penalty_op = _library.define(
    "gradient_penalty(Tensor points, Tensor[] params, int critic, float weight, float target, bool one_sided,"
    " bool squared, bool want_points, bool[] wanted, ScalarType? autocast)"
    " -> (Tensor loss, Tensor grad_points, Tensor[] grads)",
    _penalty,
    _penalty_fake,
)


def _is_batched(tensor: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def _times(grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    if torch.compiler.is_compiling() or _is_batched(factor):
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
        wanted: list[bool],
        autocast: torch.dtype | None,
        *params: Tensor,
    ) -> Tensor:
        run: Callable[..., Any] = _penalty_op if isinstance(options[0], int) else _penalty
        loss, grad_points, grads = run(points, params, *options, want_points, wanted, autocast)
        ctx.save_for_backward(grad_points, *grads)
        ctx.want_points, ctx.wanted = want_points, wanted
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only()
        grad_points, *grads = ctx.saved_tensors
        rest = _times(grads, grad_loss)
        tensors = [rest.pop(0) if wanted else None for wanted in ctx.wanted]
        return (grad_points * grad_loss if ctx.want_points else None), None, None, None, None, *tensors


def penalty(
    critic: int | Chain,
    params: Sequence[Tensor],
    reached: Sequence[bool],
    points: Tensor,
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
) -> Tensor:
    """Penalty at points by gankern's layers; its graph is one node that holds the gradients.

    `reached` says of each parameter, and last of the points, whether they get one.
    """
    device = points.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    options = (critic, weight, target, one_sided, squared)
    enabled = torch.is_grad_enabled()
    *wanted, want_points = (enabled and t.requires_grad and r for t, r in zip((*params, points), reached, strict=True))
    # Hooks of what gets no gradient are not called.
    points = points if want_points else points.detach()
    params = [p if want else p.detach() for p, want in zip(params, wanted, strict=True)]
    if want_points or any(wanted):
        return _Penalty.apply(points, options, want_points, wanted, autocast, *params)
    run: Callable[..., Any] = _penalty_op if isinstance(critic, int) else _penalty
    return run(points, params, *options, False, wanted, autocast)[0]


class _Held(torch.autograd.Function):
    """A loss whose gradients are computed already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only()
        return None, None, *_times(list(ctx.saved_tensors), grad_loss)


def holds_gradients(loss: Tensor) -> bool:
    """Whether a penalty's gradients are computed already, so that its backward pass only hands them on."""
    names = {f"{function.__name__}Backward" for function in (_Held, _Penalty)}
    return loss.grad_fn is not None and loss.grad_fn.name() in names


def planned_penalty(
    critic: Critic,
    points: Tensor,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: tuple[float, float, bool, bool],
) -> Tensor:
    """Penalty at points by a plan; its graph is one node that holds the gradients.

    Raises
    ------
    Refused
        Where there can be no plan.
    """
    from gankern.compiler.cache import plans_of

    wants = torch.is_grad_enabled()
    with torch.enable_grad(), _phases.phase("penalty/plan"):
        call = {"critic": critic, "x": points.detach().requires_grad_(), "args": inputs, "kwargs": kwargs}
        loss, found = plans_of(critic).run(call, wants, wants and points.requires_grad, options)
    if not found:
        return loss
    reached = [(points if t is None else t, g) for t, g in found]
    return _Held.apply(loss, _apart([_gradient_like(t, g) for t, g in reached]), *(t for t, _ in reached))


def stock_penalty(
    critic: Critic,
    points: Tensor,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    weight: float,
    target: float,
    one_sided: bool,
    squared: bool,
) -> Tensor:
    """Penalty at points by stock autograd, with the graph that it makes."""
    x = points if points.requires_grad else points.detach().requires_grad_()
    with torch.enable_grad():
        with _phases.phase("penalty/inner forward"), _stock.forwards():
            scores = critic(x, *inputs, **kwargs)
        if not isinstance(scores, Tensor):
            raise TypeError(f"critic must return a Tensor; got {type(scores).__name__}")
        grad = None
        if scores.requires_grad:
            with _phases.phase("penalty/inner gradient"):
                (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True, allow_unused=True)
        if grad is None:
            raise ValueError("critic must depend on its input; its output does not")
    with _phases.phase("penalty/tail"):
        return reference.penalty_of(grad, weight, target, one_sided, squared)


class _Reach(torch.autograd.Function):
    """A loss on which parameters depend, if by nothing but zeros."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, ...]:
        return grad_loss, *map(torch.zeros_like, ctx.saved_tensors)


def reach(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The loss, of which each parameter gets a gradient: DistributedDataParallel waits for all."""
    return _Reach.apply(loss, *params) if loss.requires_grad else loss


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.set_materialize_grads(False)
        return _interpolate_op(real, fake, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
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
        few = dispatch.is_small(real) or (real.numel() <= _FEW_VALUES and torch_may_run(real))
        unsafe = not torch.compiler.is_compiling() and watched(real, fake, alpha) is not None
        # Of other orders of memory the points get stock's: dropout draws its mask, and views go, in that order.
        orders = (torch.contiguous_format, torch.channels_last) if real.dim() == 4 else (torch.contiguous_format,)
        strided = not any(all(t.is_contiguous(memory_format=order) for t in (real, fake)) for order in orders)
        if few or unsafe or strided or alpha.requires_grad:
            return reference.interpolate(real, fake, alpha)
        return _Interpolate.apply(real, fake, alpha)
