"""Which way a call of a fused module goes: by a plan, as stock, or as stock whose parts may be planned."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gankern import dispatch
from gankern.arguments import first_line
from gankern.compiler import choice
from gankern.compiler.forward import ForwardPlan
from gankern.compiler.guards import is_hooked
from gankern.compiler.pointwise import pointwise_of
from gankern.compiler.refusal import Refused
from gankern.ops.gradient_penalty.choice import watched

log = logging.getLogger("gankern.compiler")

#: Plans that a module keeps, the last used first.
MOST_PLANS = 16
# Calls that plans must have run for each one more than these.
_HITS_A_PLAN = 200
_SLOW = 3.0


class Unplanned(Exception):
    """Stock runs a call.

    Attributes
    ----------
    whole : bool
        Whether the modules inside run stock, too.
    kind : hashable or None
        Under which stock's output is to be noted by :meth:`Plans.note`.
    """

    def __init__(self, whole: bool, kind: Any = None) -> None:
        super().__init__()
        self.whole, self.kind = whole, kind


@dataclass
class _Kind:
    """What is known of calls of one kind.

    Attributes
    ----------
    calls : int
        How often stock ran them.
    strides : tuple of int or None
        Of stock's output; None where that was no tensor, or another in each call.
    reason : str
        Why there is no plan; empty where none was tried.
    wait : int
        Calls until the next try; 0 before the first.
    """

    calls: int = 0
    strides: tuple[int, ...] | None = None
    reason: str = ""
    wait: int = 0


@dataclass
class Plans:
    """The plans of one fused module.

    Attributes
    ----------
    plans : list of ForwardPlan
        The last used first.
    kinds : dict
        What is known of each kind of call.
    hits, made, evicted : int
    idle : int
        Calls that stock runs without a look at them: a module that no plan pays for.
    reason : str or None
        Why stock ran the last call; None where a plan did, or is to be made of more calls like it.
    """

    plans: list[ForwardPlan] = field(default_factory=list)
    kinds: dict[Any, _Kind] = field(default_factory=dict)
    hits: int = 0
    made: int = 0
    evicted: int = 0
    idle: int = 0
    reason: str | None = None
    _lock: Any = field(default_factory=threading.RLock)

    def run(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The output by the plan for a call; a plan is made where calls of its kind have come before.

        Raises
        ------
        Unplanned
            Where stock is to run.
        """
        x = args[0] if args else None
        self.reason = _watched(x)
        if self.reason is not None:
            raise Unplanned(whole=False)
        call = {"critic": module, "x": x, "args": tuple(args[1:]), "kwargs": dict(kwargs)}
        for place, plan in enumerate(self.plans):
            try:
                output = plan(call)
            except Refused:
                # Another thread makes it, whose first replay tells as well.
                output = None
            if output is not None:
                self.hits += 1
                if place:
                    self._move_up(plan)
                return output
        kind = _kind_of(module, x, args, kwargs)
        known = self.kinds.setdefault(kind, _Kind())
        if len(self.kinds) > 4 * MOST_PLANS:
            self.kinds.pop(next(iter(self.kinds)))
        if known.calls < max(known.wait, choice.calls_first()) or (known.calls and known.strides is None):
            self.reason = known.reason or (_NO_TENSOR if known.calls and known.strides is None else None)
            raise Unplanned(whole=self.reason in (None, _NOTHING), kind=kind)
        with self._lock:
            plan = self._make(call, known, kind)
        try:
            output = plan(call)
        except Refused as error:
            self.plans.remove(plan)
            self._refuse(known, str(error), kind)
        if output is None:
            self.plans.remove(plan)
            self._refuse(known, "its guards do not hold for the call that they were made for", kind)
        return output

    def note(self, kind: Any, output: Any) -> None:
        """Learn from what stock returned."""
        known = self.kinds.get(kind)
        if known is None:
            return
        strides = output.stride() if type(output) is Tensor else None
        known.strides = strides if known.calls == 0 or known.strides == strides else None
        known.calls += 1

    def pointwise(self) -> str:
        """What runs between the kernels, where Inductor was asked for: of the plan that ran last."""
        parts = self.plans[0].parts if self.plans else []
        if not parts:
            return "torch: no neighbours to compile" if self.plans else "inductor"
        return next((f"torch: {part.reason}" for part in parts if part.reason), "inductor")

    def _move_up(self, plan: ForwardPlan) -> None:
        with self._lock:
            if plan in self.plans:
                self.plans.remove(plan)
                self.plans.insert(0, plan)

    def _make(self, call: dict[str, Any], known: _Kind, kind: Any) -> ForwardPlan:
        stale = [plan for plan in self.plans if plan.differentiated]
        for plan in stale:
            self.plans.remove(plan)
        if stale:
            self._refuse(known, "somebody differentiated its gradient", kind)
        if self.made >= MOST_PLANS + self.hits // _HITS_A_PLAN:
            self._refuse(known, "too few calls for each plan so far: what the forward reads changes too often", kind)
        begin = time.perf_counter()
        try:
            plan = ForwardPlan(call, known.strides, pointwise=pointwise_of(call["critic"]))
        except Refused as error:
            self._refuse(known, str(error), kind)
        except Exception as error:
            # Stock's own run says what is wrong with the call, if anything is.
            self._refuse(known, f"deriving it failed with {first_line(error)}", kind)
        if not plan.kernels and not plan.parts and not choice.is_everywhere():
            self._refuse(known, _NOTHING, kind)
        took = time.perf_counter() - begin
        log.log(logging.WARNING if took > _SLOW else logging.INFO, "planned a module in %.1f s", took)
        known.reason = ""
        self.plans.insert(0, plan)
        self.made += 1
        while len(self.plans) > MOST_PLANS:
            self.plans.pop()
            self.evicted += 1
        return plan

    def _refuse(self, known: _Kind, reason: str, kind: Any) -> NoReturn:
        """Leave calls of a kind to stock, twice as many each time: the world changes."""
        self.reason = known.reason = reason
        # Where nothing changes, to look again costs as much as thousands of calls.
        factor, most = (8, 1 << 20) if reason == _NOTHING else (2, 1 << 12)
        known.calls, known.wait = 0, min(max(factor * known.wait, 16), most)
        if reason == _NOTHING and not self.plans:
            self.idle = known.wait
        log.info("no plan: %s", reason)
        raise Unplanned(whole=reason == _NOTHING, kind=kind)


_NOTHING = "stock is as fast"
_NO_TENSOR = "its output is no tensor, or lies in memory otherwise each time"


def _watched(x: Any) -> str | None:
    """Why no plan may run now, whatever it is for."""
    if not isinstance(x, Tensor):
        return "its first argument is no tensor"
    if torch.is_inference_mode_enabled():
        return "inference mode"
    return "a hook on all modules" if is_hooked() else watched(x)


def _kind_of(module: nn.Module, x: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return (
        *(x.shape, x.stride(), x.dtype, x.device, x.requires_grad, torch.is_grad_enabled(), module.training),
        *(len(args), tuple(kwargs), dispatch.goes_by_size(x.device)),
    )


_plans: weakref.WeakKeyDictionary[nn.Module, Plans] = weakref.WeakKeyDictionary()


def known_plans(module: nn.Module) -> Plans | None:
    """The plans of a module; None where it was never called fused."""
    return _plans.get(module)


def plans_of(module: nn.Module) -> Plans:
    """The plans of a module, none at first."""
    found = _plans.get(module)
    return _plans.setdefault(module, Plans()) if found is None else found
