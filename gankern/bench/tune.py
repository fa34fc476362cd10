"""Which backend is the fastest for an op on this GPU: for `gankern.dispatch`, by which ``auto`` goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

import gankern
from gankern import backends, dispatch
from gankern.bench import timing
from gankern.bench.cases import Case, Run
from gankern.bench.check import Results, Wrong, compare

BACKENDS = ("cuda", "triton", "reference")


def tune(
    cases: Iterable[Case],
    *,
    dtype: torch.dtype,
    device: str,
    repeat: int = 15,
    budget: float = 0.5,
    clock: timing.Clock = time.perf_counter,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, dict[int, str]]]:
    """Time every backend that gets a case right, at each of the case's sizes.

    Parameters
    ----------
    cases : iterable of Case
        Those of the type that measure an op, forward and backward; others are passed over.
    dtype, device, repeat, budget, clock
        As `gankern.bench.run_case` takes them.
    say : callable
        Told each result in a line.

    Returns
    -------
    dict
        As `gankern.dispatch.save` takes it.
    """
    table: dict[str, dict[str, dict[int, str]]] = {}
    for case in cases:
        if not (case.is_op and case.name.endswith(".training") and dtype in case.dtypes):
            continue
        dimension, sizes = next(iter(case.sizes.items()), ("", ()))
        for size in [{}, *({dimension: n} for n in sizes)]:
            fastest, keys = _fastest(case, {**case.size, **size}, dtype, device, repeat, budget, clock, say)
            say(f"{case.name} {', '.join(f'{k}={v}' for k, v in {**case.size, **size}.items())}: {fastest or 'none'}")
            for kind, log_size in keys if fastest else ():
                table.setdefault(case.group, {}).setdefault(kind, {})[log_size] = str(fastest)
    return table


def _fastest(
    case: Case,
    size: dict[str, int],
    dtype: torch.dtype,
    device: str,
    repeat: int,
    budget: float,
    clock: timing.Clock,
    say: Callable[[str], None],
) -> tuple[str | None, set[tuple[str, int]]]:
    """The backend with the lowest median, and the keys of the op's calls."""
    torch.manual_seed(0)
    sides = case.setup(size, dtype, device)
    want = sides.reference()
    runs: dict[str, Run] = {}
    with backends.watched() as calls:
        for name in BACKENDS:
            for variant, run in sides.ours.items():
                on = partial(_on, name, run)
                try:
                    compare(on(), want, sides.tolerance)
                except (Wrong, gankern.BackendUnavailable) as error:
                    say(f"{case.name}: {name} left out: {error}")
                    continue
                runs[f"{name} {variant}"] = on
    keys = {dispatch.key(*tensors) for op, tensors in calls if op == case.group}
    if not runs or not keys:
        return None, keys
    per_sample = timing.calls_per_sample(runs, clock=clock, device=device)
    times = timing.rounds(runs, repeat, calls=per_sample, budget=budget, clock=clock, device=device)
    return min(times, key=lambda name: timing.Spread.of(times[name]).median).split()[0], keys


def _on(name: str, run: Run) -> Results:
    with gankern.backend(name):
        return run()
