"""What a run of the benchmarks leaves behind, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from gankern.bench.timing import Spread

SCHEMA = 1
OURS = "gankern"
STOCK = "stock"

Status = Literal["ok", "wrong", "failed", "skipped"]
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One side: seconds per call, and bytes at the peak of a call above what was held before it."""

    seconds: Spread
    peak_bytes: int | None = None


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
        Operations of one call of stock, as torch counts them; on a GPU only.
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
    """Everything about one run; `machine` is `gankern.info()`."""

    command: str
    machine: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    training: list[TrainingResult] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def right(self) -> bool:
        """Whether nothing was wrong and nothing failed."""
        statuses = [case.status for case in self.cases] + [training.status for training in self.training]
        return all(status in ("ok", "skipped") for status in statuses)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            Where the file is of another schema.
        """
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {data.get('schema')!r}, expected {SCHEMA}")
        return _build(cls, data)


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
