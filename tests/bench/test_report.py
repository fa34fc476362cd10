from __future__ import annotations

import io
import json

import pytest
from bench import fakes
from rich.console import Console

from gankern.bench import report as reports
from gankern.bench.results import SCHEMA, Report


@pytest.fixture
def report():
    return fakes.report()


def test_json_round_trip(report, tmp_path):
    path = tmp_path / "out" / "bench.json"
    report.save(path)
    assert Report.load(path) == report
    assert json.loads(path.read_text())["schema"] == SCHEMA


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"old\.json: expected schema 1, got 0"):
        Report.load(path)


def test_right_only_if_everything_is(report):
    assert not report.right
    report.cases.pop()
    assert report.right


def test_tables_show_no_time_for_a_wrong_case(report):
    text = io.StringIO()
    reports.show(report, Console(file=text, width=200))
    # The first line with a name is that of the table of cases.
    lines = {line.split()[0]: line for line in reversed(text.getvalue().splitlines()) if line.split()}
    assert "2.00 (2.00-2.00)" in lines["fake.forward"]
    assert "WRONG" in lines["fake.wrong"]
    assert lines["fake.wrong"].split() == ["fake.wrong", "WRONG"]
    assert "wrong: output: relative error" in lines["fake.wrong:"]
    assert "32" in lines["dcgan"]
    assert "64" in lines["dcgan"]
    assert "cdist left out: no second derivative" in text.getvalue()
    assert "fake.forward: compile 2000.00 ms, 0.0 s to compile" in text.getvalue()


def test_markdown(report):
    text = reports.markdown(report)
    assert "| fake.forward | compile 2000.00 | 0.0 | 1000.00 | 2.00 (2.00-2.00) |" in text
    assert text.count("|:--|") == 3
    assert "Abacus 9, 2 cores, 1 threads" in text
    assert "`gankern bench fake --main`" in text
    assert reports.RATIO in text


def test_a_ratio_is_explained_where_one_is_printed(report):
    def shown():
        text = io.StringIO()
        reports.show(report, Console(file=text, width=200))
        return text.getvalue() + reports.markdown(report)

    assert shown().count("not the quotient of the median times") == 2
    report.cases[:] = [case for case in report.cases if case.ratio is None]
    report.training.clear()
    report.sweeps.clear()
    assert "quotient" not in shown()


def test_narrow_tables_fit_and_keep_every_number(report):
    text = io.StringIO()
    reports.show(report, Console(file=text, width=80))
    tables = text.getvalue()[: text.getvalue().index("fake.wrong: wrong")]
    assert max(map(len, tables.splitlines())) <= 80
    for part in ("fake", ".forward", "compile", "2000.00", "1000.00", "2.00", "(2.00-2.00)", "0e+00", "WRONG", "dcgan"):
        assert part in tables
