"""Which backend is the fastest for an op on this GPU: for `gankern.dispatch`, by which ``auto`` goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import gankern
from gankern import backends, dispatch
from gankern.arguments import first_line
from gankern.bench import gpu, timing
from gankern.bench.cases import Case, Run, Sides, select
from gankern.bench.check import Results, Wrong, compare

BACKENDS = ("cuda", "triton", "reference")
Table = dict[str, dict[str, dict[int, str]]]


def tune(
    cases: Iterable[Case],
    *,
    dtype: torch.dtype,
    device: str,
    repeat: int = 15,
    budget: float = 0.5,
    clock: timing.Clock = time.perf_counter,
    say: Callable[[str], None] = lambda line: None,
    tf32: bool = False,
    keep: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Time every backend that gets a case right, at each of the case's sizes.

    An op made of others, such as a convolution with batch norm, chooses for each of those: it is passed over.

    Parameters
    ----------
    cases : iterable of Case
        Those of the type that measure an op, forward and backward; others are passed over.
    dtype, tf32, device, repeat, budget, clock
        As `gankern.bench.run_case` takes them.
    say : callable
        Told each result in a line.
    keep : callable
        Given what is known, after each result.

    Returns
    -------
    dict
        As `gankern.dispatch.save` takes it.
    """
    table: Table = {}
    for case in cases:
        if not (case.is_op and case.name.endswith(".training") and dtype in case.dtypes):
            continue
        dimension, sizes = next(iter(case.sizes.items()), ("", ()))
        for size in [{}, *({dimension: n} for n in sizes)]:
            with gpu.products_in_tf32(tf32):
                fastest, keys = _fastest(case, {**case.size, **size}, dtype, tf32, device, repeat, budget, clock, say)
            say(f"{case.name} {', '.join(f'{k}={v}' for k, v in {**case.size, **size}.items())}: {fastest or 'none'}")
            if not keys:
                break
            for kind, log_size in keys if fastest else ():
                kind = gpu.TF32 if tf32 else kind
                table.setdefault(case.group, {}).setdefault(kind, {})[log_size] = str(fastest)
            keep(table)
    return table


def _fastest(
    case: Case,
    size: dict[str, int],
    dtype: torch.dtype,
    tf32: bool,
    device: str,
    repeat: int,
    budget: float,
    clock: timing.Clock,
    say: Callable[[str], None],
) -> tuple[str | None, set[tuple[str, int]]]:
    """The backend with the lowest median, and the keys of the op's calls."""
    want: Results | None = None
    runs: dict[str, Run] = {}
    with backends.watched() as calls:
        for name in BACKENDS:
            for variant in _sides(case, size, dtype, device).ours:
                # Anew for each: a run may write running statistics.
                sides = _sides(case, size, dtype, device)
                on = partial(_on, name, sides.ours[variant])
                try:
                    want = want or sides.reference()
                    compare(on(), want, max(sides.tolerance, gpu.TF32_TOLERANCE if tf32 else 0.0))
                except (Wrong, gankern.BackendUnavailable, torch.OutOfMemoryError) as error:
                    say(f"{case.name}: {name} left out: {first_line(error)}")
                    continue
                runs[f"{name} {variant}"] = on
    keys = {dispatch.key(*tensors) for op, tensors in calls if op == case.group}
    if not runs or not keys:
        return None, keys
    per_sample = timing.calls_per_sample(runs, clock=clock, device=device)
    times = timing.rounds(runs, repeat, calls=per_sample, budget=budget, clock=clock, device=device)
    medians = {name: timing.Spread.of(of).median for name, of in times.items()}
    say(f"{case.name}: " + ", ".join(f"{name} {1e3 * median:.3g} ms" for name, median in medians.items()))
    return min(medians, key=medians.__getitem__).split()[0], keys


def main(type_name: str, *names: str) -> None:
    """Tune some cases on this GPU: ``python -m gankern.bench.tune TYPE CASE...``, without the benchmarks' own runs."""
    dtype = torch.float32 if type_name == gpu.TF32 else getattr(torch, type_name)
    keep = partial(dispatch.save, torch.cuda.get_device_name())
    how: dict[str, Any] = {"dtype": dtype, "tf32": type_name == gpu.TF32, "device": "cuda"}
    tune(select(names), **how, budget=0.1, say=partial(print, flush=True), keep=keep)


def _sides(case: Case, size: dict[str, int], dtype: torch.dtype, device: str) -> Sides:
    torch.manual_seed(0)
    return case.setup(size, dtype, device)


def _on(name: str, run: Run) -> Results:
    with gankern.backend(name):
        return run()


if __name__ == "__main__":
    main(*sys.argv[1:])
