from __future__ import annotations

import pytest
import torch
from bench.fakes import Clock

from gankern.bench.timing import MIN_LONG_ROUNDS, MIN_ROUNDS, Spread, calls_per_sample, peak_memory, ratio, rounds


def test_rounds_run_the_sides_in_turn():
    clock = Clock()
    times = rounds({"a": clock.work("a", 2.0), "b": clock.work("b", 1.0)}, 3, calls=2, clock=clock)
    assert clock.order == ["a", "a", "b", "b"] * 3
    assert times == {"a": [2.0] * 3, "b": [1.0] * 3}


def test_rounds_end_when_the_budget_is_spent_but_not_before_the_least_number():
    clock = Clock()
    sides = {"a": clock.work("a", 1.0)}
    assert len(rounds(sides, 100, budget=8.0, clock=clock)["a"]) == 9
    assert len(rounds(sides, 100, budget=0.7, clock=clock)["a"]) == MIN_ROUNDS
    assert len(rounds(sides, 100, budget=0.01, clock=clock)["a"]) == MIN_LONG_ROUNDS


def test_ratio_is_the_median_over_rounds_of_the_fastest_on_either_side():
    times = {"eager": [9.0] * 3, "compile": [2.0, 6.0, 3.0], "ours": [1.0, 2.0, 3.0], "ours too": [4.0] * 3}
    best, ours, spread = ratio(times, ["ours too", "ours"])
    assert (best, ours) == ("compile", "ours")
    assert spread.median == 2.0
    assert spread.p20 == pytest.approx(1.4)
    assert spread.p80 == pytest.approx(2.6)


def test_spread_of_one_value():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_short_work_is_called_several_times_a_sample():
    clock = Clock()
    assert calls_per_sample({"a": clock.work("a", 2**-10), "b": clock.work("b", 1.0)}, clock=clock) == 3
    clock.order.clear()
    assert calls_per_sample({"b": clock.work("b", 1.0)}, clock=clock) == 1
    assert clock.order == ["b"]


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    if peak_memory(lambda: None) is None:
        pytest.skip("no resettable high-water mark here")
    mebibytes = 64
    peak = peak_memory(lambda: torch.ones(mebibytes, 1024, 256).sum())
    assert peak == pytest.approx(mebibytes * 2**20, rel=0.1)
    assert peak_memory(lambda: None) < 2**20
