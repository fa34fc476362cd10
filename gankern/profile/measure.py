"""Profiles the sides of a subject in turn, round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from gankern.bench import timing
from gankern.bench.results import OURS, STOCK
from gankern.profile.recorder import critic_steps
from gankern.profile.results import StepProfile, Variant
from gankern.profile.sides import Side

_PROFILED = " profiled"


class Measurement:
    """What has been measured of some sides so far.

    Parameters
    ----------
    sides : dict of str to Side
        As `gankern.profile.sides.make_sides` returns them.
    traces : dict of str to Path
        Where to write the trace of a step, by side.
    steps : int
        To time.
    others : mapping of str to callable
        Other forms of stock's step, whose phases are not told apart.

    Attributes
    ----------
    seconds : dict of str to list of float
        Of each side's steps without the profiler, one entry a round.
    """

    def __init__(
        self,
        sides: dict[str, Side],
        traces: dict[str, Path],
        steps: int,
        others: Mapping[str, timing.Work] | None = None,
    ) -> None:
        self.sides, self._steps = sides, steps
        self._others = others or {}
        self._device = str(sides[STOCK].subject.device)
        self._profilers = {
            name: critic_steps(steps=steps, device=self._device, trace=traces.get(name)) for name in (STOCK, OURS)
        }
        off = critic_steps(enabled=False)
        self._work: dict[str, timing.Work] = {name: partial(side.step, off) for name, side in sides.items()}
        self._work |= {name + _PROFILED: partial(sides[name].step, p) for name, p in self._profilers.items()}
        self._work |= self._others
        self._times: dict[str, list[float]] = {name: [] for name in self._work}
        self._peaks: dict[str, int | None] = {}

    def run(self, progress: Callable[[float], None] = lambda share: None) -> None:
        """Warm up, count and trace, then time; after Ctrl-C what was measured is still there."""
        with ExitStack() as stack:
            for profiler in self._profilers.values():
                stack.enter_context(profiler)
            for _ in range(self._profilers[STOCK].untimed_steps):
                timing.rounds(self._work, 1, device=self._device)
            for done in range(self._steps):
                progress(done / self._steps)
                found = timing.rounds(self._work, 1, device=self._device)
                for name, seconds in found.items():
                    self._times[name] += seconds
        self._peaks = {name: timing.peak_memory(self._work[name], self._device) for name in self._profilers}
        progress(1.0)

    @property
    def seconds(self) -> dict[str, list[float]]:
        return {name: self._times[name] for name in self.sides}

    def profiles(self) -> dict[str, StepProfile]:
        """Of stock and gankern; empty where no step was timed."""
        found = {name: p.profile() for name, p in self._profilers.items() if p.timed_steps}
        return {name: replace(profile, peak_bytes=self._peaks.get(name)) for name, profile in found.items()}

    def overhead(self) -> dict[str, float]:
        """By side, what profiling adds to a step, as a share of it."""
        return {
            name: timing.Spread.of(self._times[name + _PROFILED]).median / timing.Spread.of(self._times[name]).median
            - 1
            for name in self._profilers
            if self._times[name]
        }

    def variants(self, compiling: Mapping[str, float]) -> dict[str, Variant]:
        """Other forms of stock's step, with the seconds that the first two calls of each took."""
        found = {}
        for name in self._others:
            if self._times[name]:
                seconds = timing.Spread.of(self._times[name])
                *_, ratio = timing.ratio({name: self._times[name], OURS: self._times[OURS]}, [OURS])
                found[name] = Variant(seconds, max(0.0, compiling[name] - 2 * seconds.median), ratio)
        return found

    def saving(self, name: str) -> timing.Spread | None:
        """Seconds by which a side's steps are shorter than stock's, round by round; None where nothing was timed."""
        pairs = zip(self._times[STOCK], self._times[name], strict=True)
        differences = [stock - other for stock, other in pairs]
        return timing.Spread.of(differences) if differences else None
