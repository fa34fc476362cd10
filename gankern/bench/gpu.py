"""What only a GPU has: runs as CUDA graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from gankern.bench.cases import Run

#: Follows the name of a side that runs as a graph.
GRAPH = " graph"
_WARM_UP = 3


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
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()

    def replay() -> dict[str, object]:
        graph.replay()
        return dict(results)

    return replay  # type: ignore[return-value]
