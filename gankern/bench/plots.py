"""The figures of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from gankern import html
from gankern.bench.results import CaseResult, Measured
from gankern.bench.timing import Spread
from gankern.html import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches of a bar with its name above it, and of the axis.
_ROW, _AXIS = 0.4, 0.55
# From the middle of a bar up to its name, in rows.
_NAME = 0.32


def ratios(bars: Sequence[tuple[str, Spread]]) -> Markup:
    """A bar for each ratio from 1, with its spread."""

    def draw(axes: Axes, palette: Palette) -> None:
        for row, (name, ratio) in enumerate(bars):
            color = palette.better if ratio.median >= 1 else palette.worse
            axes.barh(row, ratio.median - 1, left=1, height=0.28, color=color)
            spread = [[max(0.0, ratio.median - ratio.p20)], [max(0.0, ratio.p80 - ratio.median)]]
            axes.errorbar(ratio.median, row, xerr=spread, fmt="none", ecolor=palette.text, elinewidth=1, capsize=2)
            _name_row(axes, palette, row, name, f"{ratio.median:.2f}x")
        axes.axvline(1, color=palette.text, linewidth=1)
        axes.set_xscale("log", base=2)
        least, most = min(r.p20 for _, r in bars), max(r.p80 for _, r in bars)
        axes.set_xlim(min(0.9, least * 0.95), max(2.0, most * 1.05))
        html.plain_ticks(axes, "x", "{:g}x")
        _rows_only(axes, len(bars))

    said = ", ".join(f"{name} {ratio.median:.2f}" for name, ratio in bars)
    return html.figure(draw, label=f"Stock time / gankern time: {said}", height=_height(len(bars)))


def shares(bars: Sequence[tuple[str, float, float]]) -> Markup:
    """Stock's and gankern's share of the roofline for each case."""

    def draw(axes: Axes, palette: Palette) -> None:
        for row, (name, stock, ours) in enumerate(bars):
            labels = ("fastest stock", "gankern") if row == 0 else (None, None)
            axes.barh(row, stock, height=0.16, color=palette.muted, label=labels[0])
            axes.barh(row + 0.17, ours, height=0.16, color=palette.accent, label=labels[1])
            _name_row(axes, palette, row, name, f"{ours:.0%}")
        axes.axvline(1, color=palette.text, linewidth=1)
        axes.set_xlim(0, max(1.02, *(1.05 * max(bar[1:]) for bar in bars)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _rows_only(axes, len(bars))

    said = ", ".join(f"{name} {stock:.0%} and {ours:.0%}" for name, stock, ours in bars)
    return html.figure(draw, label=f"Share of the roofline, stock and gankern: {said}", height=_height(len(bars)) + 0.3)


def line_points(
    points: Sequence[tuple[int, CaseResult]], value: Callable[[Measured], float]
) -> dict[str, list[tuple[int, float]]]:
    """Sizes and values of each side, gankern's sides first; zeros have no place on a logarithmic axis."""
    found: dict[str, list[tuple[int, float]]] = {}
    for size, point in points:
        for name, side in point.sides.items():
            if value(side) > 0:
                found.setdefault(name, []).append((size, value(side)))
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("gankern")))


def lines(series: dict[str, list[tuple[int, float]]], dimension: str, unit: str, label: str) -> Markup:
    """A line for each side over the sizes, both axes logarithmic."""
    sizes = sorted({size for line in series.values() for size, _ in line})

    def draw(axes: Axes, palette: Palette) -> None:
        for (name, line), color, marker in zip(series.items(), palette.series, "osD^vP*X", strict=False):
            axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
        axes.set(xscale="log", yscale="log", xlabel=dimension, ylabel=unit)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        html.plain_ticks(axes, "y")
        axes.grid(True)

    return html.figure(draw, label=label, caption=label)


def _height(rows: int) -> float:
    return _AXIS + _ROW * rows


def _name_row(axes: Axes, palette: Palette, row: int, name: str, value: str) -> None:
    """A row's name above its bar, and its value at the right end: no name then needs a margin."""
    # On a patch of its own, so that no line runs through it.
    patch = {"facecolor": palette.surface, "edgecolor": "none", "pad": 0.5}
    style: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "va": "center",
        "color": palette.text,
        "bbox": patch,
    }
    axes.text(0, row - _NAME, name, **style)
    axes.text(1, row - _NAME, value, ha="right", weight="bold", **style)


def _rows_only(axes: Axes, rows: int) -> None:
    axes.set_ylim(rows - 0.6, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
