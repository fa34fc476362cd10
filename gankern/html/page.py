"""The page around the sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from gankern.html.palettes import DARK, LIGHT
from gankern.html.templates import render


@dataclass(frozen=True)
class Section:
    """A heading and what is under it: HTML blocks as `table`, `figure` and `paragraph` make them."""

    heading: str
    body: Sequence[Markup]


def paragraph(text: str, *, muted: bool = False) -> Markup:
    """Make a paragraph of escaped text."""
    return Markup('<p class="muted">{}</p>' if muted else "<p>{}</p>").format(text)


def code(text: str) -> Markup:
    """Make a block of escaped text as it would be typed, such as a command."""
    return Markup('<pre tabindex="0"><code>{}</code></pre>').format(text)


def render_page(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """Make an HTML page that needs nothing but itself: no script, no font, no request.

    Parameters
    ----------
    title : str
        Of the page and of the browser's tab.
    sections : sequence of Section
        In the order of the page.
    lead : str
        What the page says first, under the title.

    Returns
    -------
    str
        The page.
    """
    return render("page.html.jinja", title=title, lead=lead, sections=sections, light=LIGHT, dark=DARK)


def write_page(path: Path, title: str, sections: Sequence[Section], *, lead: str = "") -> None:
    """Write what `render_page` makes, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(title, sections, lead=lead), encoding="utf-8")
