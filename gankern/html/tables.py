"""Tables whose numbers can be read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from gankern.html.templates import render

Tone = Literal["better", "worse", "muted"]


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place.

    Attributes
    ----------
    text : str
        As people read it.
    value : float or None
        The number behind it in full, kept as ``data-value``; aligns the cell to the right.
    tone : {"better", "worse", "muted"} or None
        Colour of the text.
    """

    text: str
    value: float | None = None
    tone: Tone | None = None


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, caption: str = "") -> Markup:
    """Make a table that scrolls sideways within its own box.

    Parameters
    ----------
    columns : sequence of str
        Headings. A cell carries its column's as ``data-column``, a row the text of its first cell as ``data-row``.
    rows : sequence of sequence of Cell or str
        As many cells as columns; the first one heads its row.
    caption : str
        What the table shows, for people who cannot see what is around it too.

    Returns
    -------
    markupsafe.Markup
        HTML; all text is escaped.

    Raises
    ------
    ValueError
        Where a row has more or fewer cells than there are columns.
    """
    cells = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"rows: expected {len(columns)} cells each, got {len(row)}")
    numeric = [any(row[i].value is not None for row in cells) for i in range(len(columns))]
    return render("table.html.jinja", columns=columns, rows=cells, numeric=numeric, caption=caption)
