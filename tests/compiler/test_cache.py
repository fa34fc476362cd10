"""One cache for all plans: bounded, the last used first, and patient where there is none."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from gankern.compiler import cache, fused, steps
from gankern.compiler.cache import MOST_PLANS, Cache, Kind
from gankern.compiler.refusal import Refused


class Plan:
    """For calls of one number; gives it."""

    given_up = compared = ""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, call: dict[str, Any]) -> int | None:
        return self.number if call["x"] == self.number and not self.given_up else None


class Numbers(Cache):
    what = "a number"
    beside_stock = staticmethod(lambda plan, call: (plan(call), "by one"))
    make: Callable[[int], Any] = Plan

    def kind_of(self, call: dict[str, Any], *how: Any) -> Any:
        return call["x"]

    def plan_for(self, known: Kind, call: dict[str, Any], *how: Any) -> Any:
        return self.make(call["x"])

    def run(self, number: int, strictly: bool = False) -> Any:
        call = {"critic": torch.nn.Identity(), "x": number}
        found = self.ask(strictly, call)
        return self.first(self.known(call), strictly, call) if found is None else found


def test_all_kinds_of_plans_are_kept_in_it() -> None:
    assert all(issubclass(kind.Plans, Cache) for kind in (cache, fused, steps))


def test_the_plan_used_least_recently_goes_first() -> None:
    plans = Numbers(hits=10_000)
    for number in range(MOST_PLANS):
        assert plans.run(number) == number
    assert (plans.made, plans.hits, plans.evicted) == (MOST_PLANS, 10_000, 0)
    plans.run(0)
    plans.run(MOST_PLANS)
    assert {plan.number for plan in plans.plans} == {0, *range(2, MOST_PLANS + 1)}
    assert (plans.made, plans.hits, plans.evicted) == (MOST_PLANS + 1, 10_001, 1)
    assert str(plans) == f"{MOST_PLANS + 1} made, 10001 hits, 1 evicted"


def test_too_many_plans_for_too_few_calls_are_not_made() -> None:
    plans = Numbers()
    for number in range(MOST_PLANS):
        plans.run(number)
    with pytest.raises(Refused, match="changes too often"):
        plans.run(MOST_PLANS)
    assert plans.made == MOST_PLANS and "changes too often" in str(plans)


def test_a_refused_kind_waits_twice_as_long_each_time_and_others_do_not() -> None:
    plans, tried = Numbers(), []

    def refuse(number: int) -> Plan:
        tried.append(number)
        raise Refused("it is odd") if number % 2 else ZeroDivisionError("so it is")

    plans.make = refuse
    with pytest.raises(Refused, match="it is odd"):
        plans.run(1)
    with pytest.raises(Refused, match="deriving it failed with ZeroDivisionError: so it is"):
        plans.run(2)
    known = plans.kinds[1]
    assert known.reason.startswith("it is odd") and (known.calls, known.wait) == (0, 16)
    with pytest.raises(Refused, match="it is odd"):
        plans.run(1)
    assert tried == [1, 2]
    known.calls = 16
    with pytest.raises(Refused, match="it is odd"):
        plans.run(1)
    assert tried == [1, 2, 1] and (known.calls, known.wait) == (0, 32)
    plans.make, known.calls = Plan, 32
    assert plans.run(1) == 1 and "odd" not in str(plans)


def test_a_plan_that_is_given_up_goes_and_its_kind_waits() -> None:
    plans = Numbers()
    plans.run(1), plans.run(2)
    (two, one) = plans.plans
    one.given_up = "somebody differentiated its gradient"
    assert plans.run(3) == 3 and plans.plans[1:] == [two]
    with pytest.raises(Refused, match="differentiated"):
        plans.run(1)


def test_a_plan_that_differs_is_never_made_again() -> None:
    plans = Numbers()
    with pytest.raises(Refused, match="it differed from stock: by one"):
        plans.run(1, strictly=True)
    plans.kinds[1].calls = 1 << 20
    with pytest.raises(Refused, match="it differed from stock: by one"):
        plans.run(1)
    assert not plans.plans


def test_dead_caches_are_not_watched() -> None:
    plans = Numbers()
    assert plans in cache.CACHES
    del plans
    gc.collect()
    assert not any(isinstance(found, Numbers) for found in cache.CACHES)


def test_of_two_threads_that_ask_at_once_one_makes_the_plan() -> None:
    """The other one's call is stock's; and where it came too late to know, the plan is not made again."""
    plans, begun, done = Numbers(), threading.Event(), threading.Event()
    made: list[int] = []

    def make(number: int) -> Plan:
        made.append(number)
        begun.set()
        assert done.wait(10)
        return Plan(number)

    plans.make = make
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(plans.run, 1)
        assert begun.wait(10)
        with pytest.raises(Refused, match="another thread makes a plan"):
            plans.run(1)
        assert not plans.kinds[1].reason
        done.set()
        assert first.result() == 1
    call = {"critic": torch.nn.Identity(), "x": 1}
    # As if it had asked before.
    assert plans.first(plans.known(call), False, call) == 1
    assert (made, plans.made, len(plans.plans)) == ([1], 1, 1)
