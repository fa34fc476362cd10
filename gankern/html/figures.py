"""Figures of matplotlib as inline SVG: for light and dark screens, wide and narrow ones."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from markupsafe import Markup

from gankern.html.palettes import DARK, LIGHT, Palette
from gankern.html.templates import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Inches of 72 points. At these sizes 9 points are 12 pixels on a laptop and on a phone of 375 pixels.
WIDTHS = {"wide": 8.6, "narrow": 3.5}
FONT_POINTS = 9
LEGEND_COLUMNS = {"wide": 4, "narrow": 2}

# Ids are global in a page, and matplotlib gives every figure the same ones.
_number = itertools.count()


def figure(
    draw: Callable[[Axes, Palette], object], *, label: str, caption: str = "", height: float | None = None
) -> Markup:
    """Draw a figure; the page shows the drawing that fits the screen.

    Parameters
    ----------
    draw : callable
        ``draw(axes, palette)`` paints a matplotlib Axes. It is called once for each palette and each width. Artists
        with a label are listed in a legend under the axes.
    label : str
        What the figure shows, for people who cannot see it.
    caption : str
        Text under the figure.
    height : float, optional
        Inches; by default in proportion to the width.

    Returns
    -------
    markupsafe.Markup
        HTML with the drawings as inline SVG.
    """
    drawings = [
        {"palette": palette.name, "width": width, "svg": Markup(_draw(draw, palette, width, height))}
        for palette in (LIGHT, DARK)
        for width in WIDTHS
    ]
    return render("figure.html.jinja", drawings=drawings, label=label, caption=caption)


def _draw(draw: Callable[[Axes, Palette], object], palette: Palette, width: str, height: float | None) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inches = WIDTHS[width]
    with _style(palette):
        drawing = Figure(figsize=(inches, height or max(0.42 * inches, 2.6)), layout="constrained")
        FigureCanvasSVG(drawing)
        axes = drawing.add_subplot()
        draw(axes, palette)
        if axes.get_legend_handles_labels()[0]:
            drawing.legend(loc="outside lower left", ncols=LEGEND_COLUMNS[width])
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue())


def plain_ticks(axes: Axes, which: str, form: str = "{:g}") -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    which : {"x", "y"}
    form : str
        Format of a number.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    base = axis.get_transform().base  # type: ignore[attr-defined]
    narrow = math.log10(high / low) < 2
    axis.set_major_locator(
        LogLocator(base=base, subs=(1.0, 2.0, 5.0) if narrow and base == 10 else (1.0,), numticks=20)
    )
    axis.set_major_formatter(lambda value, _: form.format(value))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _style(palette: Palette) -> Iterator[None]:
    import matplotlib
    from cycler import cycler

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "gankern",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": FONT_POINTS,
        "axes.titlesize": FONT_POINTS,
        "legend.frameon": False,
        "text.color": palette.text,
        "figure.facecolor": palette.surface,
        "axes.facecolor": palette.surface,
        "axes.edgecolor": palette.muted,
        "axes.labelcolor": palette.text,
        "axes.prop_cycle": cycler(color=palette.series),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": palette.muted,
        "xtick.labelcolor": palette.text,
        "ytick.color": palette.muted,
        "ytick.labelcolor": palette.text,
        "grid.color": palette.rule,
    }
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        yield


def _inline(svg: str) -> str:
    """Leave what a page can hold: no prolog, no style for all of it, no fixed size, no id that another drawing has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    prefix = f"f{next(_number)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return svg.replace("url(#", f"url(#{prefix}").strip()
