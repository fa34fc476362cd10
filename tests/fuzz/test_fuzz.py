"""Programs of the fuzzer against stock, and the fuzzer itself: the same everywhere, and it finds what is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzz.checks import CHECKS
from fuzz.fuzzer import run
from fuzz.grammar import draw_program
from gankern.compiler import planning
from gankern.ops.gradient_penalty import cpu

# Sizes decide as they do outside of tests.
pytestmark = pytest.mark.by_size

PROGRAMS, PARTS = 300, 2


@pytest.mark.parametrize("part", range(PARTS))
def test_programs_are_as_stock(part: int) -> None:
    """In a process of their own: there are programs of which torch itself dies."""
    each = PROGRAMS // PARTS
    arguments = ["-n", str(each), "--seed-start", str(part * each), "--workers", "1"]
    done = _python("-m", "fuzz", *arguments, env=os.environ | {"GANKERN_PLAN": "0"})
    assert done.returncode == 0, done.stdout


def _python(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = (env or dict(os.environ)) | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


PLANNED, PLANNED_PARTS = 50, 5


def _is_penalty(seed: int) -> bool:
    check = draw_program(seed, CHECKS).options["check"]
    return not check.startswith(("fuse", "explain", "meta", "create_graph"))


def _is_planned(seed: int) -> bool:
    check = draw_program(seed, CHECKS).options["check"]
    return _is_penalty(seed) or (check.startswith("fuse") and check not in ("fuse copied", "fuse traced"))


@pytest.mark.parametrize("part", range(PLANNED_PARTS))
def test_planned_programs_are_as_stock(part: int) -> None:
    """Penalties and fused modules, by a plan wherever one can be made, in strict mode, as `make fuzz` runs them all."""
    seeds = islice(filter(_is_planned, count(PROGRAMS)), part, PLANNED, PLANNED_PARTS)
    with planning(True):
        failures = [str(found) for found in map(run, seeds) if found is not None]
    assert not failures, "\n".join(failures)


def test_a_seed_is_one_program_in_every_process() -> None:
    code = "from fuzz.fuzzer import CHECKS, draw_program; print(*(draw_program(s, CHECKS).source for s in range(40)))"
    path = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.strip() == " ".join(draw_program(s, CHECKS).source for s in range(40)).strip()


def _wrong_tail(tail: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(grad: torch.Tensor, *options: Any) -> Any:
        loss, cotangent = tail(grad, *options)
        return loss, cotangent * (1 + 1e-6)

    return wrong


def test_a_wrong_penalty_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "tail", _wrong_tail(cpu.tail))
    found = next(filter(None, (run(seed) for seed in range(60))))
    assert found.failure.kind == "differs"
    assert "gradient" in found.failure.facts
    assert len(found.source.splitlines()) < 25


def test_a_wrong_plan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict mode gives the user stock's result: its report is the failure."""
    monkeypatch.setattr(cpu, "tail", _wrong_tail(cpu.tail))
    with planning(True):
        found = next(filter(None, (run(seed, shrink=False) for seed in filter(_is_penalty, range(60)))))
    assert found.failure.kind == "a plan differs from stock"
    assert re.search("the plan of .* differs from stock: .*gradient of", found.failure.facts)
