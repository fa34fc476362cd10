"""Plans that were made, found again by the calls that they are for: of fused modules, penalties and whole steps."""

from __future__ import annotations

import logging
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from gankern import compiler
from gankern.arguments import first_line
from gankern.compiler import origins, strict
from gankern.compiler.guards import is_hooked
from gankern.compiler.penalty import PenaltyPlan, Result, is_capturing
from gankern.compiler.refusal import Refused
from gankern.compiler.report import Call, calls_of

log = logging.getLogger("gankern.compiler")

#: Plans that a module or critic keeps, the last used first.
MOST_PLANS = 16
# Calls that plans must have run for each one more than these: to make one takes as long as hundreds of stock's calls.
_HITS_A_PLAN = 200
# Calls of a kind that got no plan, or lost it, until the next try: twice as many each time, since the world changes.
_FIRST_WAIT, _LAST_WAIT, _FOR_EVER = 16, 1 << 12, sys.maxsize
#: Why no plan pays. Where nothing changes, to look again costs as much as thousands of calls.
NOTHING = "stock is as fast"
# A first call that takes longer is announced.
_SLOW = 3.0


@dataclass
class Kind:
    """What is known of calls of one kind, as far as no plan ran them.

    Attributes
    ----------
    calls : int
        How often stock ran them since a plan was tried.
    wait : int
        Calls until the next try; 0 before the first.
    reason : str
        Why there is no plan; empty where none was tried.
    took, again : float
        Seconds that the last try took, and the moment before which there is no other.
    strides : tuple of int or None
        Of stock's output; None where that was no tensor, or another in each call.
    """

    calls: int = 0
    wait: int = 0
    reason: str = ""
    took: float = 0.0
    again: float = 0.0
    strides: tuple[int, ...] | None = None

    @property
    def waits(self) -> bool:
        """Whether it is too early for another try."""
        return self.calls < self.wait or time.monotonic() < self.again

    def note(self, output: Any) -> None:
        """Learn from what stock returned."""
        strides = output.stride() if type(output) is Tensor else None
        self.strides = strides if self.calls == 0 or self.strides == strides else None
        self.calls += 1


#: Those that are in use.
CACHES: weakref.WeakSet[Cache] = weakref.WeakSet()


@dataclass(eq=False)
class Cache:
    """The plans of one owner: a bounded number, for the last used kinds of calls.

    A plan is a callable of a call, a dict, and of what else there is to say about it: its result is None where it is
    for other calls. It has `given_up`, a reason from when it may not run any more, and `compared`, which says how it
    did beside stock.

    Attributes
    ----------
    plans : list
        The last used first.
    kinds : dict
        What is known of each kind of call.
    hits, made, evicted : int
    """

    plans: list[Any] = field(default_factory=list)
    kinds: dict[Any, Kind] = field(default_factory=dict)
    hits: int = 0
    made: int = 0
    evicted: int = 0
    _lock: Any = field(default_factory=threading.RLock)
    _making: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        CACHES.add(self)

    #: How messages call what is planned.
    what: ClassVar[str]
    #: Tries of a kind are apart by so many times as long as one takes.
    patience: ClassVar[float] = 0.0
    #: Plans that are made before any has paid.
    free: ClassVar[int] = MOST_PLANS
    #: The result of a plan whose first call it is, and in words how that differs from stock's.
    beside_stock: ClassVar[Callable[..., tuple[Any, str]]]

    def kind_of(self, call: dict[str, Any], *how: Any) -> Any:
        """What plans are refused by: calls that are alike."""
        raise NotImplementedError

    def plan_for(self, known: Kind, call: dict[str, Any], *how: Any) -> Any:
        """A new plan.

        Raises
        ------
        Refused
        """
        raise NotImplementedError

    def ask(self, strictly: bool, call: dict[str, Any], *how: Any) -> Any:
        """The result of the plan for a call; None where there is none.

        Raises
        ------
        Refused
            Where the plan for it cannot run it.
        """
        for place, plan in enumerate(self.plans):
            result = self._compare(plan, call, *how) if strictly and not plan.compared else plan(call, *how)
            if result is not None:
                self.hits += 1
                if place:
                    self._move_up(plan)
                return result
        return None

    def known(self, call: dict[str, Any], *how: Any) -> Kind:
        """What is known of the kind of a call."""
        known = self.kinds.setdefault(self.kind_of(call, *how), Kind())
        if len(self.kinds) > 4 * MOST_PLANS:
            self.kinds.pop(next(iter(self.kinds)), None)
        return known

    def first(self, known: Kind, strictly: bool, call: dict[str, Any], *how: Any) -> Any:
        """The result of a plan that is made for a call.

        Raises
        ------
        Refused
            Where there can be none; the reason is kept. Or while another thread makes one.
        """
        if not self._making.acquire(blocking=False):
            raise Refused("another thread makes a plan")
        try:
            # That thread may have made it since this one has asked.
            made = self.ask(strictly, call, *how)
            if made is not None:
                return made
            plan = self._make(known, call, *how)
        finally:
            self._making.release()
        try:
            result = self._compare(plan, call, *how) if strictly else plan(call, *how)
        except Refused:
            if plan.given_up:
                self._drop(plan, call, plan.given_up)
            raise
        if result is None:
            self._drop(plan, call, "its guards do not hold for the call that they were made for")
            raise Refused(known.reason)
        return result

    @property
    def calls(self) -> tuple[Call, ...]:
        """What the plan that ran last calls."""
        return tuple(calls_of(self.plans[0])) if self.plans else ()

    def __str__(self) -> str:
        counts = f"{self.made} made, {self.hits} hits, {self.evicted} evicted"
        reasons = [f"; none for some calls: {known.reason}" for known in self.kinds.values() if known.reason]
        return counts + "".join(dict.fromkeys(reasons))

    def _compare(self, plan: Any, call: dict[str, Any], *how: Any) -> Any:
        """The result of a plan that is not compared yet; refused, and the plan dropped, where that is not stock's."""
        result, apart = self.beside_stock(plan, call, *how)
        if apart:
            log.error("the plan of %s differs from stock: %s; stock runs", name_of(call["critic"]), apart)
            self._drop(plan, call, f"it differed from stock: {apart}", _FOR_EVER)
            raise Refused(plan.known.reason)
        return result

    def _drop(self, plan: Any, call: dict[str, Any], reason: str, wait: int = 0) -> None:
        with self._lock:
            if plan in self.plans:
                self.plans.remove(plan)
            self._note(plan.known, call, reason, wait)

    def _move_up(self, plan: Any) -> None:
        with self._lock:
            if plan in self.plans:
                self.plans.remove(plan)
                self.plans.insert(0, plan)

    def _make(self, known: Kind, call: dict[str, Any], *how: Any) -> Any:
        for plan in [plan for plan in self.plans if plan.given_up]:
            self._drop(plan, call, plan.given_up, _FOR_EVER if plan.compared == strict.DIFFERS else 0)
        if known.waits:
            raise Refused(known.reason)
        begin = time.perf_counter()
        try:
            if self.made >= self.free + self.hits // _HITS_A_PLAN:
                raise Refused("too few calls for each plan so far: what the forward reads changes too often")
            plan = self.plan_for(known, call, *how)
        except Exception as error:
            # Stock's own run says what is wrong with the call, if anything is.
            told = str(error) if isinstance(error, Refused) else f"deriving it failed with {first_line(error)}"
            told += origins.at(error)
            known.took = time.perf_counter() - begin
            self._note(known, call, told)
            raise Refused(told) from None
        took, name = time.perf_counter() - begin, name_of(call["critic"])
        known.took = took
        log.log(logging.WARNING if took > _SLOW else logging.INFO, "planned %s of %s in %.1f s", self.what, name, took)
        known.reason, plan.known = "", known
        with self._lock:
            self.plans.insert(0, plan)
            self.made += 1
            evicted = len(self.plans) - MOST_PLANS
            self.evicted += max(evicted, 0)
            del self.plans[MOST_PLANS:]
        if evicted > 0:
            log.info("evicted the plan of %s that was used least recently: it keeps %d", name, MOST_PLANS)
        return plan

    def _note(self, known: Kind, call: dict[str, Any], reason: str, wait: int = 0) -> None:
        known.reason, known.calls = reason, 0
        factor, most = (8, 1 << 20) if reason == NOTHING else (2, _LAST_WAIT)
        known.wait = wait or min(max(factor * known.wait, _FIRST_WAIT), most)
        known.again = time.monotonic() + self.patience * known.took
        log.info("no plan for %s of %s: %s", self.what, name_of(call["critic"]), reason)


def name_of(critic: Any) -> str:
    """How messages call a critic."""
    return str(critic.__qualname__ if isinstance(critic, types.FunctionType) else type(critic).__qualname__)


class Plans(Cache):
    """The plans of a critic's penalties; a call goes with whether gradients are wanted, and one of the points."""

    what = "a penalty"
    beside_stock = staticmethod(strict.penalty)

    def run(
        self, call: dict[str, Any], wants: bool, wants_points: bool, options: tuple[float, float, bool, bool]
    ) -> Result:
        """Loss and gradients by the plan for a call, made first where there is none.

        Raises
        ------
        Refused
            Where there can be none, or it differs from stock.
        """
        strictly = compiler.is_strict() and not is_capturing(call["x"].device)
        result: Result | None = self.ask(strictly, call, wants, wants_points, options)
        if result is not None:
            return result
        if is_hooked():
            raise Refused("a hook on all modules")
        known = self.known(call, wants, wants_points)
        if known.waits:
            known.calls += 1
            raise Refused(known.reason)
        result = self.first(known, strictly, call, wants, wants_points, options)
        assert result is not None
        return result

    def kind_of(self, call: dict[str, Any], *how: Any) -> Any:
        x = call["x"]
        return x.shape, x.stride(), x.dtype, x.device, *how[:2]

    def plan_for(self, known: Kind, call: dict[str, Any], *how: Any) -> PenaltyPlan:
        return PenaltyPlan(call, *how[:2])


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
