"""Runs one case: correctness first, then time and memory."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

import gankern
from gankern import backends
from gankern.arguments import first_line
from gankern.bench import gpu, timing
from gankern.bench.alarm import TooLong, time_limit
from gankern.bench.cases import Case, Run, Sides
from gankern.bench.check import Wrong, compare
from gankern.bench.results import COMPILED, CaseResult, Measured


def run_case(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    tf32: bool = False,
    device: str = "cpu",
    size: Mapping[str, int] | None = None,
    backend: str | None = None,
    against: Collection[str] | None = None,
    without: Mapping[str, str] | None = None,
    repeat: int = 15,
    budget: float = 3.0,
    compile_seconds: float = math.inf,
    tiny: bool = False,
    on_checked: Callable[[CaseResult], None] = lambda result: None,
    clock: timing.Clock = time.perf_counter,
) -> CaseResult:
    """Check that every side of a case computes the same, then time them in turn.

    Parameters
    ----------
    case : Case
        What to run.
    dtype, device, size, tiny
        Passed to the case's setup; `size` replaces those of its sizes that it names, `tiny` all of them.
    tf32 : bool, optional
        Whether products of float32 may be rounded to TF32, on both sides: a type of its own, with a tolerance of its
        own. Only on a GPU.
    backend : str, optional
        For gankern's sides, as `gankern.backend` takes it; the one in force by default.
    against : collection of str, optional
        The stock variants to compare with; all by default.
    without : mapping of str to str, optional
        Stock variants to leave out, each with the reason to report.
    repeat : int
        Rounds.
    budget : float
        Seconds after which no further round starts, as :func:`gankern.bench.timing.rounds` takes it.
    compile_seconds : float
        Compiled variants whose first two calls take longer are left out.
    on_checked : callable
        Told that everything is right, with the error and without any time yet.
    clock : callable
        Returns seconds.

    Returns
    -------
    CaseResult
        Without any time, unless its status is "ok".
    """
    sizes = dict(case.tiny if tiny else case.size)
    sizes |= {name: value for name, value in (size or {}).items() if name in sizes}
    result = CaseResult(
        case.name,
        case.measures,
        gpu.TF32 if tf32 else str(dtype).removeprefix("torch."),
        device,
        sizes,
        "skipped",
        "not in this dtype",
    )
    if dtype not in case.dtypes:
        return result
    too_large = _too_large(case.needs(sizes, dtype), device)
    if "reference" in too_large:
        return replace(result, message=f"the reference {too_large['reference']}")
    with nullcontext() if backend is None else gankern.backend(backend), gpu.products_in_tf32(tf32):
        result = replace(result, backend=backends.requested())
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            sides = case.setup(sizes, dtype, device)
            if tf32:
                sides = replace(sides, tolerance=max(sides.tolerance, gpu.TF32_TOLERANCE))
            runs, error, left_out, compiling = checked(
                sides, against, {**too_large, **(without or {})}, compile_seconds=compile_seconds, clock=clock
            )
            if torch.device(device).type == "cuda":
                runs, left_out = gpu.with_graphs(runs, sides.ours.keys(), left_out, against)
        except Wrong as wrong:
            return replace(result, status="wrong", message=str(wrong))
        except gankern.BackendUnavailable as refused:
            return replace(result, message=str(refused))
        except Exception as failure:
            return replace(result, status="failed", message=first_line(failure))
        result = replace(
            result,
            error=error,
            tolerance=sides.tolerance,
            work=sides.work,
            unit=sides.unit,
            moved_bytes=sides.moved_bytes,
            left_out=left_out,
        )
        own = {name for name in runs if name in sides.ours or name.removesuffix(gpu.GRAPH) in sides.ours}
        if runs.keys() == own and not too_large:
            return replace(result, message="no stock variant to compare with")
        on_checked(result)
        result = _timed(result, runs, own, repeat, budget, clock)
        return replace(result, flops=_flops(sides, left_out), sides=_with_compiling(result.sides, compiling))


def _timed(
    result: CaseResult, runs: Mapping[str, Run], own: Collection[str], repeat: int, budget: float, clock: timing.Clock
) -> CaseResult:
    calls = timing.calls_per_sample(runs, clock=clock, device=result.device)
    times = timing.rounds(runs, repeat, calls=calls, budget=budget, clock=clock, device=result.device)
    best, ours, ratio = timing.ratio(times, own) if runs.keys() != own else (None, timing.fastest(times), None)
    peaks = {name: timing.peak_memory(run, result.device) for name, run in runs.items()}
    return replace(
        result,
        status="ok",
        message="",
        rounds=len(times[ours]),
        calls=calls,
        sides={name: Measured(timing.Spread.of(times[name]), peaks[name]) for name in runs},
        best=best,
        ours=ours,
        ratio=ratio,
    )


def _with_compiling(sides: Mapping[str, Measured], seconds: Mapping[str, float]) -> dict[str, Measured]:
    """The sides, those that were compiled with the time of that: what their first two calls took above two others."""
    found = dict(sides)
    for name, first_two in seconds.items():
        if name in found:
            found[name] = replace(found[name], compile_seconds=max(0.0, first_two - 2 * found[name].seconds.median))
    return found


def _flops(sides: Sides, left_out: Collection[str]) -> int | None:
    """Operations of a call; counted on the first stock variant, which is eager."""
    first, run = next(iter(sides.stock.items()))
    if sides.flops is not None or first in left_out:
        return sides.flops
    return timing.flops(run) or None


class Checked(NamedTuple):
    """What was found right.

    Attributes
    ----------
    runs : dict of str to callable
        What may be timed: the stock variants that are right, then gankern.
    error : float
        Gankern's largest relative error.
    left_out : dict of str to str
        Stock variants left out, each with the reason.
    compiling : dict of str to float
        Seconds of the first two calls of those that are compiled.
    """

    runs: dict[str, Run]
    error: float
    left_out: dict[str, str]
    compiling: dict[str, float]


def checked(
    sides: Sides,
    against: Collection[str] | None = None,
    without: Mapping[str, str] | None = None,
    *,
    compile_seconds: float = math.inf,
    clock: timing.Clock = time.perf_counter,
) -> Checked:
    """Run every side once and compare it with the reference; once more what is compiled, which may compile again.

    Returns
    -------
    Checked

    Raises
    ------
    Wrong
        Where gankern's results are not the reference's.
    """
    want = {name: [t if t is None else t.detach() for t in group] for name, group in sides.reference().items()}
    error = max((compare(run(), want, sides.tolerance) for run in sides.ours.values()), default=0.0)
    runs: dict[str, Run] = {}
    compiling: dict[str, float] = {}
    left_out = {**sides.left_out, **(without or {})}
    if against is not None:
        left_out = {name: why for name, why in left_out.items() if name in against}
    for name, run in sides.stock.items():
        if name in left_out or (against is not None and name not in against):
            continue
        begin = clock()
        try:
            with warnings.catch_warnings(), time_limit(compile_seconds if name in COMPILED else math.inf):
                warnings.simplefilter("ignore")
                compare(run(), want, sides.tolerance)
                if name in COMPILED:
                    run()
                    compiling[name] = clock() - begin
            runs[name] = run
        except TooLong:
            torch.compiler.reset()
            left_out[name] = f"takes more than {compile_seconds:g} s to compile; --compile-seconds sets the limit"
        except Exception as failure:
            left_out[name] = first_line(failure)
    return Checked({**runs, **sides.ours}, error, left_out, compiling)


def _too_large(needs: Mapping[str, int], device: str) -> dict[str, str]:
    """Why each variant that needs more than half of the device's memory is left out."""
    if not needs:
        return {}
    if torch.device(device).type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {name: f"needs about {n / 2**30:.0f} GiB" for name, n in needs.items() if n > memory // 2}
