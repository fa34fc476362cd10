"""Reports as one self-contained HTML page: tables, figures, light and dark. Needs jinja2 and matplotlib."""

from gankern.html.figures import figure, plain_ticks
from gankern.html.page import Section, code, paragraph, render_page, subheading, write_page
from gankern.html.palettes import DARK, LIGHT, Palette
from gankern.html.tables import Cell, Tone, table

__all__ = [
    "DARK",
    "LIGHT",
    "Cell",
    "Palette",
    "Section",
    "Tone",
    "code",
    "figure",
    "paragraph",
    "plain_ticks",
    "render_page",
    "subheading",
    "table",
    "write_page",
]
