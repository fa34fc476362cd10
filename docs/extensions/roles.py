"""Links in docstrings: Sphinx roles, as editors and Sphinx itself read them, become links between pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns ``:func:`gankern.fuse` `` into a link; names of other packages into code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, name: str) -> str:
    path = name
    if "." not in name:
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            return f"`{name}`"
    return f"[`{name}`][{path}]" if path.startswith("gankern.") else f"`{name}`"
