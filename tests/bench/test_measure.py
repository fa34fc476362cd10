from __future__ import annotations

import dataclasses

import torch
from bench.fakes import Clock, case

import gankern
from gankern import backends
from gankern.bench.check import Results
from gankern.bench.measure import run_case
from gankern.bench.report import case_row


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
    # What is compiled runs twice: only then has it compiled all it needs.
    checks = ["reference", "gankern", "eager", "compile", "compile"]
    turns = ["eager", "compile", "gankern"]
    warm_up, rounds, memory = turns, 2 * turns, turns
    assert clock.order == checks + warm_up + rounds + memory + ["eager"]


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


def test_no_time_is_taken_before_all_is_said_to_be_right():
    clock = Clock()
    said = []
    run_case(case(clock), on_checked=lambda result: said.append((result, list(clock.order))), clock=clock)
    ((result, order),) = said
    assert (result.error, result.sides) == (0.0, {})
    assert order == ["reference", "gankern", "eager", "compile", "compile"]


def test_what_needs_too_much_memory_is_left_out():
    clock = Clock()
    large = case(clock)
    object.__setattr__(large, "needs", lambda size, dtype: {"compile": 1 << 60, "eager": 1})
    result = run_case(large, clock=clock)
    assert (result.status, result.left_out["compile"]) == ("ok", "needs about 1073741824 GiB")
    object.__setattr__(large, "needs", lambda size, dtype: {"compile": 1 << 60, "eager": 1 << 60, "foreach": 1 << 60})
    result = run_case(large, clock=clock)
    assert (result.status, result.best, result.ratio, result.ours) == ("ok", None, None, "gankern")
    assert set(result.sides) == {"gankern"}
    assert case_row(result)[1:5] == [("too large",), (), ("1000.00",), ()]
    object.__setattr__(large, "needs", lambda size, dtype: {"reference": 1 << 60})
    result = run_case(large, clock=clock)
    assert (result.status, result.message) == ("skipped", "the reference needs about 1073741824 GiB")


def test_backend_is_in_force_for_the_run_and_its_refusal_skips_the_case():
    def refused() -> Results:
        raise gankern.BackendUnavailable(f"backend {backends.requested()!r} cannot run fake")

    clock = Clock()
    asked = case(clock)
    setup = asked.setup
    object.__setattr__(asked, "setup", lambda *args: dataclasses.replace(setup(*args), ours={"gankern": refused}))
    result = run_case(asked, backend="reference", clock=clock)
    assert (result.status, result.backend) == ("skipped", "reference")
    assert result.message == "backend 'reference' cannot run fake"
    assert run_case(case(clock), clock=clock).backend == "auto"


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


def test_given_sizes_replace_those_of_the_case():
    clock = Clock()
    assert run_case(case(clock), size={"batch": 7, "width": 3}, clock=clock).size == {"batch": 7}
    assert run_case(case(clock), tiny=True, clock=clock).size == {"batch": 1}
