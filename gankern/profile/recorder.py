"""The profiler of any loop: phases and steps are marked where they are, and off it costs next to nothing."""

from __future__ import annotations

import shlex
import statistics
import sys
import warnings
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gankern import _phases
from gankern._info import info
from gankern.bench import ceilings
from gankern.bench.timing import Spread
from gankern.profile import trace as traces
from gankern.profile.meters import OTHER, CpuClock, CudaClock, Marks
from gankern.profile.plans import CallTimes
from gankern.profile.results import Phase, ProfileReport, StepProfile
from gankern.profile.work import Work, WorkCounter, counting, traced

_OFF: AbstractContextManager[Any] = nullcontext()
#: Steps under torch's profiler: a single one may be disturbed.
TRACED_STEPS = 3
WARM_UP, COUNTED, TRACED, REPLAYED, TIMED, DONE = "warm-up", "counted", "traced", "replayed", "timed", "done"


class _Span:
    """A phase that has begun; used in a ``with`` block or, as a statement, ended by the next one."""

    __slots__ = ("_owner", "entered", "name", "recorded")

    def __init__(self, owner: CriticSteps, name: str) -> None:
        self._owner = owner
        self.name = name
        self.entered = False
        self.recorded: Any = None

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *args: object) -> None:
        self._owner._close(self)


class CriticSteps:
    """Profiler of a loop's steps; see `critic_steps`."""

    def __init__(
        self,
        *,
        enabled: bool = True,
        warm_up: int = 2,
        steps: int = 100,
        device: torch.device | str | None = None,
        trace: Path | str | None = None,
    ) -> None:
        for name, value, least in (("warm_up", warm_up, 0), ("steps", steps, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if device is not None and torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or a CUDA device; got {str(device)!r}")
        self._enabled, self._trace = enabled, None if trace is None else Path(trace)
        # The step after those under torch's own tools finds its memory and caches as they were: it is not timed as a
        # whole, but the calls of plans in it are.
        self._schedule = [WARM_UP] * warm_up + [COUNTED] + [TRACED] * TRACED_STEPS + [REPLAYED] + [TIMED] * steps
        self._device = None if device is None else torch.device(device)
        self._done = 0
        self._stack: list[_Span] = []
        self._marks: Marks | None = None
        self._tools: ExitStack | None = None
        self._open = self._has_phases = self._running = False
        self._mode = DONE
        self._timed: list[Marks] = []
        self._counter: WorkCounter | None = None
        self._work: dict[str, Work] = {}
        self._traced: list[dict[str, traces.Traced]] = []
        self._calls: CallTimes | None = None
        self._clock: CpuClock | CudaClock = CpuClock()

    def __enter__(self) -> CriticSteps:
        if self._enabled:
            if self._device is None:
                self._device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
            self._clock = CudaClock() if self._device.type == "cuda" else CpuClock()
            self._running = True
        return self

    def __exit__(self, kind: Any, *args: object) -> None:
        self._discard()
        running, self._running = self._running, False
        if running and kind is None and not self._done:
            warnings.warn(
                "gankern.profile saw no step: wrap each in `with prof.step():`, or call prof.step() at its end",
                stacklevel=2,
            )

    def step(self) -> AbstractContextManager[Any]:
        """Begin a step, and end the one before where it is open still.

        As a ``with`` block it holds the step; as a statement at the end of a loop's body it parts one from the next.
        """
        if not self._running:
            return _OFF
        if self._open and self._has_phases:
            self._finish()
        self._discard()
        self._begin()
        return _Step(self)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Begin a phase: a ``with`` block, or a statement that the next phase or the step's end closes.

        Phases may lie in each other: a part's time is not in the phase around it, whose name comes before its own,
        as in ``"penalty/tail"``.
        """
        if not self._running:
            return _OFF
        if not self._open:
            self._begin()
        self._has_phases = True
        if self._marks is None:
            return _OFF
        while self._stack and not self._stack[-1].entered:
            self._close(self._stack[-1])
        return self._start(name if "/" in name or not self._stack else f"{self._stack[-1].name}/{name}")

    def _hooked(self, name: str) -> AbstractContextManager[Any]:
        """A phase that an operation of gankern's marks by itself, inside of whatever is open."""
        return self._start(name)

    def _start(self, name: str) -> _Span:
        span = _Span(self, name)
        if self._mode == TRACED:
            span.recorded = torch.profiler.record_function(traces.PREFIX + name)
            span.recorded.__enter__()
        self._switch()
        self._stack.append(span)
        return span

    def _close(self, span: _Span) -> None:
        # A step that has ended has closed its phases.
        while span in self._stack:
            self._switch()
            last = self._stack.pop()
            if last.recorded is not None:
                last.recorded.__exit__(None, None, None)

    def _switch(self) -> None:
        if self._marks is not None:
            self._marks.switch(self._stack[-1].name if self._stack else OTHER)

    def _begin(self) -> None:
        self._mode = self._schedule[self._done] if self._done < len(self._schedule) else DONE
        self._open, self._has_phases = True, False
        if self._mode in (WARM_UP, DONE):
            return
        _phases.hook = self._hooked
        if self._mode == TIMED:
            self._marks = Marks(self._clock)
            return
        self._tools = ExitStack()
        if self._mode == COUNTED:
            self._counter = self._tools.enter_context(counting())
            self._marks = Marks(self._counter)
        elif self._mode == REPLAYED:
            self._marks = Marks(self._clock)
            self._calls = CallTimes(self._clock, lambda: self._stack[-1].name if self._stack else OTHER)
            self._tools.enter_context(self._calls.on())
        else:
            self._tools.enter_context(self._profiler())
            self._tools.enter_context(traced())
            self._tools.enter_context(torch.profiler.record_function(traces.PREFIX + OTHER))
            self._marks = Marks(self._clock)

    def _profiler(self) -> Any:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device is not None and self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        return torch.profiler.profile(activities=activities, on_trace_ready=self._read_trace, acc_events=True)

    def _read_trace(self, profiler: Any) -> None:
        if self._mode != TRACED:
            return
        self._traced.append(traces.read(profiler.events()))
        if self._trace is not None and len(self._traced) == TRACED_STEPS:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._trace))

    def _finish(self) -> None:
        """End a step and keep what it showed."""
        while self._stack:
            self._close(self._stack[-1])
        marks, mode = self._marks, self._mode
        if marks is not None:
            self._switch()
        if mode == TIMED and marks is not None:
            self._timed.append(marks)
        elif mode == COUNTED and marks is not None:
            deltas = marks.by_phase(lambda first, second: [b - a for a, b in zip(first, second, strict=True)])
            self._work = {name: Work(*map(sum, zip(*found, strict=True))) for name, found in deltas.items()}
        if mode == TRACED and self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._leave_tools()
        self._done += 1

    def _leave_tools(self) -> None:
        tools, self._tools, self._marks = self._tools, None, None
        self._open = False
        if _phases.hook == self._hooked:
            _phases.hook = None
        if tools is not None:
            tools.close()

    def _discard(self) -> None:
        """End a step that was broken off, and forget it."""
        self._mode = DONE
        while self._stack:
            self._close(self._stack[-1])
        self._leave_tools()

    @property
    def untimed_steps(self) -> int:
        """Steps before the first that is timed."""
        return self._schedule.index(TIMED)

    @property
    def timed_steps(self) -> int:
        """Steps timed so far."""
        return len(self._timed)

    def profile(self) -> StepProfile:
        """Where the time went.

        Returns
        -------
        StepProfile

        Raises
        ------
        RuntimeError
            If no step was timed: fewer than ``warm_up + 6`` were run, or the profiler was off.
        """
        if not self._enabled:
            raise RuntimeError("the profiler is off (enabled=False): nothing was timed")
        if not self._timed:
            raise RuntimeError(
                f"no step was timed: {self._done} were run, and the first {self.untimed_steps} warm up, count and trace"
            )
        steps = [_totals(marks, self._clock) for marks in self._timed]
        whole = [sum(seconds for seconds, _ in step.values()) for step in steps]
        kept = _middle(steps, whole)
        names = list(dict.fromkeys(name for step in kept for name in step if name != OTHER))
        means = {
            name: [sum(step.get(name, (0.0, 0.0))[i] for step in kept) / len(kept) for i in (0, 1)]
            for name in [*names, OTHER]
        }
        return StepProfile(
            str(self._device),
            str(self._counter.dtype if self._counter else torch.float32).removeprefix("torch."),
            len(steps),
            Spread.of(whole),
            sum(seconds for seconds, _ in means.values()),
            tuple(self._phase(name, *mean) for name, mean in means.items()),
            plan_calls=self._calls.calls() if self._calls is not None else (),
        )

    def report(self, subject: str = "") -> ProfileReport:
        """The profile with rates against this machine's ceilings, which it measures now; prints as a table.

        Parameters
        ----------
        subject : str
            What was profiled, in a line.

        Returns
        -------
        ProfileReport

        Raises
        ------
        RuntimeError
            As by `profile`.
        """
        profile = self.profile()
        machine = {**info(), "ceilings": ceilings.measure(profile.device)}
        return ProfileReport(subject, shlex.join(sys.argv), machine, {"loop": profile})

    def _phase(self, name: str, seconds: float, faults: float) -> Phase:
        work = self._work.get(name, Work(0, 0, 0, 0)) if self._work else ()
        phase = Phase(name, seconds, faults, *work)
        if not self._traced:
            return phase
        traced = [step.get(name, traces.Traced()) for step in self._traced]
        nodes = sum((step.nodes for step in traced), Counter[str]())
        # The profiler makes a step longer: what it finds is a share.
        python = statistics.median(step.python_seconds / step.seconds if step.seconds else 0.0 for step in traced)
        on_device = statistics.median(step.device_seconds for step in traced)
        return replace(
            phase,
            device_seconds=on_device if isinstance(self._clock, CudaClock) else None,
            python_seconds=python * seconds,
            nodes={node: spent / nodes.total() for node, spent in nodes.most_common(3)},
        )


class _Step:
    """A step in a ``with`` block."""

    def __init__(self, owner: CriticSteps) -> None:
        self._owner = owner

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *args: object) -> None:
        if kind is None:
            self._owner._finish()
        else:
            self._owner._discard()


def _totals(marks: Marks, clock: CpuClock | CudaClock) -> dict[str, tuple[float, float]]:
    found = marks.by_phase(clock.between)
    return {name: (sum(s for s, _ in parts), sum(f for _, f in parts)) for name, parts in found.items()}


def _middle(steps: list[Any], whole: list[float]) -> list[Any]:
    """The steps from the 20th to the 80th percentile: a mean over them adds up, and an outlier does not move it."""
    if len(steps) < 5:
        return steps
    deciles = statistics.quantiles(whole, n=10, method="inclusive")
    return [step for step, total in zip(steps, whole, strict=True) if deciles[1] <= total <= deciles[7]]


def critic_steps(
    *,
    enabled: bool = True,
    warm_up: int = 2,
    steps: int = 100,
    device: torch.device | str | None = None,
    trace: Path | str | None = None,
) -> CriticSteps:
    """Profile the critic steps of a loop, as it stands.

    The first `warm_up` steps run as they are, one is counted by torch's FlopCounterMode, three are traced by torch's
    profiler, in one each call of gankern's plans is timed; the following are timed by a clock alone, up to `steps`, and
    all after those run as if there were no profiler. The parts of `gankern.gradient_penalty` mark themselves.

    Parameters
    ----------
    enabled : bool
        Off, all calls do nothing, so that they may stay in a loop.
    warm_up, steps : int
        Steps before, and at most so many timed ones.
    device : torch.device or str, optional
        By default the current CUDA device where the process uses one, else the CPU. On a GPU the clock is events on the
        current stream.
    trace : path, optional
        Chrome trace (Perfetto reads it too) to write of the last step traced, the phases named in it.

    Returns
    -------
    CriticSteps
        A context manager, with ``step()`` and ``phase(name)`` for the loop, ``profile()`` and ``report()`` for what it
        found; a report can be printed and saved.

    Examples
    --------
    >>> with gankern.profile.critic_steps() as prof:
    ...     for real in loader:
    ...         with prof.step():
    ...             with prof.phase("generator forward"):
    ...                 fake = generator(noise()).detach()
    ...             with prof.phase("backward"):
    ...                 loss(critic, real, fake).backward()
    ...             with prof.phase("optimizer"):
    ...                 optimizer.step()
    >>> print(prof.report())
    """
    return CriticSteps(enabled=enabled, warm_up=warm_up, steps=steps, device=device, trace=trace)
