"""What autograd and torch's transforms ask of every op."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from gankern import _compiling, _phases

_PLAIN = (Tensor, nn.Parameter)
_TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


# The vmap of ``torch.autograd.grad(is_grads_batched=True)`` is none of functorch's.
_VMAP = torch._C._dispatch_key_parse("VmapMode")


#: The derivatives of stock's activations that read the output, which others hold: they may have a hook on it, to which
#: a second derivative comes, or have written to it.
BY_OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, output: torch.ops.aten.threshold_backward(grad, output, 0),
    "tanh": torch.ops.aten.tanh_backward,
}


_derivation = threading.local()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)


def is_transformed() -> bool:
    """Whether a vmap or another of functorch's transforms is active: kernels and Functions know none."""
    return not torch.compiler.is_compiling() and _is_transformed()


def is_traced(input: Any) -> bool:
    """Whether ``torch.jit.trace`` or ``torch.fx`` is at work, to which checks of sizes are warnings or errors."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._get_tracing_state() is not None or is_stand_in(input)


def is_stand_in(input: Any) -> bool:
    """Whether it is no tensor, but takes part in torch's functions as one: a proxy of ``torch.fx``."""
    return not isinstance(input, Tensor) and has_torch_function((input,))


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether gankern's own operators may run a call; else torch's functions do.

    Those know what traces, exports and transforms ask, and tensors without values or of other people's types.
    """
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if _is_transformed() or torch._C._get_tracing_state() is not None:
        return False
    # Forward-mode derivatives.
    if forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS):
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)


@contextmanager
def derived() -> Iterator[None]:
    """Let a graph that is derived inside hold gankern's operators, where they save more than passes over stock's do."""
    _derivation.on = True
    try:
        yield
    finally:
        _derivation.on = False


def is_derived() -> bool:
    """Whether this thread derives a plan."""
    return getattr(_derivation, "on", False)


def onlooker() -> str | None:
    """Who traces, transforms or watches what torch runs now, so that only stock's own code may run; None if nobody."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces"
    if _is_transformed() or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode derivatives"
    # A default device is a mode as well, that leaves alone what gets tensors.
    if torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a mode that sees torch's functions"
    if torch._C._len_torch_dispatch_stack() and not _phases.inline:
        return "a mode that sees torch's operators"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors"
    return None


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd follows a call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def casts(tensor: Tensor) -> bool:
    """Whether autocast is on for a tensor's device; there are devices that it does not know."""
    kind = tensor.device.type
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


# Dynamo of torch 2.11 cannot trace it.
@_compiling.constant
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of a function's inputs, as a Function's backward is asked for them; differentiable in grad mode.

    Parameters
    ----------
    function : callable
        Of the inputs; called again.
    inputs : sequence of Tensor or None
        What it was called with. Each place gets its own gradient, also where one tensor stands in several of them or
        one was computed from another.
    grad_outputs : sequence of Tensor
        Gradients of the outputs.
    wanted : sequence of bool
        Of which inputs; those get None else.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        places = [None if t is None else _place(t, w) for t, w in zip(inputs, wanted, strict=True)]
        # Derivatives of what ran under autocast, and not themselves cast.
        with _without_autocast(grad_outputs[0]):
            outputs = function(*places)
        given = [p for p, w in zip(places, wanted, strict=True) if w and p is not None]
        found: Any = iter(
            torch.autograd.grad(outputs, given, grad_outputs, create_graph=create_graph, allow_unused=True)
            if given
            else ()
        )
    return [next(found) if w and p is not None else None for p, w in zip(places, wanted, strict=True)]


def _place(tensor: Tensor, wanted: bool) -> Tensor:
    """The tensor as one of its own, to which no other path leads; higher derivatives still find it."""
    alias = torch.ops.aten.alias.default(tensor)
    # Someone may have switched requires_grad off since.
    return alias.detach().requires_grad_() if wanted and not alias.requires_grad else alias


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(tensor.device.type, enabled=False) if casts(tensor) else nullcontext()
