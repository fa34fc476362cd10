"""What the benchmarks do on a GPU only, as far as it shows without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

import gankern
from gankern.bench import gpu, report
from gankern.bench.cases import CASES, Case, Sides, weight_clip
from gankern.bench.measure import run_case
from gankern.bench.results import CaseResult, Measured, Report
from gankern.bench.timing import Spread


def test_every_side_runs_as_a_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def graphed(run: Any) -> Any:
        if run == "waits":
            raise RuntimeError("not while capturing\nmore")
        return f"graph of {run}"

    monkeypatch.setattr(gpu, "graphed", graphed)
    runs: Any = {"eager": "a", "foreach": "waits", "gankern": "c"}
    found, left_out = gpu.with_graphs(runs, {"gankern"}, {"compile": "slow"})
    assert found == {**runs, "eager graph": "graph of a", "gankern graph": "graph of c"}
    assert list(found)[:2] == ["eager", "foreach"]
    assert left_out == {"compile": "slow", "foreach graph": "RuntimeError: not while capturing"}
    found, _ = gpu.with_graphs(runs, {"gankern"}, {}, against=["eager"])
    assert list(found) == ["eager", "foreach", "gankern", "gankern graph"]


def test_tf32_is_a_type_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side of float32 may round to it; both sides of tf32 may, and are held to what that leaves."""
    seen: list[tuple[bool, bool]] = []

    def sides(size: Any, dtype: torch.dtype, device: str) -> Sides:
        def run() -> Any:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            # As far off as TF32 may be.
            return {"output": [torch.full((3,), 1.0 if len(seen) == 1 else 1.0 + 1e-3)]}

        seen.clear()
        return Sides(run, {"eager": run}, {"gankern": run}, 1, "images", 1e-4)

    case = Case("a.forward", "b", sides, {}, {})
    before = torch.backends.cudnn.allow_tf32
    plain = run_case(case, repeat=1, budget=0.0)
    assert (plain.status, plain.dtype, set(seen)) == ("wrong", "float32", {(False, False)})
    tf32 = run_case(case, tf32=True, repeat=1, budget=0.0)
    assert (tf32.status, tf32.dtype, set(seen)) == ("ok", "tf32", {(True, True)})
    assert tf32.tolerance == gpu.TF32_TOLERANCE
    assert torch.backends.cudnn.allow_tf32 is before


def test_stock_has_an_optimizer_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gankern.optim.RMSprop is not None  # made of torch's before that is replaced
    made: list[Any] = []
    monkeypatch.setattr(torch.optim, "RMSprop", lambda own, **options: made.append(options) or torch.optim.SGD(own))
    monkeypatch.setattr(weight_clip, "random_tensor", lambda *shape, **options: torch.randn(shape))
    sides = CASES["rmsprop_clip.step"].setup({"width": 2}, torch.float32, "cuda")
    assert "capturable" in sides.stock
    assert [options.get("capturable", False) for options in made].count(True) == 1
    assert "capturable" not in CASES["rmsprop_clip.step"].setup({"width": 2}, torch.float32, "cpu").stock


def test_what_is_captured_seeds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to seed a generator that a graph draws from."""
    drawn = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capturing in (False, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        gpu.seed(1)
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_rates_are_shares_of_the_ceilings() -> None:
    side = Measured(Spread(1e-3, 1e-3, 1e-3))
    case = CaseResult("a", "b", "bfloat16", "cuda", {}, "ok", sides={"gankern": side, "eager": side})
    case = CaseResult(
        **{**case.__dict__, "best": "eager", "ours": "gankern", "ratio": Spread(1, 1, 1), "flops": 10**11},
    )
    ceilings = {"copy_bytes": 4e12, "bfloat16_flops": 8e14, "float32_flops": 5e13}
    row = [("a",), ("compute",), ("0.125",), ("12%",), ("12%",), ("100.000",), ()]
    assert report.roofline_row(case, ceilings) == row
    moving = CaseResult(**{**case.__dict__, "flops": 0, "moved_bytes": 2 * 10**9})
    assert report.roofline_row(moving, ceilings) == [("a",), ("memory",), ("0.5",), ("50%",), ("50%",), (), ("2.000",)]
    console = Console(width=140, record=True)
    report.show(Report("x", {"ceilings": ceilings, "gpus": ["NVIDIA H100"], "device": "cuda"}, [moving]), console)
    text = console.export_text()
    assert "Share of the roofline" in text
    assert "NVIDIA H100" in text
