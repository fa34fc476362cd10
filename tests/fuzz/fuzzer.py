"""Runs programs, makes failures small, counts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from fuzz.checks import CHECKS, Failure, Options, check
from fuzz.grammar import draw_program
from fuzz.program import Program


@dataclass
class Found:
    """A failure and the smallest program that has it."""

    seed: int
    failure: Failure
    source: str
    options: Options
    names: tuple[str, ...]

    @property
    def signature(self) -> tuple[str, ...]:
        """The same for failures that are likely of one cause."""
        message = re.sub(r"[\d.]+(e-?\d+)?|\[.*?\]", "#", self.failure.facts) if "raise" in self.failure.facts else ""
        return self.failure.kind, message, self.options.check.split(" ")[0], *sorted(self.names)

    def __str__(self) -> str:
        program = f"from fuzz.checks import compare\n\ncompare('''\\\n{self.source}''', {self.options})"
        return f"seed {self.seed}: {self.failure.kind}\n{self.failure.facts}\n\n{program}\n"


@dataclass
class Counts:
    programs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    ingredients: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.programs += other.programs
        for mine, theirs in zip(self._counters(), other._counters(), strict=True):
            mine.update(theirs)

    def _counters(self) -> tuple[Counter[str], ...]:
        return self.outcomes, self.checks, self.ingredients

    def __str__(self) -> str:
        lines = [f"{self.programs} programs"]
        for title, counter in zip(("outcomes", "checks", "ingredients"), self._counters(), strict=True):
            lines.append(f"{title}: " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))
        return "\n".join(lines)


def run(seed: int, counts: Counts | None = None, *, shrink: bool = True) -> Found | None:
    """The program of a seed; what failed, made small."""
    program = draw_program(seed, CHECKS)
    options = Options(**program.options, seed=seed)
    source, names = program.written()
    word, failure = check(source, options)
    if counts is not None:
        counts.programs += 1
        counts.outcomes[word] += 1
        counts.checks[options.check] += 1
        counts.ingredients.update(names)
    if failure is None:
        return None
    if shrink:
        program, options, failure = smallest(program, options, failure)
    source, names = program.written()
    return Found(seed, failure, source, options, tuple(sorted(names - {"head"})))


def smallest(program: Program, options: Options, failure: Failure, most: int = 150) -> tuple[Program, Options, Failure]:
    """Leave out and make plainer whatever can be, while it fails in the same way."""
    tried: set[tuple[str, str]] = set()
    budget = [most]

    def fails(candidate: Program, how: Options) -> Failure | None:
        key = candidate.source, str(how)
        if key in tried or budget[0] <= 0:
            return None
        tried.add(key)
        budget[0] -= 1
        _, again = check(key[0], how)
        return again if again is not None and again.kind == failure.kind else None

    progress = True
    while progress and budget[0] > 0:
        progress = False
        for candidate in program.smaller():
            again = fails(candidate, options)
            if again is not None:
                program, failure, progress = candidate, again, True
                break
        if progress:
            continue
        for how in options.plainer():
            plain = replace(program, options={**program.options, "extras": how.extras})
            again = fails(plain, how)
            if again is not None:
                program, options, failure, progress = plain, how, again, True
                break
    return program, options, failure
