"""What only a GPU has: runs as CUDA graphs, and products of float32 in TF32."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gankern._capture import record
from gankern.dispatch import TF32, as_captured

if TYPE_CHECKING:
    from gankern.bench.cases import Run

__all__ = ["GRAPH", "TF32", "TF32_TOLERANCE", "graphed", "products_in_tf32", "seed", "with_graphs"]

#: Follows the name of a side that runs as a graph.
GRAPH = " graph"
_WARM_UP = 3
#: Relative error in norm: TF32 keeps 3 bits more of a factor than bfloat16, and leaves the rest out without rounding.
TF32_TOLERANCE = 2.5e-2


@contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    """Let convolutions and matrix products of float32 round their factors to TF32, or not, on both sides."""
    # By torch's old flags, which set all operators alike: Inductor reads them, and cannot where operators differ.
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def seed(number: int) -> None:
    """:func:`torch.manual_seed`; nothing while a graph is captured, which draws other numbers at each replay."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        torch.manual_seed(number)


def with_graphs(
    runs: Mapping[str, Run], ours: Collection[str], left_out: Mapping[str, str], against: Collection[str] | None = None
) -> tuple[dict[str, Run], dict[str, str]]:
    """Every side once more as one CUDA graph, stock's before gankern's; and why where it cannot be captured."""
    stock: dict[str, Run] = {name: run for name, run in runs.items() if name not in ours}
    own: dict[str, Run] = {name: run for name, run in runs.items() if name in ours}
    refused = dict(left_out)
    for sides in (stock, own):
        if sides is stock and against is not None and "graph" not in against:
            continue
        for name, run in list(sides.items()):
            try:
                sides[name + GRAPH] = graphed(run)
            except Exception as error:
                refused[name + GRAPH] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    return {**stock, **own}, refused


def graphed(run: Run) -> Run:
    """A run that replays what it did once.

    Raises
    ------
    RuntimeError
        If it does what a graph cannot.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), as_captured():
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, results = record(run, stream)

    def replay() -> dict[str, object]:
        graph.replay()
        return dict(results)

    return replay  # type: ignore[return-value]
