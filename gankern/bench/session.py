"""One run of the command: cases, sizes and training in turn, with what is done so far always in a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gankern.bench import report as reports
from gankern.bench.cases import Case
from gankern.bench.measure import run_case
from gankern.bench.results import COMPILED, CaseResult, Report, Sweep

# Shares of the main job's training time: DCGAN is the one that gets to readable digits within it.
TRAINING = {"dcgan": 0.55, "wgan": 0.2, "wgan-gp": 0.25}
TRAINING_BATCH = 64
NO_COMPILE = {name: f"compiles anew for each size; `--against {name}` has it" for name in COMPILED}


@dataclass
class Session:
    """What every case is run with, and the report that results go to as they come.

    Attributes
    ----------
    report : Report
    keep : callable
        Called after each result: what is done so far outlasts the process.
    dtype, tf32, device, size, backend, against, without, repeat, budget, compile_seconds
        As `gankern.bench.run_case` takes them.
    """

    report: Report
    keep: Callable[[], None] = lambda: None
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    device: str = "cpu"
    size: Mapping[str, int] = field(default_factory=dict)
    backend: str | None = None
    against: Sequence[str] | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    repeat: int = 25
    budget: float = 2.5
    compile_seconds: float = 90.0

    def __post_init__(self) -> None:
        console = Console(stderr=True)
        columns = TextColumn("{task.description:60}"), BarColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def run_cases(self, cases: Sequence[Case], *, main: bool) -> None:
        """Run each case at its size; `main` leaves out what the main job has no time for."""
        task = self.progress.add_task("cases", total=len(cases))
        for case in cases:
            self.progress.update(task, description=case.name)
            self.report.cases.append(self._run(case, {}, case.not_in_main if main else {}))
            self.keep()
            self.progress.advance(task)
        self.progress.update(task, description="cases")

    def run_sweeps(self, sweeps: Iterable[tuple[Case, str, Sequence[int]]]) -> None:
        """Run cases over the sizes of one dimension each."""
        for case, dimension, sizes in sweeps:
            task = self.progress.add_task(f"{case.name} against {dimension}", total=len(sizes))
            sweep = Sweep(case.name, dimension)
            self.report.sweeps.append(sweep)
            for size in sorted(set(sizes)):
                self._log(f"{case.name} {dimension}={size}")
                sweep.points.append(self._run(case, {dimension: size}, NO_COMPILE if self.against is None else {}))
                self.keep()
                self.progress.advance(task)

    def run_training(self, *, seconds: float, batch: int | None, out: Path) -> None:
        """Train the reference GANs on digits, stock and gankern, and draw what gankern's have learned."""
        from gankern import data
        from gankern.bench.training import train_both
        from gankern.train.samples import sample, save_grid

        images = data.load("digits", image_size=32)
        for model, share in TRAINING.items():
            task = self.progress.add_task(f"training {model}", total=1.0)
            result, gan = train_both(
                model,
                images,
                seconds=share * seconds,
                batch_size=batch or TRAINING_BATCH,
                progress=lambda done, task=task: self.progress.update(task, completed=done),  # type: ignore[misc]
            )
            self.report.training.append(result)
            self.keep()
            self.progress.update(task, completed=1.0)
            self._log(_line(reports.training_row(result)))
            save_grid(sample(gan, 64), out / f"digits-{model}.png")

    def _run(self, case: Case, size: Mapping[str, int], without: Mapping[str, str]) -> CaseResult:
        result = run_case(
            case,
            dtype=self.dtype,
            tf32=self.tf32,
            device=self.device,
            size={**self.size, **size},
            backend=self.backend,
            against=self.against,
            without={**self.without, **without},
            repeat=self.repeat,
            budget=self.budget,
            compile_seconds=self.compile_seconds,
            on_checked=self._say_right,
        )
        self._log(_line(reports.case_row(result)))
        return result

    def _say_right(self, result: CaseResult) -> None:
        text = f"{result.name}: right, relative error {result.error:.0e} of {result.tolerance:.0e} allowed"
        if self.progress.task_ids:
            self.progress.update(self.progress.task_ids[-1], description=text)
        self._log(text)

    def _log(self, line: str) -> None:
        """Say what is done where no bar can show it."""
        if self.progress.disable:
            print(line, file=sys.stderr, flush=True)


def _line(row: Sequence[reports.Cell]) -> str:
    return " ".join(filter(None, map(reports.on_one_line, row[:4])))
