"""Interleaved timing and peak memory of callables that do the same work."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gankern import workspace

Clock = Callable[[], float]
Work = Callable[[], object]

MIN_SAMPLE_SECONDS = 2e-3
MIN_ROUNDS = 5
# Where rounds take many times the budget, for an answer within minutes; too few to be compared with another run's.
MIN_LONG_ROUNDS, LONG = 2, 8


@dataclass(frozen=True)
class Spread:
    """A median with its 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[1], deciles[7])


def rounds(
    sides: Mapping[str, Work],
    count: int,
    *,
    calls: int = 1,
    budget: float = math.inf,
    clock: Clock = time.perf_counter,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Time every side once a round, in turn (A B A B ...), so that noise hits all alike.

    Parameters
    ----------
    sides : mapping of str to callable
        What to time; a round runs them in this order.
    count : int
        Rounds to run.
    calls : int
        Calls of a side between two readings of the clock.
    budget : float
        Seconds after which no further round starts, once `MIN_ROUNDS` are done; `MIN_LONG_ROUNDS` are enough after
        `LONG` times as many.
    clock : callable
        Returns seconds.
    device : str
        A CUDA device is synchronised before each reading of the clock.

    Returns
    -------
    dict of str to list of float
        Seconds per call, one entry a round.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    spent = 0.0
    for done in range(count):
        if spent > budget and done >= (MIN_LONG_ROUNDS if spent > LONG * budget else MIN_ROUNDS):
            break
        for name, work in sides.items():
            _synchronize(device)
            start = clock()
            for _ in range(calls):
                work()
            _synchronize(device)
            elapsed = clock() - start
            times[name].append(elapsed / calls)
            spent += elapsed
    return times


def calls_per_sample(sides: Mapping[str, Work], *, clock: Clock = time.perf_counter, device: str = "cpu") -> int:
    """Warm every side up with two calls; return how many calls last `MIN_SAMPLE_SECONDS` on the fastest side.

    One call has to do where it is far longer than that on every side.
    """
    fastest = math.inf
    for _ in range(2):
        fastest = min(times[-1] for times in rounds(sides, 1, clock=clock, device=device).values())
        if fastest > 10 * MIN_SAMPLE_SECONDS:
            break
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / max(fastest, 1e-9)))


def ratio(times: Mapping[str, Sequence[float]], ours: Collection[str]) -> tuple[str, str, Spread]:
    """Compare the fastest of `ours` with the fastest other side.

    Returns
    -------
    tuple of str, str and Spread
        The other side and the one of `ours` with the lowest medians, and the spread over the rounds of the time of the
        former / the time of the latter.
    """
    stock = fastest({name: values for name, values in times.items() if name not in ours})
    mine = fastest({name: times[name] for name in ours})
    return stock, mine, Spread.of([theirs / own for theirs, own in zip(times[stock], times[mine], strict=True)])


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """Name of the side with the lowest median."""
    return min(times, key=lambda name: statistics.median(times[name]))


def flops(work: Work) -> int:
    """Operations of one call that torch can count: those of convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        work()
    return counter.get_total_flops()


class _NoModules:
    """In the place of FlopCounterMode's tracker, whose hooks on all modules a second derivative does not get past."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


def peak_memory(work: Work, device: str = "cpu") -> int | None:
    """Bytes that one call needs at its peak, above what was held before it.

    On the CPU this is resident memory: the heap and gankern's workspace are trimmed, Linux's high-water mark is reset
    through ``/proc/self/clear_refs``, and the mark is read back after the call. So it counts every allocator alike
    (torch's, oneDNN's scratch, gankern's workspace, Inductor's buffers), in whole pages that were really touched; an
    output that the call returns is counted, memory that stays cached inside the C library beforehand is not.
    On CUDA it is torch's allocator's own peak.

    Returns
    -------
    int or None
        None where the system offers no such mark (not Linux, or a sandbox that forbids the reset).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    try:
        ctypes.CDLL(None).malloc_trim(0)
        workspace.release()
        Path("/proc/self/clear_refs").write_text("5")
        held = _resident_high_water_mark()
        work()
        return max(0, _resident_high_water_mark() - held)
    except (OSError, AttributeError, ValueError):
        return None


def _resident_high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM in /proc/self/status")


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
