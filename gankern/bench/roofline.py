"""How near a time comes to what the device can do at best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gankern.bench import ceilings
from gankern.bench.results import CaseResult


@dataclass(frozen=True)
class Floor:
    """Seconds below which no kernel gets, and what sets them: operations, or bytes to move."""

    seconds: float
    bound: Literal["compute", "memory"]

    def share(self, seconds: float) -> float:
        """What part of a time the floor is; 1 is the roofline itself."""
        return self.seconds / seconds


def floor(result: CaseResult, measured: Mapping[str, float]) -> Floor | None:
    """Least time of one call of a case.

    Parameters
    ----------
    result : CaseResult
        Operations are those of stock's algorithm: one that needs fewer, such as minimal filtering, may get above 1.
    measured : mapping of str to float
        What `gankern.bench.ceilings.measure` found.

    Returns
    -------
    Floor or None
        None where neither operations nor bytes are known.
    """
    moved, peak = result.moved_bytes or 0, measured.get(f"{result.dtype}_flops")
    copy = measured.get(ceilings.CACHED_COPY if moved <= ceilings.CACHED_BYTES else ceilings.COPY)
    times: list[Floor] = []
    if result.flops and peak:
        times.append(Floor(result.flops / peak, "compute"))
    if moved and copy:
        times.append(Floor(moved / copy, "memory"))
    return max(times, key=lambda found: found.seconds, default=None)
