from __future__ import annotations

import io
import json

import pytest
from bench.fakes import Clock, case
from rich.console import Console

from gankern.bench import report as reports
from gankern.bench.measure import run_case
from gankern.bench.results import OURS, SCHEMA, STOCK, Measured, Report, TrainingResult
from gankern.bench.timing import Spread


@pytest.fixture
def report():
    clock = Clock()
    cases = [run_case(case(clock), clock=clock), run_case(case(clock, "fake.wrong", ours=9.0), clock=clock)]
    training = TrainingResult(
        "dcgan",
        "ok",
        images=64,
        iterations=3,
        sides={STOCK: Measured(Spread(2.0, 1.0, 3.0), 2**20), OURS: Measured(Spread(1.0, 1.0, 1.0), None)},
        ratio=Spread(2.0, 1.5, 2.5),
        losses={STOCK: [1.0], OURS: [1.0]},
    )
    return Report("gankern bench --main", {"cpu": {"model": "Abacus 9", "cores": 2}, "threads": 1}, cases, [training])


def test_json_round_trip(report, tmp_path):
    path = tmp_path / "out" / "bench.json"
    report.save(path)
    assert Report.load(path) == report
    assert json.loads(path.read_text())["schema"] == SCHEMA


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"old\.json: schema 0"):
        Report.load(path)


def test_right_only_if_everything_is(report):
    assert not report.right
    report.cases.pop()
    assert report.right


def test_tables_show_no_time_for_a_wrong_case(report):
    text = io.StringIO()
    reports.show(report, Console(file=text, width=200))
    lines = {line.split()[0]: line for line in text.getvalue().splitlines() if line.split()}
    assert "2.00 (2.00-2.00)" in lines["fake.forward"]
    assert "WRONG" in lines["fake.wrong"]
    assert lines["fake.wrong"].split() == ["fake.wrong", "WRONG"]
    assert "wrong: output: relative error" in lines["fake.wrong:"]
    assert "32" in lines["dcgan"]
    assert "64" in lines["dcgan"]
    assert "cdist left out: no second derivative" in text.getvalue()


def test_markdown(report):
    text = reports.markdown(report)
    assert "| fake.forward | compile 2000.00 | 1000.00 | 2.00 (2.00-2.00) |" in text
    assert text.count("|:--|") == 2
    assert "Abacus 9, 2 cores, 1 threads" in text
    assert "`gankern bench --main`" in text


def test_chart(report, tmp_path):
    path = tmp_path / "chart.png"
    assert reports.save_chart(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_chart_without_a_ratio(tmp_path):
    assert not reports.save_chart(Report("", {}), tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()
