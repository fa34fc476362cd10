"""Runs one case: correctness first, then time and memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from gankern.bench import gpu, timing
from gankern.bench.cases import Case, Run, Sides
from gankern.bench.check import Wrong, compare
from gankern.bench.results import CaseResult, Measured


def run_case(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int | None = None,
    against: Collection[str] | None = None,
    without: Mapping[str, str] | None = None,
    repeat: int = 15,
    budget: float = 3.0,
    tiny: bool = False,
    clock: timing.Clock = time.perf_counter,
) -> CaseResult:
    """Check that every side of a case computes the same, then time them in turn.

    Parameters
    ----------
    case : Case
        What to run.
    dtype, device, batch, tiny
        Passed to the case's setup; `batch` replaces its batch size, `tiny` all its sizes.
    against : collection of str, optional
        The stock variants to compare with; all by default.
    without : mapping of str to str, optional
        Stock variants to leave out, each with the reason to report.
    repeat : int
        Rounds.
    budget : float
        Seconds after which no further round starts.
    clock : callable
        Returns seconds.

    Returns
    -------
    CaseResult
        Without any time, unless its status is "ok".
    """
    size = dict(case.tiny if tiny else case.size)
    if batch is not None and "batch" in size:
        size["batch"] = batch
    result = CaseResult(
        case.name, case.measures, str(dtype).removeprefix("torch."), device, size, "skipped", "not in this dtype"
    )
    if dtype not in case.dtypes:
        return result
    torch.compiler.reset()
    torch.manual_seed(0)
    try:
        sides = case.setup(size, dtype, device)
        runs, error, left_out = checked(sides, against, without)
        if torch.device(device).type == "cuda":
            runs, left_out = gpu.with_graphs(runs, sides.ours.keys(), left_out, against)
    except Wrong as wrong:
        return replace(result, status="wrong", message=str(wrong))
    except Exception as failure:
        return replace(result, status="failed", message=_one_line(failure))
    result = replace(
        result,
        error=error,
        tolerance=sides.tolerance,
        work=sides.work,
        unit=sides.unit,
        moved_bytes=sides.moved_bytes,
        flops=timing.flops(next(iter(sides.stock.values()))) if device != "cpu" else None,
        left_out=left_out,
    )
    own = {name for name in runs if name in sides.ours or name.removesuffix(gpu.GRAPH) in sides.ours}
    if runs.keys() == own:
        return replace(result, message="no stock variant to compare with")

    calls = timing.calls_per_sample(runs, clock=clock, device=device)
    times = timing.rounds(runs, repeat, calls=calls, budget=budget, clock=clock, device=device)
    best, ours, ratio = timing.ratio(times, own)
    return replace(
        result,
        status="ok",
        message="",
        rounds=len(times[ours]),
        calls=calls,
        sides={
            name: Measured(timing.Spread.of(times[name]), timing.peak_memory(run, device)) for name, run in runs.items()
        },
        best=best,
        ours=ours,
        ratio=ratio,
    )


def checked(
    sides: Sides, against: Collection[str] | None = None, without: Mapping[str, str] | None = None
) -> tuple[dict[str, Run], float, dict[str, str]]:
    """Run every side once and compare it with the reference.

    Returns
    -------
    tuple of dict, float and dict
        What may be timed: the stock variants that are right, then gankern; gankern's largest relative error; and the
        stock variants left out, each with the reason.

    Raises
    ------
    Wrong
        Where gankern's results are not the reference's.
    """
    want = {name: [t if t is None else t.detach() for t in group] for name, group in sides.reference().items()}
    error = max(compare(run(), want, sides.tolerance) for run in sides.ours.values())
    runs: dict[str, Run] = {}
    left_out = {**sides.left_out, **(without or {})}
    if against is not None:
        left_out = {name: why for name, why in left_out.items() if name in against}
    for name, run in sides.stock.items():
        if name in left_out or (against is not None and name not in against):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compare(run(), want, sides.tolerance)
            runs[name] = run
        except Exception as failure:
            left_out[name] = _one_line(failure)
    return {**runs, **sides.ours}, error, left_out


def _one_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]
