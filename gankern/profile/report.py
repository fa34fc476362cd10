"""Tables of a profile on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from gankern.bench.results import OURS, STOCK
from gankern.profile.meters import OTHER
from gankern.profile.results import Limits, Phase, ProfileReport, StepProfile

SIDES = ("phase", "stock, ms", "share", "gankern, ms", "share", "saved, ms")
DETAIL = (
    "phase",
    "ms",
    "share",
    "GFLOP",
    "of peak",
    "MB",
    "of copy",
    "bound by",
    "calls",
    "faults",
    "MB alloc.",
    "worth, ms",
)
LEGEND = (
    "Shares of the step. GFLOP: products and convolutions; of peak, of copy: the rate against a large matrix product's "
    "and a copy's, measured at the start (in a cache a rate may pass the copy's). Bound by: the largest of what "
    "arithmetic, memory and calls would take by themselves. Worth: the time above the larger of arithmetic and memory."
)


def show(report: ProfileReport, console: Console) -> None:
    """Print the comparison, each side in detail, and the advice."""
    console.print(report.subject, style="bold", markup=False)
    if len(report.sides) > 1:
        console.print(
            _table("Where the step's time goes", SIDES, comparison_rows(report.sides[STOCK], report.sides[OURS]))
        )
    for name, profile in report.sides.items():
        console.print(
            _table(
                f"{name}: {headline(profile, report.overhead.get(name))}", DETAIL, detail_rows(profile, report.ceilings)
            )
        )
    if report.sides:
        console.print(LEGEND, style="dim", markup=False)
    for advice in report.advice:
        console.print(f"- {advice.text}", markup=False, highlight=False)
    for note in report.notes:
        console.print(note, style="dim", markup=False)
    console.print(ceilings_line(report.ceilings), style="dim", markup=False)


def format_profile(profile: StepProfile, ceilings: dict[str, float] | None = None) -> str:
    """A profile's table as text.

    Parameters
    ----------
    profile : StepProfile
    ceilings : dict of str to float, optional
        As `gankern.bench.ceilings.measure` returns them; without them rates and bounds stay empty.

    Returns
    -------
    str
    """
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(_table(headline(profile), DETAIL, detail_rows(profile, ceilings)))
    return console.export_text()


def headline(profile: StepProfile, overhead: float | None = None) -> str:
    """A step's time, and what surrounds it, in a line."""
    seconds = profile.seconds
    parts = [
        f"{seconds.median * 1e3:.2f} ms a step ({seconds.p20 * 1e3:.2f} to {seconds.p80 * 1e3:.2f})",
        f"{profile.steps} steps",
        f"{profile.device}, {profile.dtype}",
        "" if profile.peak_bytes is None else f"peak {profile.peak_bytes / 1e6:.1f} MB",
        "" if overhead is None else f"profiling adds {overhead:.1%}",
    ]
    return ", ".join(filter(None, parts))


def comparison_rows(stock: StepProfile, ours: StepProfile) -> list[list[str]]:
    """Cells under `SIDES`."""
    rows = []
    for name in phase_names(stock, ours):
        sides = [stock.phase(name), ours.phase(name)]
        rows.append([_indented(name), *_cells(sides, [stock.mean_seconds, ours.mean_seconds])])
        if name == "penalty":
            whole = [_whole(profile, name) for profile in (stock, ours)]
            rows[-1] = [name, *_cells(whole, [stock.mean_seconds, ours.mean_seconds])]
    step = [Phase("", stock.mean_seconds), Phase("", ours.mean_seconds)]
    return [*rows, ["step", *_cells(step, [stock.mean_seconds, ours.mean_seconds])]]


def phase_names(*profiles: StepProfile) -> list[str]:
    """Phases of several profiles, each group's parts under it."""
    names = list(dict.fromkeys(phase.name for profile in profiles for phase in profile.phases))
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    grouped = [name for group in groups if group != OTHER for name in dict.fromkeys([group, *_parts(names, group)])]
    return [*grouped, OTHER]


def _parts(names: Iterable[str], group: str) -> list[str]:
    return [name for name in names if name.startswith(f"{group}/")]


def _whole(profile: StepProfile, group: str) -> Phase | None:
    seconds = profile.seconds_of(group)
    return Phase(group, seconds) if seconds else None


def _cells(sides: Sequence[Phase | None], steps: Sequence[float]) -> list[str]:
    cells = []
    for phase, step in zip(sides, steps, strict=True):
        cells += ["", ""] if phase is None else [f"{phase.seconds * 1e3:.2f}", f"{phase.seconds / step:.1%}"]
    stock, ours = (0.0 if phase is None else phase.seconds for phase in sides)
    return [*cells, f"{(stock - ours) * 1e3:+.2f}"]


def detail_rows(profile: StepProfile, ceilings: dict[str, float] | None) -> list[list[str]]:
    """Cells under `DETAIL`."""
    rows = []
    for name in phase_names(profile):
        phase = profile.phase(name)
        if phase is None:
            rows.append([name, *[""] * (len(DETAIL) - 1)])
        else:
            rows.append(_detail(phase, profile, ceilings))
    return rows


def _detail(phase: Phase, profile: StepProfile, ceilings: dict[str, float] | None) -> list[str]:
    limits = Limits.of(phase, profile.dtype, ceilings) if ceilings else Limits(None, None, None)
    seconds = max(phase.seconds, 1e-12)
    return [
        _indented(phase.name),
        f"{phase.seconds * 1e3:.2f}",
        f"{phase.seconds / profile.mean_seconds:.1%}",
        _amount(phase.flops, 1e9, ".3f"),
        f"{limits.compute / seconds:.0%}" if limits.compute else "",
        _amount(phase.bytes, 1e6, ".1f"),
        f"{limits.memory / seconds:.0%}" if limits.memory else "",
        limits.bound or "",
        str(phase.calls) if phase.calls else "",
        f"{phase.page_faults:.0f}" if phase.page_faults >= 0.5 else "",
        _amount(phase.allocated, 1e6, ".1f"),
        "" if limits.floor is None else f"{max(0.0, phase.seconds - limits.floor) * 1e3:.2f}",
    ]


def _amount(value: int | None, unit: float, form: str) -> str:
    return f"{value / unit:{form}}" if value else ""


def _indented(name: str) -> str:
    group, _, part = name.partition("/")
    return f"  {part}" if part else group


def ceilings_line(ceilings: dict[str, float]) -> str:
    """What was measured at the start."""
    return (
        f"Ceilings: float32 product {ceilings['float32_flops'] / 1e9:.0f} GFLOP/s, bfloat16 "
        f"{ceilings['bfloat16_flops'] / 1e9:.0f} GFLOP/s, copy {ceilings['copy_bytes'] / 1e9:.1f} GB/s "
        f"(in a cache {ceilings['cached_copy_bytes'] / 1e9:.1f}), call {ceilings['call_seconds'] * 1e6:.2f} us"
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table
