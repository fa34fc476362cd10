"""What the benchmarks do on a GPU only, as far as it shows without one."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from gankern.bench import gpu, report
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
