"""What a profile says, and its JSON form."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gankern.bench import ceilings
from gankern.bench.timing import Spread

SCHEMA = 1
COMPUTE, MEMORY, CALLS = "compute", "memory", "calls"


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
    flops, bytes, calls : int or None
        Operations of products and convolutions, bytes that operators read and write, and operators, of one step.
    allocated : int or None
        Bytes that operators took of the allocator in one step.
    device_seconds : float or None
        Of the GPU's kernels, in one step.
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
    nodes: dict[str, float] = field(default_factory=dict)


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
        Over the steps kept, those from the 10th to the 90th percentile; the phases' seconds add up to it.
    phases : tuple of Phase
        In the order in which they first ran.
    peak_bytes : int or None
        That a step needs at its peak above what was held before it.
    """

    device: str
    dtype: str
    steps: int
    seconds: Spread
    mean_seconds: float
    phases: tuple[Phase, ...]
    peak_bytes: int | None = None

    def phase(self, name: str) -> Phase | None:
        """The phase of a name, without its parts."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def seconds_of(self, *names: str) -> float:
        """Seconds of phases with all their parts."""
        return sum(p.seconds for p in self.phases if p.name.partition("/")[0] in names or p.name in names)


@dataclass(frozen=True)
class Limits:
    """Least seconds of a phase by each of a machine's ceilings; None where nothing was counted."""

    compute: float | None
    memory: float | None
    calls: float | None

    @classmethod
    def of(cls, phase: Phase, dtype: str, measured: dict[str, float]) -> Limits:
        """Hold a phase's amounts against what `gankern.bench.ceilings.measure` found."""
        if phase.calls is None or phase.flops is None or phase.bytes is None:
            return cls(None, None, None)
        peak = measured.get(f"{dtype}_flops", measured["float32_flops"])
        small = phase.bytes <= ceilings.CACHED_BYTES * max(phase.calls, 1)
        bandwidth = measured[ceilings.CACHED_COPY if small else ceilings.COPY]
        return cls(phase.flops / peak, phase.bytes / bandwidth, phase.calls * measured[ceilings.CALL])

    @property
    def floor(self) -> float | None:
        """Seconds that the arithmetic and the memory traffic of these operators need at least."""
        return None if self.compute is None or self.memory is None else max(self.compute, self.memory)

    @property
    def bound(self) -> str | None:
        """What takes the most of its time."""
        known = {COMPUTE: self.compute, MEMORY: self.memory, CALLS: self.calls}
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


@dataclass
class ProfileReport:
    """Everything about one run of the profiler.

    Attributes
    ----------
    subject : str
        What was profiled, in a line.
    machine : dict
        ``gankern.info()``, with the measured ceilings under ``"ceilings"``.
    sides : dict of str to StepProfile
        By name, such as "stock" and "gankern".
    overhead : dict of str to float
        By side, the time of steps that are profiled / of steps that are not, less one.
    advice : list of Advice
    notes : list of str
        What was not measured, and why.
    """

    subject: str
    machine: dict[str, Any]
    sides: dict[str, StepProfile] = field(default_factory=dict)
    overhead: dict[str, float] = field(default_factory=dict)
    advice: list[Advice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def ceilings(self) -> dict[str, float]:
        """Measured ceilings of the machine."""
        return self.machine["ceilings"]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n")
