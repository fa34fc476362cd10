"""What torch's profiler tells of one step, by phase."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from gankern.profile.meters import OTHER

#: Before the name of a phase in a trace.
PREFIX = "phase: "
_NODE = "autograd::engine::evaluate_function: "


@dataclass
class Traced:
    """One phase in one step under torch's profiler.

    Attributes
    ----------
    device_seconds : float
        Of the GPU's kernels that it launched.
    kernels : int
        How many those are.
    nodes : Counter
        Microseconds of autograd's nodes in it, by name.
    """

    device_seconds: float = 0.0
    kernels: int = 0
    nodes: Counter[str] = field(default_factory=Counter)


class _Intervals:
    """Which phase a moment of the trace belongs to: the innermost."""

    def __init__(self, events: Iterable[Any]) -> None:
        spans = sorted((e.time_range.start, e.time_range.end, e.name.removeprefix(PREFIX)) for e in events)
        # The phases as one row of changes: each begins what follows, and gives way to what it lies in.
        self._starts: list[float] = []
        self._names: list[str] = []
        open_spans: list[tuple[float, str]] = []
        for start, end, name in [*spans, (float("inf"), float("inf"), OTHER)]:
            while open_spans and open_spans[-1][0] <= start:
                ended, _ = open_spans.pop()
                self._change(ended, open_spans[-1][1] if open_spans else OTHER)
            self._change(start, name)
            open_spans.append((end, name))

    def _change(self, moment: float, name: str) -> None:
        self._starts.append(moment)
        self._names.append(name)

    def at(self, moment: float) -> str:
        place = bisect.bisect_right(self._starts, moment) - 1
        return self._names[place] if place >= 0 else OTHER


def read(events: Iterable[Any]) -> dict[str, Traced]:
    """Sort the events of a profiler (`torch.profiler.profile.events`) by phase."""
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    intervals = _Intervals(e for e in on_host if e.name.startswith(PREFIX))
    found: dict[str, Traced] = {}
    for event in on_host:
        if event.name.startswith(PREFIX):
            continue
        phase = found.setdefault(intervals.at(event.time_range.start), Traced())
        phase.device_seconds += sum(kernel.duration for kernel in event.kernels) / 1e6
        phase.kernels += len(event.kernels)
        if event.name.startswith(_NODE):
            phase.nodes[event.name.removeprefix(_NODE)] += event.time_range.elapsed_us()
    return found
