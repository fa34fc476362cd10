"""The documentation: its examples run, its commands exist, and it leaves no public name out."""

from __future__ import annotations

import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gankern
from gankern import workspace
from gankern.bench.cases import select
from gankern.commands import build_parser

# Not on every machine that runs other tests.
pytest.importorskip("sybil")

from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ("", *(f".{name}" for name in sorted(gankern._MODULES)))


def check_commands(example: Example) -> None:
    """Parse every ``gankern ...`` line of a shell block, and find the cases that it names."""
    for line in example.parsed.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["gankern"]:
            args = build_parser().parse_args(words[1:])
            select(getattr(args, "cases", []))


PARSERS = (PythonCodeBlockParser(), CodeBlockParser("sh", check_commands), SkipParser())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # A guide adds a model of its own.
    monkeypatch.setattr(gankern.models, "MODELS", dict(gankern.models.MODELS))
    torch.manual_seed(0)
    limit = workspace._limit
    try:
        for example in Document.parse(str(page), *PARSERS).examples():
            example.evaluate()
    finally:
        workspace.set_limit(limit)


@pytest.mark.parametrize("module", [f"gankern{name}" for name in MODULES])
def test_api_of_every_public_name_is_on_a_page(module: str) -> None:
    pages = "\n".join(page.read_text() for page in PAGES)
    documented = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    # A module's own directive brings all that it lists.
    if module in documented:
        return
    public = {name: getattr(importlib.import_module(module), name) for name in importlib.import_module(module).__all__}
    names = {f"{module}.{name}" for name, value in public.items() if not isinstance(value, ModuleType)}
    # A function with the name of its module needs its full path, under a heading with the public one.
    shadowing = {name for name in names if find_spec(name)}
    assert shadowing <= set(re.findall(r"^ +heading: ([\w.]+)$", pages, re.MULTILINE))
    assert names - shadowing <= documented


def test_pages_build_without_a_warning_and_fetch_nothing(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    fetched = re.compile(r"""(?:\bsrc=|<link[^>]*\bhref=|@import |url\()["']?((?:https?:)?//[^"')\s]+)""")
    for file in tmp_path.rglob("*"):
        if file.suffix in (".html", ".css"):
            assert not fetched.findall(file.read_text()), file
