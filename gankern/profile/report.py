"""Tables of a profile on a terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from gankern.bench.results import OURS, STOCK
from gankern.profile.meters import OTHER
from gankern.profile.results import Limits, Phase, ProfileReport, StepProfile

SIDES = ("phase", "stock, ms", "of step", "gankern, ms", "of step", "saved, ms")
TIME = ("phase", "ms", "of step", "Python, ms", "worth, ms", "bound by", "calls")
WORK = ("phase", "GFLOP", "GFLOP/s", "MB", "GB/s", "new MB")
PLANS = ("plan", "ms", "of step", "calls")
#: What the columns mean, in the order of the tables.
LEGEND = (
    "Python: when no operator ran, the median share over steps under torch's profiler. Worth: the time above what "
    "arithmetic and memory need at least. Bound by: which of arithmetic, memory and the calls themselves would take "
    "the longest alone. GFLOP: products and convolutions, as torch counts them. GFLOP/s and GB/s: with the share of "
    "the ceiling measured here; data that lies in a cache may pass the copy's. New MB: tensors made outside of "
    "gankern's workspace. Calls of plans: in one step, with the line of code that each stands for."
)
# Calls of plans that are shown of a phase.
_MOST_CALLS = 12
# Characters of a line where the output goes to no terminal.
_WIDTH = 140

Rows = list[list[str]]


def show(report: ProfileReport, console: Console) -> None:
    """Print the comparison, each side in detail, and the advice."""
    if report.subject:
        console.print(report.subject, style="bold", markup=False)
    if len(report.sides) > 1:
        console.print(
            _table(
                "Where the step's time goes: means over the middle steps",
                SIDES,
                comparison_rows(report.sides[STOCK], report.sides[OURS]),
            )
        )
    for line in variant_lines(report):
        console.print(line, markup=False, highlight=False)
    for name, profile in report.sides.items():
        line = headline(profile, report.overhead.get(name))
        console.print(f"\n{name}: {line}", style="bold", markup=False, highlight=False)
        for columns, rows in detail_tables(profile, report.ceilings):
            console.print(_table("", columns, rows))
            console.print()
    if report.sides:
        console.print(LEGEND, style="dim", markup=False)
    for advice in report.advice:
        console.print(f"- {advice.text}", markup=False, highlight=False)
    console.print(ceilings_line(report.ceilings), style="dim", markup=False)


def as_text(report: ProfileReport) -> str:
    """What `show` prints."""
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    console = Console(file=io.StringIO(), width=width, record=True)
    show(report, console)
    return console.export_text()


def headline(profile: StepProfile, overhead: float | None = None) -> str:
    """A step's time, and what surrounds it, in a line."""
    seconds = profile.seconds
    parts = [
        f"{seconds.median * 1e3:.2f} ms a step (median; {seconds.p20 * 1e3:.2f} to {seconds.p80 * 1e3:.2f})",
        f"{profile.steps} steps",
        f"{profile.device}, {profile.dtype}",
        "" if profile.peak_bytes is None else f"peak {profile.peak_bytes / 1e6:.1f} MB",
        "" if overhead is None else f"profiling adds {max(0.0, overhead):.1%}",
    ]
    return ", ".join(filter(None, parts))


def variant_lines(report: ProfileReport) -> list[str]:
    """Other forms of stock's step, a line each."""
    lines = []
    for name, variant in report.variants.items():
        line = f"stock, {name}: left out: {variant.left_out}"
        if variant.seconds and variant.ratio:
            line = (
                f"stock, {name}: {variant.seconds.median * 1e3:.2f} ms a step, {variant.ratio.median:.2f} times "
                f"gankern's ({variant.ratio.p20:.2f} to {variant.ratio.p80:.2f}); {variant.compile_seconds:.1f} s to "
                "compile"
            )
        lines.append(line)
    return lines


def comparison_rows(stock: StepProfile, ours: StepProfile) -> list[list[str]]:
    """Cells under `SIDES`."""
    sides = [profile.grouped() | {"step": profile.whole} for profile in (stock, ours)]
    steps = [profile.mean_seconds for profile in (stock, ours)]
    return [_compared(name, [side.get(name) for side in sides], steps) for name in in_order(*sides)]


def in_order(*sides: Iterable[str]) -> list[str]:
    """Names of all sides, parts under their group, the rest of the step and the step itself last."""
    names = list(dict.fromkeys(name for side in sides for name in side))
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    groups.sort(key=lambda group: (group == "step", group == OTHER))
    return [
        name
        for group in groups
        for name in sorted((n for n in names if n.partition("/")[0] == group), key=lambda n: n.endswith("/rest"))
    ]


def _compared(name: str, phases: Sequence[Phase | None], steps: Sequence[float]) -> list[str]:
    cells = [_indented(name)]
    for phase, step in zip(phases, steps, strict=True):
        cells += ["", ""] if phase is None else [f"{phase.seconds * 1e3:.2f}", f"{phase.seconds / step:.1%}"]
    stock, ours = (0.0 if phase is None else phase.seconds for phase in phases)
    return [*cells, f"{(stock - ours) * 1e3:+.2f}"]


def detail_tables(profile: StepProfile, ceilings: dict[str, float]) -> list[tuple[Sequence[str], Rows]]:
    """Columns and rows of the tables of one side: its phases' time, their work, and what plans call in them."""
    on_gpu = profile.device != "cpu"
    grouped = profile.grouped() | {"step": profile.whole}
    times, work = [], []
    for name in in_order(grouped):
        phase = grouped[name]
        members = [p for p in profile.phases if name in (p.group, p.name, "step")] or [phase]
        limits = Limits.of(members, profile.dtype, ceilings)
        times.append(
            [
                _indented(name),
                f"{phase.seconds * 1e3:.2f}",
                f"{phase.seconds / profile.mean_seconds:.1%}",
                _amount(phase.python_seconds, 1e-3, ".2f"),
                "" if limits.floor is None else f"{max(0.0, phase.seconds - limits.floor) * 1e3:.2f}",
                limits.bound or "",
                str(phase.calls) if phase.calls else "",
                _amount(phase.device_seconds, 1e-3, ".2f") if on_gpu else _amount(phase.page_faults, 1, ".0f"),
            ]
        )
        work.append(
            [
                _indented(name),
                _amount(phase.flops, 1e9, ".3f"),
                _rate(phase.flops, phase.seconds, limits.compute),
                _amount(phase.bytes, 1e6, ".1f"),
                _rate(phase.bytes, phase.seconds, limits.memory),
                _amount(phase.allocated, 1e6, ".1f"),
            ]
        )
    found: list[tuple[Sequence[str], Rows]] = [((*TIME, "kernels, ms" if on_gpu else "page faults"), times)]
    found += [(WORK, work)] if any(any(row[1:]) for row in work) else []
    return [*found, (PLANS, plan_rows(profile))] if profile.plan_calls else found


def plan_rows(profile: StepProfile) -> Rows:
    """Cells under `PLANS`: phases in which plans ran, and what they called for which line of code."""
    rows = []
    for phase in dict.fromkeys(call.phase for call in profile.plan_calls):
        calls = [call for call in profile.plan_calls if call.phase == phase]
        rest = calls[_MOST_CALLS:]
        shown = [(f"· {call}", [call]) for call in calls[:_MOST_CALLS]]
        shown += [(f"· {len(rest)} others", rest)] if rest else []
        for name, made in [(phase, calls), *shown]:
            seconds = sum(call.seconds for call in made)
            share = f"{seconds / profile.mean_seconds:.1%}"
            rows.append([name, f"{seconds * 1e3:.3f}", share, str(sum(call.calls for call in made))])
    return rows


def _amount(value: float | None, unit: float, form: str) -> str:
    text = f"{value / unit:{form}}" if value else ""
    return text if text != "0" else ""


def _rate(amount: int | None, seconds: float, least: float | None) -> str:
    """Giga a second, and the share of the ceiling."""
    return f"{amount / seconds / 1e9:.1f} ({least / seconds:.0%})" if amount and seconds and least else ""


def _indented(name: str) -> str:
    group, _, part = name.partition("/")
    return f"· {part}" if part else group


def ceilings_line(ceilings: dict[str, float]) -> str:
    """What was measured of the machine."""
    return (
        f"Ceilings: float32 product {ceilings['float32_flops'] / 1e9:.0f} GFLOP/s, bfloat16 "
        f"{ceilings['bfloat16_flops'] / 1e9:.0f} GFLOP/s, copy {ceilings['copy_bytes'] / 1e9:.1f} GB/s "
        f"(in a cache {ceilings['cached_copy_bytes'] / 1e9:.1f}), call {ceilings['call_seconds'] * 1e6:.2f} us"
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[list[str]]) -> Table:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 0), show_edge=False)
    for number, column in enumerate(columns):
        # Where a terminal is narrow, names break, then numbers: none is cut off.
        heading = column.replace(" ", "\n")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table
