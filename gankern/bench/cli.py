"""`gankern bench`: stock PyTorch and gankern, side by side."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from gankern import arguments, dispatch
from gankern.arguments import UsageError, closest
from gankern.bench import ceilings, own, page
from gankern.bench import report as reports
from gankern.bench.cases import CASES, Case, select
from gankern.bench.cases.own import fusion_notes, own_cases
from gankern.bench.compare import compare, machine_differences
from gankern.bench.results import COMPILED, Report
from gankern.bench.session import Session
from gankern.commands import VARIANTS
from gankern.dispatch import TF32

DTYPES = {"float32": torch.float32, TF32: torch.float32, "bfloat16": torch.bfloat16}
NO_COMPILE_QUICK = {name: f"takes its time; `--against {name}` has it" for name in COMPILED}
QUICK_REPEAT, QUICK_SECONDS, QUICK_TRAIN_SECONDS = 5, 0.5, 10.0


def run(args: argparse.Namespace) -> int:
    """Run `gankern bench`.

    Returns
    -------
    int
        0; 1 where a result was wrong, or slower than a stored one; 130 after Ctrl-C, with the results so far written.

    Raises
    ------
    UsageError
        For an argument that cannot be used.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if args.list:
        for case in CASES.values():
            console.print(f"{case.name:42}{case.measures}", markup=False, highlight=False)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device = arguments.find_device(args.device)
    if args.main and device.type != "cpu":
        raise UsageError("argument --device: --main runs on the CPU; name cases instead")
    if args.tune and device.type != "cuda":
        raise UsageError(f"argument --tune: needs --device cuda; got {args.device!r}")
    if args.dtype == TF32 and device.type != "cuda":
        raise UsageError(f"argument --dtype: tf32 needs --device cuda; got {args.device!r}")
    report = Report(shlex.join(["gankern", *sys.argv[1:]]), _machine(device))
    session = _session(args, report)
    old = None if args.compare is None else _stored(args, report)
    cases = _cases(args, report, device, old)
    sweeps = _sweeps(args, cases)
    arguments.make_folder("--out", args.out)
    interrupted = False
    try:
        with session.progress:
            report.machine["ceilings"] = ceilings.measure(device)
            session.run_cases(cases, main=args.main)
            session.run_sweeps(sweeps)
            if args.tune:
                _tune(args, cases, console)
            if args.main:
                seconds = QUICK_TRAIN_SECONDS if args.quick else args.train_seconds
                session.run_training(seconds=seconds, batch=args.batch_size, out=args.out)
    except KeyboardInterrupt:
        interrupted = True
        if not (report.cases or report.training):
            raise
        print("gankern bench: interrupted: what was done so far is kept", file=sys.stderr)
    if old is not None:
        report.comparison = compare(old, report, str(args.compare))
    reports.show(report, console)
    _save(report, args, console)
    if interrupted:
        return 130
    option = "backend" if args.backend else "against" if args.against else None
    if option and report.cases and all(case.status == "skipped" for case in report.cases):
        raise UsageError(f"argument --{option}: {report.cases[0].message}")
    regressed = report.comparison is not None and report.comparison.regressed
    return 0 if report.right and not regressed else 1


def _tune(args: argparse.Namespace, cases: Sequence[Case], console: Console) -> None:
    from gankern.bench.tune import tune

    gpu = torch.cuda.get_device_name(args.device)
    how: dict[str, Any] = {"dtype": DTYPES[args.dtype], "tf32": args.dtype == TF32, "device": args.device}
    tune(cases, **how, say=console.print, keep=partial(dispatch.save, gpu))
    console.print(f"wrote {dispatch.path(gpu)}", style="dim", soft_wrap=True)


def _machine(device: torch.device) -> dict[str, object]:
    import gankern

    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return {**gankern.info(), "device": str(device)}


def _session(args: argparse.Namespace, report: Report) -> Session:
    if args.backend and (reason := report.machine["backends"].get(args.backend)):
        raise UsageError(f"argument --backend: {args.backend} is not available: {reason}")
    return Session(
        report,
        keep=partial(report.save, _json(args)),
        dtype=DTYPES[args.dtype],
        tf32=args.dtype == TF32,
        device=args.device,
        size={"batch": args.batch_size} if args.batch_size else {},
        backend=args.backend,
        against=_variants(args.against),
        repeat=min(args.repeat, QUICK_REPEAT) if args.quick else args.repeat,
        budget=min(args.seconds, QUICK_SECONDS) if args.quick else args.seconds,
        compile_seconds=args.compile_seconds,
        without=NO_COMPILE_QUICK if args.quick and args.against is None else {},
    )


def _stored(args: argparse.Namespace, report: Report) -> Report:
    """The result to compare with, if it is of this machine and dtype."""
    try:
        old = Report.load(args.compare)
    except OSError as error:
        raise UsageError(f"argument --compare: {args.compare}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"argument --compare: {error}") from error
    differences = machine_differences(old.machine, report.machine)
    if differences:
        raise UsageError(f"argument --compare: {args.compare} is of another machine: {', '.join(differences)}")
    kinds = {(case.dtype, case.device) for case in old.cases}
    if (args.dtype, args.device) not in kinds:
        had = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds)) or "nothing"
        raise UsageError(f"argument --compare: {args.compare} has {had}, not {args.dtype} on {args.device}")
    return old


def _cases(args: argparse.Namespace, report: Report, device: torch.device, old: Report | None) -> list[Case]:
    """The cases to run: those named, those of the user's networks, those of a stored result, or every op."""
    mine: list[Case] = []
    if args.critic is None:
        for option in ("generator", "shape", "latent", "loss", "labels"):
            if getattr(args, option) is not None:
                raise UsageError(f"argument --{option}: needs --critic")
    else:
        subject = _subject(args, device)
        mine = own_cases(subject)
        report.notes.update(fusion_notes(subject))
    names = args.cases
    if old is not None and not names and not mine:
        names = [case.name for case in old.cases if case.name in CASES]
        if not names:
            raise UsageError(f"argument --compare: {args.compare} holds other cases; run as then: {old.command}")
    try:
        return mine + (select(names) if names or not mine else [])
    except KeyError as unknown:
        known = ", ".join(CASES)
        hint = closest(unknown.args[0], {part for name in CASES for part in (name, name.partition(".")[0])})
        raise UsageError(f"argument CASE: unknown case {unknown.args[0]!r}{hint}; known: {known}") from None


def _subject(args: argparse.Namespace, device: torch.device) -> own.Subject:
    if args.shape is None:
        raise UsageError("argument --shape: needed with --critic, such as 3,64,64")
    torch.manual_seed(0)
    subject = own.Subject(
        own.build("--critic", args.critic),
        None if args.generator is None else own.build("--generator", args.generator),
        args.shape,
        args.latent or (),
        args.labels,
        args.loss or own.LOSSES[0],
        device,
        DTYPES[args.dtype],
    )
    subject.check(args.batch_size or 4)
    return subject


def _sweeps(args: argparse.Namespace, cases: Sequence[Case]) -> list[tuple[Case, str, Sequence[int]]]:
    """Cases with a dimension and sizes of it: the main one's own with --sweep, those given with --sizes."""
    given: list[tuple[str, Sequence[int]]] = []
    for text in args.sizes:
        dimension, _, sizes = text.partition("=")
        try:
            given.append((dimension, arguments.shape(sizes)))
        except argparse.ArgumentTypeError:
            raise UsageError(f"argument --sizes: expected a dimension and sizes, batch=8,16; got {text!r}") from None
        if not any(dimension in case.size for case in cases):
            names = dict.fromkeys(name for case in cases for name in case.size)
            known = f"{closest(dimension, names)}; there are {', '.join(names)}"
            raise UsageError(f"argument --sizes: no case has a dimension {dimension!r}{known}")
    sweeps = [(case, dimension, sizes) for case in cases for dimension, sizes in given if dimension in case.size]
    if args.sweep:
        named = {dimension for dimension, _ in given}
        mains = [(case, *next(iter(case.sizes.items()))) for case in cases if case.sizes]
        sweeps += [(case, dimension, sizes) for case, dimension, sizes in mains if dimension not in named]
    return sweeps


def _variants(names: str | None) -> list[str] | None:
    if names is None:
        return None
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in VARIANTS:
            raise UsageError(
                f"argument --against: unknown variant {name!r}{closest(name, VARIANTS)}; known: {', '.join(VARIANTS)}"
            )
    return chosen


def _json(args: argparse.Namespace) -> Any:
    return args.json or args.out / "bench.json"


def _save(report: Report, args: argparse.Namespace, console: Console) -> None:
    json, html = _json(args), args.html or args.out / "bench.html"
    report.save(json)
    page.write(report, html)
    written = [json, html]
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(reports.markdown(report))
        written.append(args.markdown)
    written += [args.out / f"digits-{result.model}.png" for result in report.training]
    console.print("wrote " + ", ".join(map(str, written)), style="dim", soft_wrap=True)
