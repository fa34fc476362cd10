"""Modules with a forward of their own, whose chains of convolution, batch norm and activation run as fused ops."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gankern.nn import plan
from gankern.nn.stretch import CONVS, NORMS, FusedSequential
from gankern.nn.tracing import Guards, Leaf, Untraceable, flatten, trace

_KEY = "_gankern_plans"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_MOST_PLANS = 8


@dataclass
class _Plan:
    """What to run for calls like the one that was traced; `run` is None where that is the forward itself."""

    key: list[Any]
    guards: Guards
    run: Callable[..., Any] | None = None
    found: list[plan.Found] = field(default_factory=list)
    reason: str | None = None


class Plans:
    """The plans of one module, newest first. A copy of the module makes its own."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.forward = stock_class(type(owner)).forward
        self.entries: list[_Plan] = []
        self._open_floats = True
        self._traces = 0
        self._calls = 0

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Plan, list[Any]] | None:
        """The plan for a call and its tensors; a new one where none fits and it is time to trace again."""
        leaves: list[Any] = []
        key: list[Any] = []
        try:
            call = flatten((args, kwargs), leaves, key, open_floats=self._open_floats)
        except Untraceable as error:
            return _Plan(key, Guards(), reason=str(error)), []
        for entry in self.entries:
            if entry.key == key and entry.guards.hold():
                return entry, leaves
        self._calls += 1
        # Values that change with every call are not worth a trace each.
        if self._calls < 2 ** max(0, self._traces - _MOST_PLANS):
            return None
        made = make_plan(self.owner, self.forward, call, key)
        if made is None:
            return None
        if made.reason is not None and self._open_floats and any(type(leaf) is float for leaf in leaves):
            self._open_floats = False
            return self.find(args, kwargs)
        self._traces, self._calls = min(self._traces + 1, _MOST_PLANS + 12), 0
        self.entries = [made, *self.entries[: _MOST_PLANS - 1]]
        return made, leaves


def make_plan(module: nn.Module, forward: Any, call: tuple[Any, Any], key: list[Any]) -> _Plan | None:
    """Trace a call, arguments as `flatten` gives them; None where this is not the moment."""
    made = _Plan(key, Guards())
    try:
        graph = trace(module, forward, *call, made.guards)
        if graph is None:
            return None
        made.found = plan.find(module, graph)
        made.run = plan.compile_graph(module, graph)
    except Untraceable as error:
        made.reason = str(error)
    return made


class Reclassed:
    """Marks a module whose class `fuse` made of another: copies and pickles name that other, and are fused again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        stock = type(self).__dict__["_gankern_stock"]
        args = tuple(stock if arg is type(self) else arg for arg in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != _KEY}
        return (_rebuild, (function, args), *rest)


def _rebuild(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = function(*args)
    module.__class__ = fused_class(type(module))
    return module


class TracedModule(Reclassed):
    """A module whose forward is replaced by what was made of its trace, wherever that means the same."""


def _forward(stock: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return stock.forward(self, *args, **kwargs)
        plans = self.__dict__.get(_KEY)
        if plans is None or plans.owner is not self or plans.forward is not stock.forward:
            plans = self.__dict__[_KEY] = Plans(self)
        found = plans.find(args, kwargs)
        if found is None or found[0].run is None:
            return stock.forward(self, *args, **kwargs)
        return found[0].run(self, *found[1])

    return forward


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `fused_class` made this of; itself if it did not."""
    if kind is FusedSequential:
        return nn.Sequential
    return kind.__dict__.get("_gankern_stock", kind)


@functools.cache
def _fused_class(kind: Any) -> type[nn.Module]:
    if kind is nn.Sequential:
        return FusedSequential
    names = {n: getattr(kind, n) for n in ("__module__", "__qualname__", "__doc__")} | {"_gankern_stock": kind}
    if kind.forward is nn.Sequential.forward:
        bases: tuple[type, ...] = (Reclassed, FusedSequential, kind)
    else:
        bases = (TracedModule, kind)
        names["forward"] = _forward(kind)
    return types.new_class(kind.__name__, bases, {}, lambda namespace: namespace.update(names))


def fused_class(kind: type[nn.Module]) -> Any:
    """The class of a fused module, under the same name."""
    return _fused_class(kind)  # type: ignore[arg-type]


def owned(module: nn.Module) -> list[str]:
    """Names of the convolutions and batch norms that a module's own forward would call."""
    names = []
    for name, child in module.named_children():
        if isinstance(child, CONVS + NORMS):
            names.append(name)
        elif isinstance(child, _CONTAINERS) and type(child).forward is nn.Module.forward:
            names += [f"{name}.{inner}" for inner in owned(child)]
    return names


def has_own_forward(module: nn.Module) -> bool:
    """Whether a user wrote the module's forward, and it has convolutions or batch norms to call."""
    kind = stock_class(type(module))
    theirs = kind.__module__.startswith(("torch.", "gankern.")) or isinstance(module, torch.jit.ScriptModule)
    plain = kind.forward in (nn.Module.forward, nn.Sequential.forward)
    return not theirs and not plain and bool(owned(module))


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be fused, whatever its forward does."""
    if "forward" in module.__dict__:
        return "forward was replaced"
    for base in type(module).__mro__:
        # It would learn of a class that its author did not write.
        if "__init_subclass__" in base.__dict__ and base is not object and base.__module__ != "typing":
            return f"{base.__name__} watches its subclasses"
    try:
        fused_class(stock_class(type(module)))
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    return None


def fuse(module: nn.Module) -> None:
    module.__class__ = fused_class(type(module))


def unfuse(module: nn.Module) -> None:
    module.__class__ = stock_class(type(module))
    module.__dict__.pop(_KEY, None)


def report(module: nn.Module) -> list[plan.Found]:
    """The stretches in a forward that its user wrote."""
    reason = refusal(module)
    made = _plan_of(module) if reason is None else None
    if made is None:
        reason = reason or "it is being traced or watched"
    elif made.reason is None:
        return made.found
    else:
        reason = f"forward cannot be traced: {made.reason}"
    return [plan.Found(tuple(owned(module)), reason)]


def _plan_of(module: nn.Module) -> _Plan | None:
    """The plan that ran last; else one for a call with a tensor for each argument that has no default."""
    plans = module.__dict__.get(_KEY)
    if plans is not None and plans.owner is module:
        for entry in plans.entries:
            if entry.guards.hold():
                return entry
    forward = stock_class(type(module)).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    args = tuple(
        Leaf(Tensor)
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    )
    kwargs = {p.name: Leaf(Tensor) for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    return make_plan(module, forward, (args, kwargs), [])
