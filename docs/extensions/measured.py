"""Measured figures on pages, from stored results of ``gankern bench``: ``<!-- measured: CASE... -->``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from gankern.bench.report import markdown
from gankern.bench.results import Report

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-xeon-2-cores.json"
_MARK = re.compile(r"<!-- measured: ([\w. -]+) -->")


def on_page_markdown(text: str, **kwargs: Any) -> str:
    """Put a table in the place of each mark: the rows of the cases that it names, and the machine."""
    return _MARK.sub(lambda mark: _table(mark[1].split()), text)


def _table(names: list[str]) -> str:
    report = Report.load(_RESULTS)
    known = {case.name: case for case in report.cases}
    training = [result for result in report.training if result.model in names]
    cases = [known[name] for name in names if name not in {result.model for result in training}]
    return markdown(dataclasses.replace(report, cases=cases, training=training))
