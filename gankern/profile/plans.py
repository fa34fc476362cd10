"""Time of the calls that plans make in a step, with the phases that they are made in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gankern import compiler
from gankern.profile.results import PlanCall


class CallTimes:
    """Times every call of the plans that there are, inside `on`; elsewhere nothing is watched.

    Parameters
    ----------
    clock : Meter
    phase : callable
        The phase that goes on.
    """

    def __init__(self, clock: Any, phase: Callable[[], str]) -> None:
        self._clock, self._phase = clock, phase
        self._last: Any = None
        self._found: list[tuple[str, Any, Any, Any]] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, calls are timed, which makes each some microseconds longer."""
        # Who has no plans need not import what makes them.
        cache = sys.modules.get(f"{compiler.__name__}.cache")
        if cache is None:
            yield
            return
        from gankern.compiler.replay import timed

        with timed([plan for owner in list(cache.CACHES) for plan in owner.plans], self._tick):
            yield

    def _tick(self, call: Any) -> None:
        if call is not None:
            self._found.append((self._phase(), call, self._last, self._clock.read()))
        self._last = self._clock.read()

    def calls(self) -> tuple[PlanCall, ...]:
        """The calls, equal ones in one, the longest first."""
        seconds: dict[tuple[str, Any], list[float]] = {}
        for phase, call, begin, end in self._found:
            seconds.setdefault((phase, call._replace(why="")), []).append(self._clock.between(begin, end)[0])
        made = [
            PlanCall(phase, call.kernel, call.by, call.lines, call.module, call.order, sum(found), len(found))
            for (phase, call), found in seconds.items()
        ]
        return tuple(sorted(made, key=lambda call: -call.seconds))
