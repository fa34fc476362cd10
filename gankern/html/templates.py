"""The page's templates; whatever they are given is escaped unless it is Markup."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gankern.html", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str) -> Markup:
    """A dotted name that a narrow column may break after its dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(text))))


def render(template: str, **values: object) -> Markup:
    return Markup(_environment().get_template(template).render(**values))
