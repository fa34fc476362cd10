from __future__ import annotations

import torch
from bench.fakes import Clock, case

from gankern.bench.check import Results
from gankern.bench.measure import run_case


def test_ratio_memory_and_work_of_a_right_case():
    clock = Clock()
    result = run_case(case(clock), repeat=4, budget=1e9, clock=clock)
    assert (result.status, result.best, result.ratio.median) == ("ok", "compile", 2.0)
    assert result.sides["gankern"].seconds.median == 1.0
    assert (result.rounds, result.calls, result.work, result.unit) == (4, 1, 3, "elements")
    assert result.error == 0
    assert result.left_out == {"cdist": "no second derivative"}


def test_sides_are_checked_before_any_is_timed_and_interleaved_after():
    clock = Clock()
    run_case(case(clock), repeat=2, clock=clock)
    checks = ["reference", "gankern", "eager", "compile"]
    turns = ["eager", "compile", "gankern"]
    assert clock.order == checks + 4 * turns + turns


def test_a_wrong_case_has_no_time():
    clock = Clock()
    result = run_case(case(clock, ours=1.5), clock=clock)
    assert result.status == "wrong"
    assert "output" in result.message
    assert result.sides == {}
    assert result.ratio is None
    assert clock.order == ["reference", "gankern"]


def test_stock_variants_that_fail_or_are_wrong_are_left_out_with_the_reason():
    def broken() -> Results:
        raise RuntimeError("no compiler\nlong story")

    clock = Clock()
    stock = {"eager": clock.work("eager", 2.0), "compile": broken, "foreach": clock.work("foreach", 1.0, result=7.0)}
    result = run_case(case(clock, **stock), clock=clock)
    assert result.best == "eager"
    assert result.left_out["compile"] == "RuntimeError: no compiler"
    assert "output" in result.left_out["foreach"]


def test_against_picks_the_variants():
    clock = Clock()
    assert set(run_case(case(clock), against=["eager"], clock=clock).sides) == {"eager", "gankern"}
    nothing = run_case(case(clock), against=["foreach"], clock=clock)
    assert (nothing.status, nothing.message) == ("skipped", "no stock variant to compare with")


def test_without_leaves_variants_out_with_the_reason():
    clock = Clock()
    result = run_case(case(clock), without={"compile": "too slow"}, clock=clock)
    assert set(result.sides) == {"eager", "gankern"}
    assert result.left_out["compile"] == "too slow"
    assert "compile" not in clock.order


def test_a_failing_case_is_reported_and_a_foreign_dtype_is_skipped():
    clock = Clock()
    broken = case(clock)
    object.__setattr__(broken, "setup", lambda *args: 1 / 0)
    assert run_case(broken, clock=clock).status == "failed"
    assert run_case(case(clock), dtype=torch.float16, clock=clock).status == "skipped"


def test_batch_replaces_the_batch_size():
    clock = Clock()
    assert run_case(case(clock), batch=7, clock=clock).size == {"batch": 7}
    assert run_case(case(clock), tiny=True, clock=clock).size == {"batch": 1}
