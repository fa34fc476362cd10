"""What a profile says, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gankern.bench import ceilings
from gankern.bench.timing import Spread

SCHEMA = 1
COMPUTE, MEMORY, OVERHEAD = "compute", "memory", "overhead"


@dataclass(frozen=True)
class Phase:
    """One phase of a step. Amounts are None where no step was counted or traced.

    Attributes
    ----------
    name : str
        Parts of a phase are ``"phase/part"``, and are not in the phase itself.
    seconds : float
        Mean over the steps kept.
    page_faults : float
        Mean over the same steps: first touches of freshly allocated memory, on the CPU.
    flops, bytes, calls, allocated : int or None
        Operations of products and convolutions, bytes that operators read and write, operators, and bytes of new
        tensors, those in gankern's workspace left out; of one step.
    device_seconds : float or None
        Of the GPU's kernels, in one step.
    python_seconds : float or None
        In which no operator ran, which is Python and autograd's engine: the median share over the traced steps.
    nodes : dict of str to float
        Shares of the phase that autograd's nodes take, by name, largest first.
    """

    name: str
    seconds: float
    page_faults: float = 0.0
    flops: int | None = None
    bytes: int | None = None
    calls: int | None = None
    allocated: int | None = None
    device_seconds: float | None = None
    python_seconds: float | None = None
    nodes: dict[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The phase that this is a part of, or its own name."""
        return self.name.partition("/")[0]

    @property
    def part(self) -> str:
        """Its name within the group; empty where it is none's part."""
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class PlanCall:
    """Calls of one kernel by gankern's plans, for one line of code and in one phase of a step.

    Attributes
    ----------
    phase : str
    kernel, by : str
        What runs, and the backend, or "torch".
    lines, module : str
        The user's code that it stands for, file and line, and the module that this is in.
    order : int
        Of the derivative that it is in; 0 in the forward.
    seconds : float
        Of one step, all calls together.
    calls : int
    """

    phase: str
    kernel: str
    by: str
    lines: str
    module: str
    order: int
    seconds: float
    calls: int

    def __str__(self) -> str:
        order = "second order" if self.order > 1 else ""
        return ", ".join(filter(None, (f"{self.kernel} ({self.by})", self.lines, self.module, order)))


@dataclass(frozen=True)
class StepProfile:
    """Where the time of one side's steps goes.

    Attributes
    ----------
    device, dtype : str
        Where it ran, and the type of most products.
    steps : int
        Timed steps.
    seconds : Spread
        Of a whole step.
    mean_seconds : float
        Over the steps kept, those from the 20th to the 80th percentile; the phases' seconds add up to it.
    phases : tuple of Phase
        In the order in which they first ran.
    peak_bytes : int or None
        That a step needs at its peak above what was held before it.
    plan_calls : tuple of PlanCall
        What plans run in it, in one step, the longest first.
    """

    device: str
    dtype: str
    steps: int
    seconds: Spread
    mean_seconds: float
    phases: tuple[Phase, ...]
    peak_bytes: int | None = None
    plan_calls: tuple[PlanCall, ...] = ()

    @property
    def whole(self) -> Phase:
        """The step as one phase."""
        return total("step", self.phases)

    def grouped(self) -> dict[str, Phase]:
        """Phases by name, each followed by its parts, which are in it here; what is in no part is ``"phase/rest"``."""
        found: dict[str, Phase] = {}
        for group in dict.fromkeys(phase.group for phase in self.phases):
            parts = [phase for phase in self.phases if phase.group == group]
            found[group] = total(group, parts)
            if len(parts) > 1:
                parts.sort(key=lambda phase: phase.name == group)
                found |= {
                    name: replace(p, name=name) for p in parts for name in [p.name if p.part else f"{group}/rest"]
                }
        return found

    def phase(self, name: str) -> Phase | None:
        """The phase of a name, without its parts."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def seconds_of(self, *names: str) -> float:
        """Seconds of phases with all their parts."""
        return sum(phase.seconds for phase in self.phases if phase.group in names)


def total(name: str, phases: Sequence[Phase]) -> Phase:
    """Sum of phases, one at least."""

    def added(amount: str) -> Any:
        found = [value for phase in phases if (value := getattr(phase, amount)) is not None]
        return sum(found) if found else None

    amounts = ("seconds", "page_faults", "flops", "bytes", "calls", "allocated", "device_seconds", "python_seconds")
    return Phase(name, *map(added, amounts))


@dataclass(frozen=True)
class Variant:
    """Another form of stock's step.

    Attributes
    ----------
    seconds : Spread or None
        Of a step; None where it was left out.
    compile_seconds : float or None
        What torch.compile took for it.
    ratio : Spread or None
        Its time / that of gankern's step, over the rounds.
    left_out : str
        Why there is no time.
    """

    seconds: Spread | None = None
    compile_seconds: float | None = None
    ratio: Spread | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Limits:
    """Least seconds of a phase by each of a machine's ceilings; None where nothing was counted.

    Attributes
    ----------
    compute, memory, calls : float or None
        Of the arithmetic, of the bytes moved and of the calls, each alone.
    floor : float or None
        Of arithmetic and memory together: what the same operators need at least.
    """

    compute: float | None = None
    memory: float | None = None
    calls: float | None = None
    floor: float | None = None

    @classmethod
    def of(cls, phases: Sequence[Phase], dtype: str, measured: dict[str, float]) -> Limits:
        """Hold what phases do, one after the other, against what `gankern.bench.ceilings.measure` found."""
        peak = measured.get(f"{dtype}_flops", measured["float32_flops"])
        rows = []
        for phase in phases:
            if phase.flops is None or phase.bytes is None or phase.calls is None:
                continue
            cached = phase.bytes <= ceilings.CACHED_BYTES * max(phase.calls, 1)
            memory = phase.bytes / measured[ceilings.CACHED_COPY if cached else ceilings.COPY]
            compute = phase.flops / peak
            rows.append((compute, memory, phase.calls * measured[ceilings.CALL], max(compute, memory)))
        return cls(*map(sum, zip(*rows, strict=True))) if rows else cls()

    @property
    def bound(self) -> str | None:
        """What takes the most of its time."""
        known = {COMPUTE: self.compute, MEMORY: self.memory, OVERHEAD: self.calls}
        found = {name: seconds for name, seconds in known.items() if seconds is not None}
        return max(found, key=found.__getitem__) if any(found.values()) else None


@dataclass(frozen=True)
class Advice:
    """Something to do, or to know.

    Attributes
    ----------
    text : str
        For people.
    saves_seconds : float or None
        By how much a step was measured to be shorter with it; None where it is no matter of time.
    """

    text: str
    saves_seconds: float | None = None


def describe_saving(change: str, saving: Spread, whole: float, of: str) -> str:
    """Say what a change did to the time `whole` of something, if it is more than the noise."""

    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.2f} ms"

    if saving.p20 > 0:
        return f"{change} was measured to save {ms(saving.median)} of {of}'s {ms(whole)} ({saving.median / whole:.0%})"
    if saving.p80 < 0:
        return f"{change} was measured to make {of} {ms(-saving.median)} longer: stay with stock"
    return f"{change} was measured to make no difference beyond the noise ({ms(saving.p20)} to {ms(saving.p80)})"


@dataclass
class ProfileReport:
    """Everything about one run of the profiler.

    Attributes
    ----------
    subject : str
        What was profiled, in a line.
    command : str
        Reproduces it.
    machine : dict
        ``gankern.info()``, with the measured ceilings under ``"ceilings"``.
    sides : dict of str to StepProfile
        By name, such as "stock" and "gankern".
    overhead : dict of str to float
        By side, the time of steps that are profiled / of steps that are not, less one.
    advice : list of Advice
    variants : dict of str to Variant
        Other forms of stock's step, such as the one that is compiled whole.
    """

    subject: str
    command: str
    machine: dict[str, Any]
    sides: dict[str, StepProfile] = field(default_factory=dict)
    overhead: dict[str, float] = field(default_factory=dict)
    advice: list[Advice] = field(default_factory=list)
    variants: dict[str, Variant] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def ceilings(self) -> dict[str, float]:
        """Measured ceilings of the machine."""
        return self.machine["ceilings"]

    def __str__(self) -> str:
        from gankern.profile.report import as_text

        return as_text(self)

    def save_page(self, path: Path | str) -> None:
        """Write as an HTML page: timeline, tables, roofline."""
        from gankern.profile.page import save

        save(self, Path(path))

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n")
