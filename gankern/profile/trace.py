"""What torch's profiler tells of one step, by phase."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
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
    seconds : float
        From its beginnings to its ends, under the profiler.
    python_seconds : float
        Of these, in which no operator ran.
    """

    device_seconds: float = 0.0
    kernels: int = 0
    nodes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    python_seconds: float = 0.0


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

    def changes_within(self, start: float, end: float) -> bool:
        """Whether a phase begins or ends between two moments."""
        place = bisect.bisect_right(self._starts, start)
        return place < len(self._starts) and self._starts[place] < end

    def pieces(self) -> Iterator[tuple[str, float, float]]:
        """From the beginning of the first span to the end of the last: what goes on, from when and to when."""
        yield from zip(self._names[:-2], self._starts, self._starts[1:-1], strict=False)


def _range(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _union(events: Iterable[Any]) -> list[tuple[float, float]]:
    """When at least one of the events was on, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(map(_range, events)):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _overlap(spans: list[tuple[float, float]], start: float, end: float) -> float:
    first = bisect.bisect_right(spans, start, key=lambda span: span[1])
    last = bisect.bisect_left(spans, end, key=lambda span: span[0])
    return sum(min(e, end) - max(s, start) for s, e in spans[first:last])


def _is_operator(name: str) -> bool:
    """Whether an event is a kernel at work: not a Function, a node or an optimizer, whose Python it would hold."""
    return ("::" in name and not name.startswith("autograd::")) or name.startswith("Torch-Compiled Region")


def read(events: Iterable[Any]) -> dict[str, Traced]:
    """Sort the events of a profiler (`torch.profiler.profile.events`) by phase."""
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    intervals = _Intervals(e for e in on_host if e.name.startswith(PREFIX))
    found: dict[str, Traced] = {}
    operators = []
    for event in on_host:
        if event.name.startswith(PREFIX):
            continue
        # One that phases begin in is made of others.
        if _is_operator(event.name) and not intervals.changes_within(*_range(event)):
            operators.append(event)
        phase = found.setdefault(intervals.at(event.time_range.start), Traced())
        phase.device_seconds += sum(kernel.duration for kernel in event.kernels) / 1e6
        phase.kernels += len(event.kernels)
        if event.name.startswith(_NODE):
            phase.nodes[event.name.removeprefix(_NODE)] += event.time_range.elapsed_us()
    busy = _union(operators)
    for name, start, end in intervals.pieces():
        phase = found.setdefault(name, Traced())
        phase.seconds += (end - start) / 1e6
        phase.python_seconds += (end - start - _overlap(busy, start, end)) / 1e6
    return found
