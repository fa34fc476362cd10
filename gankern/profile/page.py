"""The HTML page of a profile: stacked timeline, tables, roofline, advice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from gankern.bench.report import machine_line
from gankern.html import Cell, Palette, Section, code, figure, paragraph, plain_ticks, table, write_page
from gankern.profile import report as reports
from gankern.profile.results import ProfileReport

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
        rows = [_cells(row) for row in reports.detail_rows(profile, report.ceilings)]
        yield Section(f"The {name} step by phase", [table(reports.detail_columns(profile), rows, caption=line)])
    if any(point for name in report.sides for point in _points(report, name)):
        yield Section("Roofline", [_roofline_figure(report), paragraph(reports.LEGEND, muted=True)])
    where = [paragraph(reports.ceilings_line(report.ceilings)), paragraph(machine_line(report.machine))]
    yield Section("Machine and command", [*where, code(report.command)])


def _overview(report: ProfileReport) -> Iterator[Markup]:
    yield figure(
        lambda axes, palette: _timeline(axes, palette, report),
        label="Stacked bars: the phases of a step of each side, in the order in which they run",
        caption="Milliseconds of a step. Lines part the parts of a phase, in the order of the table.",
        height=1.0 + 0.6 * len(report.sides),
    )
    if len(report.sides) > 1:
        stock, ours = report.sides.values()
        rows = [_cells(row) for row in reports.comparison_rows(stock, ours)]
        yield table(reports.SIDES, rows, caption="Phases of the stock step and of gankern's, side by side")


def _cells(row: list[str]) -> list[Cell | str]:
    return [row[0], *(Cell(text, _number(text)) for text in row[1:])]


def _number(text: str) -> float | None:
    try:
        return float(text.partition(" ")[0].removesuffix("%"))
    except ValueError:
        return None


def _timeline(axes: Axes, palette: Palette, report: ProfileReport) -> None:
    groups: dict[str, str] = {}
    for row, profile in enumerate(report.sides.values()):
        left = 0.0
        for phase in profile.phases:
            group = phase.group
            label = None if group in groups else group
            color = groups.setdefault(group, palette.series[len(groups) % len(palette.series)])
            width = phase.seconds * 1e3
            axes.barh(row, width, left=left, color=color, edgecolor=palette.surface, linewidth=0.8, label=label)
            left += width
    axes.set_yticks(range(len(report.sides)), list(report.sides))
    axes.invert_yaxis()
    axes.set_xlabel("ms")


def _roofline_figure(report: ProfileReport) -> Markup:
    return figure(
        lambda axes, palette: _roofline(axes, palette, report),
        label="Roofline: rate of each phase against its operations per byte, under the measured ceilings",
        caption="Filled: gankern, open: stock. The sloped line is the copy's rate, the flat one the matrix product's.",
        height=4.0,
    )


def _points(report: ProfileReport, side: str) -> list[tuple[str, float, float]]:
    """Phases that have operations to count: name, operations a byte, operations a second."""
    return [
        (phase.part or phase.name, phase.flops / phase.bytes, phase.flops / phase.seconds)
        for phase in report.sides[side].phases
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
    names = list(dict.fromkeys(name for side in points.values() for name, _, _ in side))
    for side, found in points.items():
        filled = side == list(points)[-1]
        for name, x, y in found:
            number = names.index(name)
            color = palette.series[number % len(palette.series)]
            axes.plot(
                x, y / 1e9, _MARKERS[number % len(_MARKERS)],
                color=color, markerfacecolor=color if filled else "none", label=name if filled else None,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    plain_ticks(axes, "x")
    plain_ticks(axes, "y")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    axes.grid(True)
