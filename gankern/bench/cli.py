"""`gankern bench`: stock PyTorch and gankern, side by side."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gankern.bench import ceilings
from gankern.bench import report as reports
from gankern.bench.cases import CASES, Case, select
from gankern.bench.measure import run_case
from gankern.bench.results import Report

VARIANTS = ("eager", "channels_last", "compile", "autocast", "cdist", "foreach", "func_grad", "graph")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Shares of the main job's training time: DCGAN is the one that gets to readable digits within it.
TRAINING = {"dcgan": 0.55, "wgan": 0.2, "wgan-gp": 0.25}
TRAINING_BATCH = 64
EXAMPLES = """examples:
  gankern bench                                     every op
  gankern bench gradient_penalty critic_step        two groups of cases
  gankern bench --main                              every op, then training on digits
  gankern bench --device cuda --dtype bfloat16      every op, on a GPU
  gankern bench critic_step.wgan-gp --dtype bfloat16 --against eager,autocast
"""


class UsageError(Exception):
    """An argument that cannot be used; the message is one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gankern bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a case or a group of cases; every op by default")
    parser.add_argument("--main", action="store_true", help="the main job: every op, then training on digits")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--quick", action="store_true", help="a few rounds only, for a first look")
    parser.add_argument("--repeat", type=_positive, default=25, metavar="N", help="rounds at most, default %(default)s")
    parser.add_argument("--seconds", type=float, default=2.5, help="seconds a case at most, default %(default)s")
    parser.add_argument(
        "--train-seconds", type=float, default=110.0, help="seconds of training in --main, default %(default)s"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda; default %(default)s")
    parser.add_argument("--batch", type=_positive, metavar="N", help="batch size in place of each case's own")
    parser.add_argument("--against", metavar="VARIANT,...", help=f"stock variants, of {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default bench.json in --out")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    parser.add_argument("--threads", type=_positive, metavar="N", help="torch's threads")


def run(args: argparse.Namespace) -> int:
    """Run `gankern bench`; return the exit code: 1 where a result was wrong, 2 for bad arguments, 130 after Ctrl-C."""
    try:
        cases = _selected(args.cases)
        against = _variants(args.against)
        device = _device(args.device)
        if args.main and device.type != "cpu":
            raise UsageError("argument --device: --main runs on the CPU; name cases instead")
    except UsageError as error:
        print(f"gankern bench: error: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if args.list:
        for case in CASES.values():
            console.print(f"{case.name:42}{case.measures}", markup=False, highlight=False)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)

    import gankern

    report = Report(command=shlex.join(["gankern", *sys.argv[1:]]), machine=gankern.info())
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        report.machine["ceilings"] = ceilings.measure(device)
    interrupted = False
    try:
        with _progress() as progress:
            _run_cases(report, cases, args, against, progress)
            if args.main:
                _run_training(report, args, progress)
    except KeyboardInterrupt:
        interrupted = True
    reports.show(report, console)
    _save(report, args, console)
    if interrupted:
        return 130
    return 0 if report.right else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks without the `gankern` command."""
    parser = argparse.ArgumentParser(prog="gankern bench", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _run_cases(
    report: Report, cases: Sequence[Case], args: argparse.Namespace, against: list[str] | None, progress: Progress
) -> None:
    task = progress.add_task("ops", total=len(cases))
    for case in cases:
        progress.update(task, description=case.name)
        result = run_case(
            case,
            dtype=DTYPES[args.dtype],
            device=args.device,
            batch=args.batch,
            against=against,
            without=case.not_in_main if args.main else None,
            repeat=min(args.repeat, 5) if args.quick else args.repeat,
            budget=0.5 if args.quick else args.seconds,
        )
        report.cases.append(result)
        progress.advance(task)
        _log(progress, " ".join(filter(None, reports.case_row(result)[:4])))
    progress.update(task, description="ops")


def _run_training(report: Report, args: argparse.Namespace, progress: Progress) -> None:
    from gankern import data
    from gankern.bench.training import train_both
    from gankern.train.samples import sample, save_grid

    images = data.load("digits", image_size=32)
    for model, share in TRAINING.items():
        task = progress.add_task(f"training {model}", total=1.0)
        result, gan = train_both(
            model,
            images,
            seconds=share * (10.0 if args.quick else args.train_seconds),
            batch_size=args.batch or TRAINING_BATCH,
            progress=lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
        )
        report.training.append(result)
        progress.update(task, completed=1.0)
        _log(progress, " ".join(filter(None, reports.training_row(result)[:4])))
        save_grid(sample(gan, 64), args.out / f"digits-{model}.png")


def _save(report: Report, args: argparse.Namespace, console: Console) -> None:
    path = args.json or args.out / "bench.json"
    report.save(path)
    written = [path]
    if reports.save_chart(report, args.out / "bench.png"):
        written.append(args.out / "bench.png")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(reports.markdown(report))
        written.append(args.markdown)
    if report.training:
        written += [args.out / f"digits-{result.model}.png" for result in report.training]
    console.print("wrote " + ", ".join(map(str, written)), style="dim", soft_wrap=True)


def _selected(names: Sequence[str]) -> list[Case]:
    try:
        return select(names)
    except KeyError as unknown:
        known = ", ".join(CASES)
        raise UsageError(f"argument CASE: unknown case {unknown.args[0]!r}; known: {known}") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"argument --device: {str(error).splitlines()[0]}") from None
    return device


def _variants(names: str | None) -> list[str] | None:
    if names is None:
        return None
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in VARIANTS:
            raise UsageError(f"argument --against: unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    return chosen


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:40}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _log(progress: Progress, line: str) -> None:
    """Say what is done where no bar can show it."""
    if progress.disable:
        print(line, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number
