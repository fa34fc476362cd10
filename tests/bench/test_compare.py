from __future__ import annotations

from dataclasses import replace

import pytest
from bench import fakes

from gankern.bench.compare import compare, machine_differences
from gankern.bench.results import CaseResult, Measured, Report
from gankern.bench.timing import Spread

MACHINE = {"cpu": {"model": "Abacus 9", "cores": 2, "isa": "beads"}, "threads": 2, "gpus": [], "python": "3.11"}


def run(ratio: Spread, *, slowdown: float = 1.0, **changes: object) -> Report:
    """A run whose gankern takes a millisecond on a machine that is `slowdown` times slower than another day."""
    sides = {
        "eager": Measured(Spread(*(1e-3 * slowdown * v for v in (ratio.median, ratio.p20, ratio.p80)))),
        "gankern": Measured(Spread(*[1e-3 * slowdown] * 3)),
    }
    fields = {
        "status": "ok",
        "rounds": 25,
        "sides": sides,
        "best": "eager",
        "ours": "gankern",
        "ratio": ratio,
        **changes,
    }
    return Report("", MACHINE, [CaseResult("fake.forward", "", "float32", "cpu", {"batch": 2}, **fields)])


OLD = Spread(2.0, 1.9, 2.1)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Spread(1.5, 1.4, 1.6), "slower"),
        (Spread(2.5, 2.4, 2.6), "faster"),
        (Spread(1.5, 1.4, 1.95), "within noise"),  # ranges overlap
        (Spread(1.5, 1.0, 2.0), "within noise"),
        (OLD, "within noise"),
    ],
)
def test_verdicts_need_ranges_apart(ratio, verdict):
    found = compare(run(OLD), run(ratio), "old.json")
    assert [v.verdict for v in found.verdicts] == [verdict]
    assert found.verdicts[0].change == pytest.approx(ratio.median / 2)
    assert found.regressed == (verdict == "slower")


def test_few_rounds_are_not_compared():
    (verdict,) = compare(run(OLD), run(Spread(1.0, 1.0, 1.0), rounds=2), "").verdicts
    assert verdict.verdict == "not compared" and "2 rounds" in verdict.message


def test_small_changes_are_noise_however_narrow_the_ranges():
    assert compare(run(Spread(2.0, 2.0, 2.0)), run(Spread(1.95, 1.95, 1.95)), "").verdicts[0].verdict == "within noise"


def test_a_slower_day_is_not_a_slower_gankern():
    assert compare(run(OLD), run(OLD, slowdown=3.0), "").verdicts[0].verdict == "within noise"


def test_the_same_variant_is_compared():
    """A variant that is new and faster lowers the ratio; gankern is as fast as it was."""
    new = run(OLD)
    sides = {"compile": Measured(Spread(1e-3, 1e-3, 1e-3)), **new.cases[0].sides}
    case = replace(new.cases[0], sides=sides, best="compile", ratio=Spread(1.0, 1.0, 1.0))
    (verdict,) = compare(run(OLD), replace(new, cases=[case]), "").verdicts
    assert (verdict.verdict, verdict.message) == ("within noise", "against eager")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "reference"}, "backend was auto, is reference"),
        ({"status": "skipped"}, "was ok, is skipped"),
        ({"sides": {"compile": Measured(OLD)}}, "no stock variant is in both"),
    ],
)
def test_what_cannot_be_compared_is_said(changes, message):
    (verdict,) = compare(run(OLD), run(OLD, **changes), "").verdicts
    assert (verdict.verdict, verdict.message) == ("not compared", message)


def test_what_was_right_and_is_wrong_has_regressed():
    found = compare(run(OLD), run(OLD, status="wrong"), "")
    assert found.verdicts[0].verdict == "broken"
    assert found.regressed


def test_machines_and_versions():
    other = {**MACHINE, "threads": 1, "python": "3.12", "versions": {"torch": "2.14"}}
    assert machine_differences(MACHINE, other) == ["threads 2 -> 1"]
    found = compare(run(OLD), Report("", other), "")
    assert found.differences == ["torch None -> 2.14", "Python 3.11 -> 3.12"]


def test_points_of_a_sweep_are_compared_each():
    report = fakes.report()
    names = [v.name for v in compare(report, report, "").verdicts]
    assert names[:3] == ["fake.forward", "fake.slow", "fake.wrong"]
    assert names[3:] == [f"fake.forward batch={n}" for n in (1, 4, 16)]
