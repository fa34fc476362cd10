"""What the penalty's layers take of a critic, found by running it once."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gankern.backends import Explanation, explain_call
from gankern.ops import _check
from gankern.ops.critic_layers import CriticLayers, Scope
from gankern.ops.gradient_penalty.autograd import inner_module

#: Two samples, since batch norm refuses one value a channel; more would only cost time.
SAMPLES = 2

# Linear in the critic's activations: stock autograd has no second derivative of these to waste time on.
_LINEAR_NAMES = """
    view view_as reshape reshape_as flatten ravel unflatten permute transpose t swapaxes swapdims movedim moveaxis
    squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile contiguous clone narrow select
    index_select gather chunk split tensor_split unbind cat concat concatenate stack hstack vstack flip roll unfold
    as_strided diagonal __get__ __getitem__ pad zero_pad2d pixel_shuffle pixel_unshuffle channel_shuffle
    to type type_as float double half bfloat16
    add add_ sub sub_ subtract rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ neg neg_ negative __neg__
    sum mean nansum cumsum interpolate upsample upsample_nearest upsample_bilinear
    dropout dropout_ dropout1d dropout2d dropout3d
"""
_LINEAR = frozenset(_LINEAR_NAMES.split())
_SCALING_NAMES = "mul mul_ multiply __mul__ __rmul__ __imul__ div div_ divide __truediv__ __itruediv__"
_SCALING = frozenset(_SCALING_NAMES.split())


def _is_linear(name: str, args: tuple[Any, ...]) -> bool:
    # A product is bilinear, unless one side is a constant; so is a quotient by one.
    constant = len(args) < 2 or not isinstance(args[1], Tensor)
    return name in _LINEAR or (name in _SCALING and constant)


def _why_declined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Options of a known function's call that may be why it was not taken."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    facts = [f"input {tuple(tensors[0].shape)}"] if tensors else []
    if len({t.dtype for t in tensors}) > 1:
        facts.append("of dtypes " + ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})))
    # Positional options lose their names in built-in functions.
    facts += [repr(a) for a in args if isinstance(a, str | int | float | tuple | list)]
    facts += [f"{k}={v!r}" for k, v in kwargs.items() if isinstance(v, str | int | float | tuple | list)]
    return f"gankern's layer does not take this call: {', '.join(facts)}"


@dataclass(frozen=True)
class PenaltyExplanation(Explanation):
    """What :func:`gankern.explain` found for a gradient penalty and its critic.

    Attributes
    ----------
    op, chosen, refused
        As in :class:`gankern.backends.Explanation`, for the points and the penalty itself.
    taken : dict of str to int
        Calls of the critic by function that gankern's layers run.
    stock : dict of str to int
        Those that stock autograd differentiates twice, as without gankern.
    why : dict of str to str
        Why each function of `stock` is there.
    linear : dict of str to int
        Those that stock autograd runs and that are linear in the activations: shapes, sums, means. Nothing is lost.
    small : bool
        Whether critic and batch are so small that stock autograd runs all of it, as the faster one.
    """

    taken: dict[str, int] = field(default_factory=dict)
    stock: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    linear: dict[str, int] = field(default_factory=dict)
    small: bool = False

    def __str__(self) -> str:
        def listed(calls: dict[str, int]) -> str:
            return ", ".join(f"{name} {n}" for name, n in calls.items()) or "nothing"

        lines = [super().__str__()]
        if self.small:
            lines.append("small: stock autograd is faster and runs all of the critic; of larger ones:")
        lines += [f"critic, by gankern's layers: {listed(self.taken)}"]
        if self.linear:
            lines.append(f"critic, linear and left as it is: {listed(self.linear)}")
        lines.append("critic, by stock autograd:" + ("" if self.stock else " nothing"))
        return "\n".join(lines + [f"  {name} {n}: {self.why[name]}" for name, n in self.stock.items()])


class _Recorder(CriticLayers):
    """Critic layers that also note why a function is left to stock autograd."""

    def __init__(self) -> None:
        super().__init__(Scope())
        self.linear: Counter[str] = Counter()
        self.why: dict[str, dict[str, None]] = {}

    def leave(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: bool) -> None:
        name = getattr(func, "__name__", str(func))
        if _is_linear(name, args):
            self.linear[name] += 1
            return
        super().leave(func, args, kwargs, known=known)
        reason = _why_declined(args, kwargs) if known else "gankern has no layer for it"
        self.why.setdefault(name, {})[reason] = None


@contextmanager
def _untouched(critic: Callable[..., Any], device: torch.device) -> Iterator[None]:
    """Leave the random state and every module that runs inside as they were: buffers and plain attributes."""
    saved: dict[nn.Module, tuple[dict[str, Any], dict[str, Tensor | None]]] = {}
    clones: dict[Tensor, Tensor] = {}

    def borrow(module: nn.Module, *args: Any) -> None:
        if module in saved:
            return
        saved[module] = dict(module.__dict__), dict(module._buffers)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                # The run writes to clones: what a pending backward pass has saved keeps its version.
                module._buffers[name] = clones.setdefault(buffer, buffer.detach().clone())

    for module in critic.modules() if isinstance(critic, nn.Module) else ():
        borrow(module)
    # A plain callable does not tell its modules before they run.
    hook = register_module_forward_pre_hook(borrow)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        hook.remove()
        for module, (attributes, buffers) in saved.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def explain_penalty(found: Explanation, *args: Any, **kwargs: Any) -> Explanation:
    """Add to what was found for the points what gankern takes of the critic; nothing where no critic is given.

    Runs the critic once, on two points between real and fake, or on all where it gets further inputs. Its parameters,
    their gradients, its modules' buffers and plain attributes and torch's random state stay as they are; its hooks are
    called. A ``torch.autograd.Function`` of the critic's own is not seen.
    """
    from gankern.ops.gradient_penalty import check_points, gradient_penalty, small, trainable

    names = ("critic", "real", "fake")
    if not (args and callable(args[0]) and not isinstance(args[0], Tensor)) and "critic" not in kwargs:
        return found
    call = inspect.signature(gradient_penalty).bind(*args, **kwargs).arguments
    critic, real, fake = (call[name] for name in names)
    inputs, critic_kwargs = call.get("inputs", ()), call.get("critic_kwargs", {})
    check_points("real", real)
    check_points("fake", fake)
    _check.same_shape("fake", fake, "real", real)
    # Labels and the like have no say in which backend runs.
    found = explain_call(found.op, real, fake)
    whole = isinstance(critic, nn.Module) and call.get("params") is None
    with torch.enable_grad():
        is_small = whole and small.is_small(critic, real, trainable(critic, None))
    # As the penalty does; and DistributedDataParallel would wait for a backward pass.
    critic = inner_module(critic)
    if not inputs and not critic_kwargs:
        real, fake = real[:SAMPLES], fake[:SAMPLES]
    real, fake = real.detach(), fake.detach()
    layers = _Recorder()
    with _untouched(critic, real.device), torch.enable_grad():
        points = (real + (fake - real) / 2).requires_grad_()
        with layers:
            critic(points, *inputs, **critic_kwargs)
    why = {name: "; ".join(reasons) for name, reasons in layers.why.items()}
    calls = dict(layers.taken), dict(layers.stock), why, dict(layers.linear)
    return PenaltyExplanation(found.op, found.chosen, found.refused, *calls, is_small)
