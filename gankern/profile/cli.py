"""`gankern profile`: where a critic step's time goes, stock and on gankern."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import gankern
from gankern.arguments import UsageError, find_device, first_line, make_folder
from gankern.bench import ceilings
from gankern.bench.measure import Checked
from gankern.bench.own import Subject, build
from gankern.bench.results import OURS, STOCK
from gankern.profile import report as reports
from gankern.profile.advice import advise
from gankern.profile.feed import Feed, of_model
from gankern.profile.measure import Measurement
from gankern.profile.results import ProfileReport, Variant
from gankern.profile.sides import compiled_step, make_sides

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(args: argparse.Namespace) -> int:
    """Run `gankern profile`; return the exit code: 1 where a step fails, 130 after Ctrl-C.

    Raises
    ------
    UsageError
        For an argument that cannot be used.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    # Without it Kineto greets at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.manual_seed(0)
    subject = _subject(args)
    subject.check(args.batch_size)
    make_folder("--out", args.out)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    report = ProfileReport(_describe(args, subject), shlex.join(["gankern", *sys.argv[1:]]), gankern.info())
    traces = _traces(args)
    interrupted = False
    try:
        feed = Feed(subject, args.batch_size)
        with _progress() as progress:
            progress.add_task("compiling stock's step", total=None, visible=args.compile)
            compiled = compiled_step(feed, args.compile_seconds) if args.compile else Checked({}, 0.0, {}, {})
        measured = Measurement(make_sides(feed), traces, args.steps, compiled.runs)
        try:
            with _progress() as progress:
                task = progress.add_task("steps", total=1.0)
                measured.run(lambda share: progress.update(task, completed=share))
        except KeyboardInterrupt:
            interrupted = True
    except Exception as error:
        return _fail(f"a step of {args.model or args.critic} failed: {first_line(error)}", 1)
    # Last: malloc keeps more memory once it has seen large blocks freed, and steps would fault less than elsewhere.
    report.machine["ceilings"] = ceilings.measure(subject.device)
    report.sides, report.overhead = measured.profiles(), measured.overhead()
    report.variants = measured.variants(compiled.compiling)
    report.variants |= {name: Variant(left_out=why) for name, why in compiled.left_out.items()}
    report.advice = advise(measured, report.ceilings)
    reports.show(report, console)
    _save(report, args, traces, console)
    if interrupted:
        print("gankern profile: interrupted: what was done so far is kept", file=sys.stderr)
        return 130
    return 0


def _subject(args: argparse.Namespace) -> Subject:
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: expected a CPU or CUDA device, got {args.device!r}")
    if (args.model is None) == (args.critic is None):
        got = "neither" if args.model is None else "both"
        raise UsageError(f"argument MODEL: expected MODEL or --critic MODULE:FACTORY, got {got}")
    if args.model is not None:
        for name in ("generator", "labels", "latent"):
            if getattr(args, name) is not None:
                raise UsageError(f"argument --{name}: needs --critic; {args.model} has its own networks")
        return of_model(args.model, args.shape or (1, 32, 32), loss=args.loss, device=device, dtype=dtype)
    if args.shape is None:
        raise UsageError("argument --shape: needed by --critic: the shape of one sample, such as 3,64,64 or 2")
    critic = build("--critic", args.critic)
    generator = None if args.generator is None else build("--generator", args.generator)
    latent = args.latent or ()
    return Subject(critic, generator, args.shape, latent, args.labels, args.loss or "wgan-gp", device, dtype)


def _describe(args: argparse.Namespace, subject: Subject) -> str:
    parts = [
        f"{args.model or args.critic}: critic step of {subject.loss}",
        f"batch {args.batch_size} of {','.join(map(str, subject.shape))}",
        f"{sum(p.numel() for p in subject.critic.parameters())} parameters",
        "autocast to bfloat16" if subject.dtype is torch.bfloat16 else "float32",
        f"{torch.get_num_threads()} threads" if subject.device.type == "cpu" else str(subject.device),
    ]
    return ", ".join(parts)


def _traces(args: argparse.Namespace) -> dict[str, Path]:
    ours = args.trace or args.out / "trace-gankern.json"
    theirs = args.out / "trace-stock.json" if args.trace is None else ours.with_stem(f"{ours.stem}-stock")
    return {STOCK: theirs, OURS: ours}


def _save(report: ProfileReport, args: argparse.Namespace, traces: dict[str, Path], console: Console) -> None:
    path = args.json or args.out / "profile.json"
    report.save(path)
    report.save_page(args.out / "profile.html")
    written = [path, args.out / "profile.html", *(trace for trace in traces.values() if trace.exists())]
    console.print("wrote " + ", ".join(map(str, written)), style="dim", soft_wrap=True)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description:20}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _fail(message: str, code: int) -> int:
    print(f"gankern profile: error: {' '.join(message.split())}", file=sys.stderr)
    return code
