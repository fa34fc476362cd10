"""Measured figures on pages, from stored results of ``gankern bench``.

``<!-- measured: CASE... -->`` or ``<!-- scaling: CASE DIMENSION -->`` becomes a table.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from gankern.bench.report import markdown
from gankern.bench.results import Report

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_MARK = re.compile(r"<!-- (measured|scaling): ([\w. -]+) -->")


def on_page_markdown(text: str, **kwargs: Any) -> str:
    """Put a table in the place of each mark: the cases that it names, or one over its sizes, and the machine."""
    return _MARK.sub(lambda mark: (_table if mark[1] == "measured" else _sweep)(mark[2].split()), text)


def _sweep(wanted: list[str]) -> str:
    report = Report.load(_RESULTS / "cpu-xeon-2-cores-scaling.json")
    sweeps = [sweep for sweep in report.sweeps if [sweep.name, sweep.dimension] == wanted]
    assert sweeps, wanted
    return markdown(dataclasses.replace(report, cases=[], sweeps=sweeps))


def _table(names: list[str]) -> str:
    report = Report.load(_RESULTS / "cpu-xeon-2-cores.json")
    known = {case.name: case for case in report.cases}
    training = [result for result in report.training if result.model in names]
    cases = [known[name] for name in names if name not in {result.model for result in training}]
    return markdown(dataclasses.replace(report, cases=cases, training=training))
