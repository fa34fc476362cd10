"""Plans that were made, found again by the calls that they are for."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gankern import compiler
from gankern.arguments import first_line
from gankern.compiler.guards import is_hooked
from gankern.compiler.penalty import PenaltyPlan, Result, is_capturing
from gankern.compiler.refusal import Refused
from gankern.compiler.strict import first_call

log = logging.getLogger("gankern.compiler")

#: Plans that a critic keeps, the last used first.
MOST_PLANS = 16
# Calls that plans must have run for each one more than these: to make one takes as long as hundreds of stock's calls.
_HITS_A_PLAN = 200
# Calls of a kind whose plan was wrong that get no other.
_FOR_EVER = sys.maxsize
# A first call that takes longer is announced.
_SLOW = 3.0


@dataclass
class _Refusal:
    """A kind of call that got no plan; tried again after twice as many calls each time, since the world changes."""

    reason: str
    wait: int = 1
    calls: int = 0


@dataclass
class Plans:
    """The plans of one critic.

    Attributes
    ----------
    plans : list of PenaltyPlan
        The last used first.
    refused : dict
        Reasons by the kind of call.
    hits, made, evicted : int
    """

    plans: list[PenaltyPlan] = field(default_factory=list)
    refused: dict[Any, _Refusal] = field(default_factory=dict)
    hits: int = 0
    made: int = 0
    evicted: int = 0
    _lock: Any = field(default_factory=threading.RLock)

    def run(
        self, call: dict[str, Any], wants: bool, wants_points: bool, options: tuple[float, float, bool, bool]
    ) -> Result:
        """Loss and gradients by the plan for a call, made first where there is none.

        Raises
        ------
        Refused
            Where there can be none.
        """
        if is_hooked():
            raise Refused("a hook on all modules")
        strict = compiler.is_strict() and not is_capturing(call["x"].device)
        for place, plan in enumerate(self.plans):
            ask = self._compare if strict and not plan.compared else PenaltyPlan.__call__
            result = ask(plan, call, wants, wants_points, options)
            if result is not None:
                self.hits += 1
                if place:
                    self._move_up(plan)
                return result
        with self._lock:
            plan = self._make(call, wants, wants_points)
        try:
            ask = self._compare if strict else PenaltyPlan.__call__
            result = ask(plan, call, wants, wants_points, options)
        except Refused as error:
            if plan.failed:
                self._drop(plan, call, wants, wants_points, str(error))
            raise
        if result is None:
            raise Refused("its guards do not hold for the call that they were made for")
        return result

    def _compare(
        self, plan: PenaltyPlan, call: dict[str, Any], wants: bool, wants_points: bool, options: Any
    ) -> Result | None:
        """The result of a plan's first call; where that is not stock's, stock's, and the plan is dropped."""
        result, apart = first_call(plan, call, wants, wants_points, options)
        if apart:
            log.error("the plan of %s differs from stock: %s; stock runs", _name_of(call["critic"]), apart)
            self._drop(plan, call, wants, wants_points, f"it differed from stock: {apart}", wait=_FOR_EVER)
        return result

    def _drop(
        self, plan: PenaltyPlan, call: dict[str, Any], wants: bool, wants_points: bool, reason: str, wait: int = 0
    ) -> None:
        with self._lock:
            if plan in self.plans:
                self.plans.remove(plan)
            self._note(call, wants, wants_points, reason, wait)

    def __str__(self) -> str:
        counts = f"{self.made} made, {self.hits} hits, {self.evicted} evicted"
        reasons = [f"; none for some calls: {r.reason}" for r in self.refused.values()]
        return counts + "".join(dict.fromkeys(reasons))

    def _move_up(self, plan: PenaltyPlan) -> None:
        with self._lock:
            if plan in self.plans:
                self.plans.remove(plan)
                self.plans.insert(0, plan)

    def _make(self, call: dict[str, Any], wants: bool, wants_points: bool) -> PenaltyPlan:
        key = _kind_of(call, wants, wants_points)
        refusal = self.refused.get(key)
        if refusal is not None:
            refusal.calls += 1
            if refusal.calls < refusal.wait:
                raise Refused(refusal.reason)
        if self.made >= MOST_PLANS + self.hits // _HITS_A_PLAN:
            reason = "too few calls for each plan so far: what the forward reads changes too often"
            self._note(call, wants, wants_points, reason)
            raise Refused(reason)
        begin = time.perf_counter()
        try:
            plan = PenaltyPlan(call, wants, wants_points)
        except Refused as error:
            self._note(call, wants, wants_points, str(error))
            raise
        except Exception as error:
            # Stock's own run says what is wrong with the call, if anything is.
            reason = f"deriving it failed with {first_line(error)}"
            self._note(call, wants, wants_points, reason)
            raise Refused(reason) from None
        took = time.perf_counter() - begin
        name = _name_of(call["critic"])
        log.log(logging.WARNING if took > _SLOW else logging.INFO, "planned a penalty of %s in %.1f s", name, took)
        self.refused.pop(key, None)
        self.plans.insert(0, plan)
        self.made += 1
        while len(self.plans) > MOST_PLANS:
            self.plans.pop()
            self.evicted += 1
            log.info("evicted the plan of %s that was used least recently: it keeps %d", name, MOST_PLANS)
        return plan

    def _note(self, call: dict[str, Any], wants: bool, wants_points: bool, reason: str, wait: int = 0) -> None:
        refusal = self.refused.setdefault(_kind_of(call, wants, wants_points), _Refusal(reason))
        refusal.reason, refusal.calls, refusal.wait = reason, 0, wait or min(2 * refusal.wait, 1 << 12)
        if len(self.refused) > MOST_PLANS:
            self.refused.pop(next(iter(self.refused)))
        log.info("no plan for a penalty of %s: %s", _name_of(call["critic"]), reason)


def _name_of(critic: Any) -> str:
    """How messages call a critic."""
    return str(critic.__qualname__ if isinstance(critic, types.FunctionType) else type(critic).__qualname__)


def _kind_of(call: dict[str, Any], wants: bool, wants_points: bool) -> Any:
    x = call["x"]
    return x.shape, x.stride(), x.dtype, x.device, wants, wants_points


_plans: weakref.WeakKeyDictionary[nn.Module | types.CodeType, Plans] = weakref.WeakKeyDictionary()


def _owner(critic: Any) -> nn.Module | types.CodeType | None:
    """What a critic's plans are kept for: a module, or the code of a function."""
    owner = critic.__code__ if isinstance(critic, types.FunctionType) else critic
    return owner if isinstance(owner, nn.Module | types.CodeType) else None


def known_plans(critic: Any) -> Plans | None:
    """The plans that were made of a critic, or refused; None where it was never asked for one."""
    owner = _owner(critic)
    return None if owner is None else _plans.get(owner)


def plans_of(critic: Callable[..., Any]) -> Plans:
    """The plans of a module, or of all functions with one code.

    Raises
    ------
    Refused
        For other callables.
    """
    owner = _owner(critic)
    if owner is None:
        raise Refused(f"a critic that is a {type(critic).__name__}")
    found = _plans.get(owner)
    if found is None:
        found = _plans.setdefault(owner, Plans())
    return found
