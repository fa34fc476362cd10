"""The HTML page of a profile: stacked timeline, tables, roofline, advice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from gankern.bench.report import machine_line
from gankern.html import Cell, Palette, Section, code, figure, paragraph, plain_ticks, table, write_page
from gankern.profile import report as reports
from gankern.profile.results import Phase, ProfileReport, StepProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*X"


def save(report: ProfileReport, path: Path) -> None:
    """Write the page."""
    write_page(path, "gankern profile", list(_sections(report)), lead=report.subject)


def _sections(report: ProfileReport) -> Iterator[Section]:
    if report.sides:
        yield Section("Where the step's time goes", list(_overview(report)))
    if report.advice:
        yield Section("What to do about it", [paragraph(advice.text) for advice in report.advice])
    for name, profile in report.sides.items():
        line = reports.headline(profile, report.overhead.get(name))
        captions = (line, f"What the {name} step does in each phase", f"What plans call in the {name} step")
        tables = [
            table(columns, list(map(_cells, rows)), caption=caption)
            for (columns, rows), caption in zip(reports.detail_tables(profile, report.ceilings), captions, strict=False)
        ]
        legend = [paragraph(reports.LEGEND, muted=True)] if name == next(iter(report.sides)) else []
        yield Section(f"The {name} step by phase", [*tables, *legend])
    if any(point for name in report.sides for point in _points(report, name)):
        yield Section("Roofline", [_roofline_figure(report)])
    where = [paragraph(reports.ceilings_line(report.ceilings)), paragraph(machine_line(report.machine))]
    yield Section("Machine and command", [*where, code(report.command)])


def _overview(report: ProfileReport) -> Iterator[Markup]:
    yield figure(
        lambda axes, palette: _timeline(axes, palette, report),
        label="Stacked bars: the phases of a step of each side, in the order of the table",
        caption="Milliseconds of a step, phases and their parts in the order of the table.",
        height=1.8 + 0.6 * len(report.sides),
    )
    if len(report.sides) > 1:
        stock, ours = report.sides.values()
        rows = [_cells(row) for row in reports.comparison_rows(stock, ours)]
        yield table(reports.SIDES, rows, caption="Phases of the stock step and of gankern's, side by side")
    yield from map(paragraph, reports.variant_lines(report))


def _cells(row: list[str]) -> list[Cell | str]:
    return [row[0], *(Cell(text, _number(text)) for text in row[1:])]


def _number(text: str) -> float | None:
    try:
        return float(text.partition(" ")[0].removesuffix("%"))
    except ValueError:
        return None


def _leaves(profile: StepProfile) -> dict[str, Phase]:
    """The phases that have no parts, and all parts, by the name that the table has them under."""
    grouped = profile.grouped()
    groups = {name.partition("/")[0] for name in grouped if "/" in name}
    return {name: phase for name, phase in grouped.items() if name not in groups}


def _places(report: ProfileReport) -> dict[str, int]:
    """Each phase's place in the order of the table, all sides together: its colour is the same in every figure."""
    ordered = reports.in_order(*map(_leaves, report.sides.values()))
    return {name: place for place, name in enumerate(ordered)}


def _label(phase: Phase) -> str:
    return f"rest of {phase.group}" if phase.part == "rest" else phase.part or phase.name


def _timeline(axes: Axes, palette: Palette, report: ProfileReport) -> None:
    labelled: set[str] = set()
    places = _places(report)
    for row, profile in enumerate(report.sides.values()):
        left = 0.0
        for phase in sorted(_leaves(profile).values(), key=lambda phase: places[phase.name]):
            label = None if phase.name in labelled else _label(phase)
            labelled.add(phase.name)
            color = palette.series[places[phase.name] % len(palette.series)]
            width = phase.seconds * 1e3
            axes.barh(row, width, left=left, color=color, edgecolor=palette.surface, linewidth=0.8, label=label)
            left += width
    axes.set_yticks(range(len(report.sides)), list(report.sides))
    axes.invert_yaxis()
    axes.set_xlabel("ms")


def _roofline_figure(report: ProfileReport) -> Markup:
    names = list(report.sides)
    told = f"Filled: {names[-1]}, open: {names[0]}. " if len(names) > 1 else ""
    return figure(
        lambda axes, palette: _roofline(axes, palette, report),
        label="Roofline: rate of each phase against its operations per byte, under the measured ceilings",
        caption=f"{told}The sloped line is the copy's rate, the flat one the matrix product's.",
        height=4.4,
    )


def _points(report: ProfileReport, side: str) -> list[tuple[Phase, float, float]]:
    """Phases that have operations to count, with their operations a byte and operations a second."""
    return [
        (phase, phase.flops / phase.bytes, phase.flops / phase.seconds)
        for phase in _leaves(report.sides[side]).values()
        if phase.flops and phase.bytes and phase.seconds
    ]


def _roofline(axes: Axes, palette: Palette, report: ProfileReport) -> None:
    points = {side: _points(report, side) for side in report.sides}
    dtype = next(iter(report.sides.values())).dtype
    peak = report.ceilings.get(f"{dtype}_flops", report.ceilings["float32_flops"])
    intensities = [x for side in points.values() for _, x, _ in side]
    low, high = min(intensities) / 2, max(*intensities, peak / report.ceilings["copy_bytes"]) * 2
    knee = peak / report.ceilings["copy_bytes"]
    axes.plot(
        [low, knee, high], [low * report.ceilings["copy_bytes"] / 1e9, peak / 1e9, peak / 1e9], color=palette.muted
    )
    places = _places(report)
    labelled: set[str] = set()
    for side, found in reversed(points.items()):
        filled = side == list(points)[-1]
        for phase, x, y in found:
            place = places[phase.name]
            color = palette.series[place % len(palette.series)]
            axes.plot(
                x, y / 1e9, _MARKERS[place % len(_MARKERS)], color=color, linestyle="none",
                markerfacecolor=color if filled else "none",
                label=None if phase.name in labelled else _label(phase),
            )  # fmt: skip
            labelled.add(phase.name)
    axes.set(xscale="log", yscale="log")
    plain_ticks(axes, "x")
    plain_ticks(axes, "y")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    axes.grid(True)
