"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("gankern")

#: Backends in the order in which ``auto`` tries them.
NAMES = ("cuda", "triton", "cpu", "reference")

#: Backends of an op that ``auto`` passes over but where the GPU has measured them to be the fastest: see dispatch.py.
NOT_BY_AUTO = {
    "conv2d_act": ("cuda", "triton"),
    # A launch for each tensor, where stock makes a few for all of them.
    "clip_weights_": ("triton",),
    "rmsprop_clip_": ("triton",),
}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run the call."""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found for one call.

    Attributes
    ----------
    op : str
        Name of the op.
    chosen : str or None
        Backend that runs it; None where the one asked for by name cannot.
    refused : dict of str to str
        Why each other backend does not run it.
    notes : tuple of str
        Of an op that is made of others, what runs each.
    """

    op: str
    chosen: str | None
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend'}", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.refused.items()])


class Later:
    """An adapter that is imported with the first tensors that it may run on: its packages are large and optional.

    Parameters
    ----------
    module : str
        Full name of the adapter's module.
    refuse : callable
        Why the backend cannot run on tensors, by what is known without the module; None if it may.
    """

    def __init__(self, module: str, refuse: Callable[..., str | None]) -> None:
        self._module, self._refuse = module, refuse
        self._imported: ModuleType | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Later) and other._module == self._module

    def __hash__(self) -> int:
        return hash(self._module)

    def _import(self) -> ModuleType:
        if self._imported is None:
            self._imported = importlib.import_module(self._module)
        return self._imported

    def refuse(self, *tensors: Tensor) -> str | None:
        reason = self._refuse(*tensors)
        if reason is not None:
            return reason
        own: Callable[..., str | None] = self._import().refuse
        return None if own is self._refuse else own(*tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._import(), name)


# The adapters of each op: {op: {backend: module}}; a module has refuse(*tensors) and the op's kernels.
_adapters: dict[str, dict[str, ModuleType | Later]] = {}
# What else an op has to tell of a call: {op: function of what was found and the call's arguments}.
_explainers: dict[str, Callable[..., Explanation]] = {}
# Functions that run another op's kernels: {function: op}.
_borrowed: dict[str, str] = {}
_default = "auto"
_override: ContextVar[str | None] = ContextVar("gankern_backend", default=None)
# Autograd's threads for a GPU have no context of Python's, but torch hands on to them what is kept here.
_INHERITED = "gankern_backend"
_announced: set[tuple[str, str]] = set()
_watchers: list[list[tuple[str, tuple[Tensor, ...]]]] = []


def register(op: str, **adapters: ModuleType | Later) -> None:
    """Make the adapters of an op known, by backend name."""
    _adapters[op] = adapters


def adapters(name: str) -> list[ModuleType | Later]:
    """Every op's adapter of one backend, each once."""
    _open_rooms()
    return list(dict.fromkeys(found[name] for found in _adapters.values() if name in found))


def adapter(op: str, name: str) -> ModuleType | Later:
    """An op's adapter of one backend."""
    return _adapters[op][name]


@cache
def _open_rooms() -> None:
    """Import every op's room, so that all are registered: what is not used yet is not imported yet."""
    importlib.import_module("gankern.ops")


def register_explainer(op: str, explainer: Callable[..., Explanation], kernels: str | None = None) -> None:
    """Let an op add to what :func:`explain` finds: ``explainer(found, *args, **kwargs)``.

    A function without kernels of its own names the op of which it runs them.
    """
    _explainers[op] = explainer
    if kernels is not None:
        _borrowed[op] = kernels


def _checked(name: str, origin: str) -> str:
    """The name, as an object that lasts."""
    for known in ("auto", *NAMES):
        if name == known:
            return known
    raise ValueError(f"{origin} must be one of auto, {', '.join(NAMES)}; got {name!r}")


def set_backend(name: str) -> None:
    """Choose the backend of every later call in the process.

    Parameters
    ----------
    name : str
        ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises
    ------
    ValueError
        If the name is none of these.
    """
    global _default
    _default = _checked(name, "name")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of the calls inside a ``with`` block.

    Parameters
    ----------
    name : str
        As for :func:`set_backend`. The choice holds for backward passes that run inside the block.

    Raises
    ------
    ValueError
        If the name is none of the known ones.
    """
    name = _checked(name, "name")
    token, before = _override.set(name), _inherited()
    hand_on(_INHERITED, name)
    try:
        yield
    finally:
        hand_on(_INHERITED, before)
        _override.reset(token)


def hand_on(key: str, value: str | bool | None) -> None:
    """Keep an object that lasts where torch hands it on to the threads of a backward pass."""
    # torch 2.11 gives up a reference that it has not taken.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


def _inherited() -> str | None:
    """The choice of the thread that called a backward pass, where autograd runs it in a thread of its own."""
    found = torch._C._get_obj_in_tls(_INHERITED) if torch._C._is_key_in_tls(_INHERITED) else None
    return found if isinstance(found, str) else None


def requested() -> str:
    """Name in force: the innermost :func:`backend` block, else :func:`set_backend`, else ``GANKERN_BACKEND``."""
    name = _override.get() or _inherited() or _default
    if name == "auto" and (given := os.environ.get("GANKERN_BACKEND")):
        name = _checked(given, "GANKERN_BACKEND")
    return name


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Tensor, ...]]]]:
    """Lists the ops that a block calls, with their tensors."""
    calls: list[tuple[str, tuple[Tensor, ...]]] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.remove(calls)


def refusal(op: str, name: str, *tensors: Tensor) -> str | None:
    """Why a backend cannot run an op on these tensors; None if it can."""
    if op not in _adapters:
        _open_rooms()
    adapter = _adapters[op].get(name)
    return f"{op} has no {name} kernels in this version" if adapter is None else adapter.refuse(*tensors)


def select(op: str, *tensors: Tensor) -> Any:
    """Adapter that runs an op on these tensors.

    Raises
    ------
    BackendUnavailable
        If a backend was asked for by name and cannot run the call.
    """
    for calls in _watchers:
        calls.append((op, tensors))
    name = requested()
    if name != "auto":
        reason = refusal(op, name, *tensors)
        if reason is not None:
            raise BackendUnavailable(f"backend {name!r} cannot run {op}: {reason}")
        return _adapters[op][name]
    for name in _in_order(op, tensors):
        if _adapters[op][name].refuse(*tensors) is None:
            if (op, name) not in _announced:
                _announced.add((op, name))
                logger.info("%s runs on backend %s", op, name)
            return _adapters[op][name]
    raise BackendUnavailable(f"no backend can run {op}")


def _in_order(op: str, tensors: Sequence[Tensor]) -> Sequence[str]:
    """The backends that ``auto`` tries, one after the other."""
    by_default = _by_default(op)
    if not tensors or tensors[0].device.type != "cuda":
        return by_default
    from gankern import dispatch

    measured = dispatch.fastest(op, *tensors)
    return by_default if measured not in _adapters[op] else [measured, *(n for n in by_default if n != measured)]


@cache
def _by_default(op: str) -> tuple[str, ...]:
    return tuple(n for n in NAMES if n in _adapters[op] and n not in NOT_BY_AUTO.get(op, ()))


@contextmanager
def wrapped(op: str, wrap: Callable[[ModuleType | Later], Any]) -> Iterator[None]:
    """Put something in the place of each adapter of an op, inside a ``with`` block."""
    before = _adapters[op]
    _adapters[op] = {name: wrap(adapter) for name, adapter in before.items()}
    try:
        yield
    finally:
        _adapters[op] = before


def explain_call(op: str, *tensors: Tensor) -> Explanation:
    """Choice and refusals for one op and its tensors, under the backend in force."""
    name = requested()
    refused = {n: r for n in NAMES if (r := refusal(op, n, *tensors)) is not None}
    if name != "auto":
        chosen = None if name in refused else name
        others = {n: f"backend {name!r} was asked for by name" for n in NAMES if n != name and n not in refused}
        return Explanation(op, chosen, refused | others)
    from gankern import dispatch

    if op in dispatch.BY_SIZE and tensors and dispatch.is_small(*tensors):
        small = {n: dispatch.SMALL for n in NAMES if n not in refused and n != "reference"}
        return Explanation(op, "reference", refused | small)
    order = _in_order(op, tensors)
    chosen = next(n for n in order if n not in refused)
    others = {n: f"{chosen} comes first" for n in NAMES if n != chosen and n not in refused}
    others |= {n: "not chosen by auto: not measured to be faster" for n in others if n not in order}
    return Explanation(op, chosen, refused | others)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tell which backend would run a call and why the others would not.

    Parameters
    ----------
    op : str or callable
        A public op or its name, e.g. ``gankern.ops.batch_norm_act`` or ``"batch_norm_act"``; or a
        :func:`gankern.step`, of whose calls so far it tells what ran them; or ``gankern.fuse``, with a fused module,
        for :func:`gankern.fusion_report` as text.
    *args, **kwargs
        Arguments of the call; its tensors decide.

    Returns
    -------
    Explanation
        For :func:`gankern.gradient_penalty` with its critic and images, a
        :class:`~gankern.ops.gradient_penalty.PenaltyExplanation`, which also tells what gankern takes of the critic.

    Raises
    ------
    ValueError
        If there is no op of that name.
    """
    own = getattr(op, "explain", None)
    if own is not None:
        found: Explanation = own()
        return found
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    _open_rooms()
    kernels = _borrowed.get(name, name)
    if kernels not in _adapters and name in _explainers:
        return _explainers[name](Explanation(name, None), *args, **kwargs)
    if kernels not in _adapters:
        known = ", ".join(sorted(_adapters.keys() | _borrowed.keys() | _explainers.keys()))
        raise ValueError(f"op must be one of {known}; got {name!r}")
    found = explain_call(kernels, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
    explainer = _explainers.get(name)
    return found if explainer is None else explainer(found, *args, **kwargs)
