"""Plans of whole steps, found again by the calls that they are for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

from gankern._autograd import onlooker
from gankern.arguments import first_line
from gankern.backends import Explanation
from gankern.compiler import choice
from gankern.compiler.guards import is_hooked
from gankern.compiler.penalty import random_state, set_random_state
from gankern.compiler.refusal import Refused
from gankern.compiler.step import NotFinite, StepPlan
from gankern.compiler.strict import _TOLERANCES, differences

log = logging.getLogger("gankern.compiler")

#: Plans that a step keeps, the last used first.
MOST_PLANS = 16
# Seconds that plans may take to make, and one part in so many of the time since.
_FREE, _PART = 10.0, 50
_SLOW = 3.0
_MOST_KINDS = 64
_FOR_EVER = float("inf")
_NOT_FINITE = "values that are not finite"
# Calls without a look at them where there is no plan.
_RESTS = 32


@dataclass
class _Kind:
    """Calls of one kind: how many ran as they are, why, and when a plan is tried again."""

    calls: int = 0
    reason: str = ""
    again: float = 0.0


class Plans:
    """The plans of one step.

    Parameters
    ----------
    step : Step
        Whose ``idle`` tells how many calls to come are run as they are.
    """

    def __init__(self, step: Any) -> None:
        self._step = step
        self.plans: list[StepPlan] = []
        self.kinds: dict[Any, _Kind] = {}
        self.hits = self.made = self.evicted = self._since = 0
        #: Seconds that plans took to make.
        self.spent = 0.0
        self._born = time.monotonic()
        #: Why the last call ran as it is; empty where a plan ran it.
        self.reason = ""
        self._lock = threading.RLock()

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the step returns, by a plan where there is one for the call."""
        reason = _watched()
        if reason is not None:
            self.reason = reason
            return function(*args, **kwargs)
        try:
            for place, plan in enumerate(self.plans):
                ran, result = plan(function, args, kwargs)
                if ran:
                    self.hits += 1
                    self._since += 1
                    self.reason = ""
                    if place:
                        self._move_up(plan)
                    return result
        except NotFinite:
            self.reason = _NOT_FINITE
            return function(*args, **kwargs)
        kind = _kind_of(args, kwargs)
        known = self.kinds.setdefault(kind, _Kind())
        if len(self.kinds) > _MOST_KINDS:
            self.kinds.pop(next(iter(self.kinds)))
        if known.calls < choice.calls_first() or (known.reason and time.monotonic() < known.again):
            known.calls += 1
            self.reason = known.reason or "too few calls so far"
            if known.reason:
                self._rest()
            return function(*args, **kwargs)
        with self._lock:
            new = self._make(known, function, args, kwargs)
            if new is not None:
                return self._first(new, known, function, args, kwargs)
        return function(*args, **kwargs)

    def _move_up(self, plan: StepPlan) -> None:
        with self._lock:
            if plan in self.plans:
                self.plans.remove(plan)
                self.plans.insert(0, plan)

    def _make(self, known: _Kind, function: Callable[..., Any], args: Any, kwargs: Any) -> StepPlan | None:
        if self.spent > _FREE + (time.monotonic() - self._born) / _PART and not choice.is_everywhere():
            self._refuse(known, "too few calls for each plan so far: what the step reads changes too often", _SLOW)
            return None
        begin, reason = time.perf_counter(), ""
        try:
            plan = StepPlan(function, args, kwargs)
            if not choice.step_pays(plan.largest, plan.device, plan.is_second_order):
                reason = "stock is as fast: its tensors are large, or it takes no penalty"
        except Refused as error:
            reason = str(error)
        except Exception as error:
            # The step's own run says what is wrong with the call, if anything is.
            reason = f"deriving it failed with {first_line(error)}"
        took = time.perf_counter() - begin
        self.spent += took
        if reason:
            self._refuse(known, reason, took)
            return None
        log.log(logging.WARNING if took > _SLOW else logging.INFO, "planned a step in %.1f s", took)
        return plan

    def _refuse(self, known: _Kind, reason: str, took: float = 0.0) -> None:
        """Leave calls of a kind as they are for so long that another try costs a hundredth: the world changes."""
        known.reason = self.reason = reason
        known.again = time.monotonic() + 100 * took
        self._rest()
        log.info("no plan for a step: %s", reason)

    def _rest(self) -> None:
        """Look at no call for a while, where no plan has run one since the last rest."""
        if not self._since:
            self._step.idle = _RESTS
        self._since = 0

    def _first(self, plan: StepPlan, known: _Kind, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The step's own result, and state; the plan is kept where it gave the same from the same state."""
        found = plan.world(function, args, kwargs)
        if found is None:
            self._refuse(known, "its guards do not hold for the call that they were made for")
            return function(*args, **kwargs)
        world = World(*found, args, kwargs)
        failed = ""
        ours: dict[str, Any] = {}
        try:
            _, result = plan(function, args, kwargs)
            ours = world.named(result)
        except NotFinite:
            failed = _NOT_FINITE
        except Exception as error:
            failed = f"its replay failed with {first_line(error)}"
        random = random_state(world.device)
        world.restore()
        result = function(*args, **kwargs)
        if not failed:
            failed = _apart(ours, world.named(result))
            if not failed and not all(map(torch.equal, random, random_state(world.device))):
                failed = "it differed from the step's own run: the random numbers to come"
        if failed:
            log.warning("no plan for a step: %s", failed)
            self._refuse(known, failed, 0.1 if failed == _NOT_FINITE else _FOR_EVER)
            return result
        known.reason = self.reason = ""
        self.plans.insert(0, plan)
        self.made += 1
        while len(self.plans) > MOST_PLANS:
            self.plans.pop()
            self.evicted += 1
        return result

    def explain(self, name: str) -> Explanation:
        counts = f"{self.made} plans made, {self.hits} hits, {self.evicted} evicted"
        sizes = [f"a program of {p.size[1]} calls, {p.size[0]} before the passes" for p in self.plans[:1]]
        others = dict.fromkeys(k.reason for k in self.kinds.values() if k.reason and k.reason != self.reason)
        notes = (counts, *sizes, *(f"none for some calls: {reason}" for reason in others))
        return Explanation(
            name, "python" if self.reason else "plan", {"plan": self.reason} if self.reason else {}, notes=notes
        )


def _watched() -> str | None:
    """Why no plan may run now, whatever it is for."""
    if torch.is_inference_mode_enabled():
        return "inference mode"
    if is_hooked():
        return "a hook on all modules"
    if torch.is_anomaly_enabled():
        return "anomaly detection"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return onlooker()


def _kind_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    return (
        *((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors),
        *(len(args), tuple(kwargs), torch.is_grad_enabled()),
    )


class World:
    """What a step may change, as it is now.

    Parameters
    ----------
    tensors : sequence of Tensor
    things : sequence
        Optimizers, of what runs as itself.
    args, kwargs
        Of the call.
    """

    def __init__(self, tensors: Sequence[Tensor], things: Sequence[Any], args: Any, kwargs: Any) -> None:
        self._optimizers = [t for t in things if isinstance(t, Optimizer)]
        stepped = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        modules = [p for m in things if isinstance(m, torch.nn.Module) for p in m.parameters()]
        known = {id(t): t for t in (*tensors, *stepped, *given, *modules)}
        self._tensors = list(known.values())
        self._stepped = {id(p) for p in stepped}
        self.device = next((t.device for t in tensors if t.device.type == "cuda"), tensors[0].device)
        self._random = random_state(self.device)
        self._before = [(t.detach().clone(), t.requires_grad, t.grad if t.is_leaf else None) for t in self._tensors]
        self._grads = [None if g is None else g.detach().clone() for _, _, g in self._before]
        self._states = [_copied(o) for o in self._optimizers]

    def restore(self) -> None:
        """Make everything as it was."""
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self._tensors)):
            for t, (value, requires_grad, grad), kept in zip(self._tensors, self._before, self._grads, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)
                if t.is_leaf:
                    t.requires_grad_(requires_grad)
                    if grad is not None:
                        grad.copy_(kept)
                    t.grad = grad
        for optimizer, (state, groups) in zip(self._optimizers, self._states, strict=True):
            _put_back(optimizer, state, groups)
        set_random_state(self.device, self._random)

    def named(self, result: Any) -> dict[str, Any]:
        """Copies of all that a run gave and left."""
        found: dict[str, Any] = {}
        for i, leaf in enumerate(pytree.tree_leaves(result)):
            leaf = torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf
            found[f"result {i}"] = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        for i, t in enumerate(self._tensors):
            # What rounding leaves of a gradient that is zero becomes a whole step of Adam's.
            if id(t) not in self._stepped:
                found[f"tensor {i}"] = t.detach().clone()
            found[f"gradient {i}"] = t.grad.detach().clone() if t.is_leaf and t.grad is not None else None
            found[f"flag {i}"] = t.requires_grad
        return found


def _copied(optimizer: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    state = {
        p: {k: (v, v.detach().clone() if isinstance(v, Tensor) else None) for k, v in own.items()}
        for p, own in optimizer.state.items()
    }
    return state, [dict(group) for group in optimizer.param_groups]


def _put_back(optimizer: Any, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    for p in [p for p in optimizer.state if p not in state]:
        del optimizer.state[p]
    with torch.no_grad():
        for p, own in state.items():
            now = optimizer.state[p]
            now.clear()
            for name, (value, copy) in own.items():
                if copy is not None:
                    value.copy_(copy)
                now[name] = value
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)


def _apart(got: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """What differs by more than rounding; empty where nothing does."""
    if got.keys() != want.keys():
        return "it returned another number of values than the step's own run"
    tensors = {k: v for k, v in want.items() if isinstance(v, Tensor)}
    told = [k for k, v in want.items() if k not in tensors and (type(got[k]) is not type(v) or got[k] != v)]
    for name, v in tensors.items():
        ours = got[name]
        if not isinstance(ours, Tensor) or (ours.shape, ours.dtype, ours.stride()) != (v.shape, v.dtype, v.stride()):
            told.append(name)
    both = {k: v for k, v in tensors.items() if k not in told}
    numbers = [v.dtype for v in both.values() if v.is_floating_point()]
    coarsest = max(numbers, key=lambda d: torch.finfo(d).eps, default=torch.float64)
    told += differences({k: got[k] for k in both}, both, _TOLERANCES.get(coarsest, 1.0))
    return f"it differed from the step's own run: {', '.join(told[:5])}" if told else ""
