"""Clocks: what is read at each change of phase of a timed step."""

from __future__ import annotations

import resource
import time
from typing import Any, Protocol

import torch

#: Phase of what lies outside of all others.
OTHER = "outside the phases"


class Meter(Protocol):
    """Something that grows."""

    def read(self) -> Any: ...

    def between(self, first: Any, second: Any) -> tuple[float, float]:
        """Seconds and page faults from one reading to a later one."""


class CpuClock:
    """The wall clock, and the page faults of the process."""

    def read(self) -> tuple[float, int]:
        return time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def between(self, first: tuple[float, int], second: tuple[float, int]) -> tuple[float, float]:
        return second[0] - first[0], second[1] - first[1]


class CudaClock:
    """Events on the current stream: no phase waits for the device."""

    def read(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> tuple[float, float]:
        second.synchronize()
        return first.elapsed_time(second) / 1e3, 0.0


class Marks:
    """Readings of a meter at the changes of phase of one step."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter
        self._names: list[str] = []
        self._readings: list[Any] = [meter.read()]

    def switch(self, ended: str) -> None:
        """Note that a phase has ended and another goes on."""
        self._names.append(ended)
        self._readings.append(self._meter.read())

    def by_phase(self, between: Any) -> dict[str, list[Any]]:
        """What ``between`` makes of two neighbouring readings, by the phase between them."""
        found: dict[str, list[Any]] = {}
        for name, first, second in zip(self._names, self._readings, self._readings[1:], strict=False):
            found.setdefault(name, []).append(between(first, second))
        return found
