"""Colours of the page and of its figures, for light and dark screens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """Colours as ``#rrggbb``. Text stands out from `surface` by 4.5:1, lines and bars by 3:1.

    Attributes
    ----------
    name : {"light", "dark"}
    page, surface : str
        Behind everything, and behind figures and tables.
    text, muted : str
        Text, and text of less weight.
    rule : str
        Grid lines and borders; they carry no meaning.
    accent, better, worse : str
        Links and lone series; faster than the other side, slower or wrong.
    series : tuple of str
        Lines and bars of several series, in order; the first eight are told apart by the colour-blind too.
    """

    name: str
    page: str
    surface: str
    text: str
    muted: str
    rule: str
    accent: str
    better: str
    worse: str
    series: tuple[str, ...]


LIGHT = Palette(
    name="light",
    page="#f6f7f9",
    surface="#ffffff",
    text="#1c2128",
    muted="#57606a",
    rule="#d5dae1",
    accent="#1f5fbf",
    better="#1f5fbf",
    worse="#b34700",
    series=(
        "#1f5fbf",
        "#b34700",
        "#117a52",
        "#8a3fb0",
        "#8a6d00",
        "#a8275c",
        "#57606a",
        "#00788a",
        "#d01fd0",
        "#2f4a00",
        "#471259",
        "#f0407f",
        "#7d7de0",
        "#0b0b9e",
    ),
)
DARK = Palette(
    name="dark",
    page="#0f1318",
    surface="#171c23",
    text="#e4e8ee",
    muted="#a0aab6",
    rule="#343c47",
    accent="#78b0ff",
    better="#78b0ff",
    worse="#ff9d57",
    series=(
        "#78b0ff",
        "#ff9d57",
        "#4fd19b",
        "#cf9bf0",
        "#e0c04a",
        "#ff8bb5",
        "#a0aab6",
        "#4fd0e0",
        "#5c8a00",
        "#b436f5",
        "#e8432a",
        "#2f7fd6",
        "#7dff3a",
        "#ff3dd8",
    ),
)
