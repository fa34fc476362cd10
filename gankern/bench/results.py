"""What a run of the benchmarks leaves behind, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from gankern._files import write_file
from gankern.bench.timing import Spread

SCHEMA = 1
OURS = "gankern"
STOCK = "stock"
#: Stock variants that torch.compile makes: of the forward or the penalty alone, and of the whole step.
COMPILED = ("compile", "compile_step")

Status = Literal["ok", "wrong", "failed", "skipped"]
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One side: seconds per call, and bytes at the peak of a call above what was held before it.

    Attributes
    ----------
    compile_seconds : float or None
        What its first two calls took above that, where torch.compile makes it.
    """

    seconds: Spread
    peak_bytes: int | None = None
    compile_seconds: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case. `sides`, `best` and `ratio` are there only where the results were right.

    Attributes
    ----------
    message : str
        Why there is no time, unless `status` is "ok".
    error : float or None
        The largest relative error of gankern's results against the reference.
    best, ours : str or None
        The fastest stock variant, and the fastest of gankern's sides.
    ratio : Spread or None
        Time of `best` / time of `ours`, over the rounds.
    moved_bytes : int or None
        Fewest bytes that one call must read and write, where memory bounds it.
    flops : int or None
        Operations of one call of stock, as torch counts them, or the fewest known.
    backend : str
        The one in force for gankern's sides.
    left_out : dict of str to str
        Stock variants that could not run, and why.
    """

    name: str
    measures: str
    dtype: str
    device: str
    size: dict[str, int]
    status: Status
    message: str = ""
    error: float | None = None
    tolerance: float | None = None
    work: int | None = None
    unit: str = ""
    moved_bytes: int | None = None
    flops: int | None = None
    rounds: int = 0
    calls: int = 0
    sides: dict[str, Measured] = field(default_factory=dict)
    best: str | None = None
    ours: str | None = None
    ratio: Spread | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    backend: str = "auto"


@dataclass(frozen=True)
class Sweep:
    """A case at several sizes of one dimension, smallest first."""

    name: str
    dimension: str
    points: list[CaseResult] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """How a case has changed since a stored result; see `gankern.bench.compare`.

    Attributes
    ----------
    old, new : Spread or None
        Ratio of a stock variant's time to gankern's, then and now.
    change : float or None
        Median of new / median of old: below 1 gankern has lost.
    message : str
        What was compared, or why it cannot be.
    """

    name: str
    verdict: Literal["slower", "faster", "within noise", "broken", "not compared"]
    old: Spread | None = None
    new: Spread | None = None
    change: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Comparison:
    """Verdicts against a stored result, and what else differs between the two runs."""

    path: str
    differences: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def regressed(self) -> bool:
        """Whether anything is slower or no longer right."""
        return any(verdict.verdict in ("slower", "broken") for verdict in self.verdicts)


@dataclass(frozen=True)
class TrainingResult:
    """A model trained twice, stock and gankern, iteration by iteration in turn.

    Attributes
    ----------
    images : int
        Real images that one iteration consumes.
    checked : int
        Iterations after which losses and parameters were compared.
    loss_error, parameter_error : float or None
        See `gankern.bench.training.agreement`.
    sides : dict of str to Measured
        Of one iteration, under "stock" and "gankern".
    """

    model: str
    status: Status
    message: str = ""
    batch_size: int = 0
    n_critic: int = 0
    images: int = 0
    iterations: int = 0
    checked: int = 0
    loss_error: float | None = None
    parameter_error: float | None = None
    sides: dict[str, Measured] = field(default_factory=dict)
    ratio: Spread | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)

    def images_per_second(self, side: str) -> float:
        """Real images a second at the median iteration."""
        return self.images / self.sides[side].seconds.median


@dataclass
class Report:
    """Everything about one run.

    Attributes
    ----------
    command : str
        As it was typed.
    machine : dict
        `gankern.info()`, with ``ceilings`` of `gankern.bench.ceilings` and the ``device`` that they are of.
    notes : dict of str to list of str
        Lines about the run, by heading.
    """

    command: str
    machine: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    training: list[TrainingResult] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    comparison: Comparison | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def right(self) -> bool:
        """Whether nothing was wrong and nothing failed."""
        points = [point for sweep in self.sweeps for point in sweep.points]
        statuses = [result.status for result in self.cases + points]
        statuses += [result.status for result in self.training]
        return all(status in ("ok", "skipped") for status in statuses)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            Where the file is something else, or of another schema.
        """
        try:
            data = json.loads(path.read_text())
            schema = data.get("schema")
            if schema == SCHEMA:
                return _build(cls, data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected a result of gankern bench, got something else: {error}") from error
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {schema!r}")


def _build(kind: type[T], value: Any) -> T:
    """Rebuild nested dataclasses from what `dataclasses.asdict` made of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    result: Any = value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        result = kind(**{name: _build(hints[name], item) for name, item in value.items()})
    elif origin is list:
        result = [_build(arguments[0], item) for item in value]
    elif origin is dict:
        result = {name: _build(arguments[1], item) for name, item in value.items()}
    elif origin in (types.UnionType, typing.Union) and value is not None:
        result = _build(arguments[0], value)
    return result
