"""How time and memory grow with the problem: a table and log-log plots, in one go.

    python benchmarks/scaling.py --out out/scaling          # or: make scaling
    python benchmarks/scaling.py --quick

Minibatch discrimination forward + backward against the number of samples; a training step of the DCGAN generator
against its width and its batch. Sides are timed in turn; one that would need more than --limit bytes by its formula is
left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gankern
from gankern.bench import stock
from gankern.bench.timing import peak_memory, rounds

BUDGET = 6.0  # seconds for one size
FEATURES, KERNEL_DIMS = 100, 16


@dataclass
class Point:
    """One side at one size."""

    sweep: str
    size: int
    side: str
    milliseconds: float | None
    mebibytes: float | None
    left_out: str | None = None


def discrimination_sides(n: int, limit: float) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Forward and backward of minibatch discrimination, and why a side is left out."""
    m = (torch.randn(n, FEATURES, KERNEL_DIMS) * 0.5 / KERNEL_DIMS**0.5).requires_grad_()
    grad = torch.randn(n, FEATURES)

    def run(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def step() -> None:
            function(m).backward(grad)
            # Not held before the next call, whose peak counts it.
            m.grad = None

        return step

    sides: dict[str, Callable[[], object]]
    sides, left_out = {"gankern": run(gankern.ops.minibatch_discrimination)}, {}
    # Differences, absolute values and signs of the one; distances, exponentials and their gradients of the other.
    needs = {"cdist": 5 * n * n * FEATURES * 4, "broadcast": 3 * n * n * FEATURES * KERNEL_DIMS * 4}
    functions = {"cdist": stock.minibatch_discrimination_cdist, "broadcast": stock.minibatch_discrimination}
    for name, size in needs.items():
        if size > limit:
            left_out[name] = f"about {size / 2**30:.0f} GiB"
        else:
            sides[name] = run(functions[name])
    return sides, left_out


def generator(width: int) -> nn.Sequential:
    """DCGAN's, for 64x64 images."""

    def up(inputs: int, outputs: int, stride: int, padding: int) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(True)]

    w = width
    layers = [*up(100, 8 * w, 1, 0), *up(8 * w, 4 * w, 2, 1), *up(4 * w, 2 * w, 2, 1), *up(2 * w, w, 2, 1)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(w, 3, 4, 2, 1, bias=False), nn.Tanh())


def generator_sides(width: int, batch: int) -> dict[str, Callable[[], object]]:
    """A training step with stock modules in both layouts, and fused."""
    eager = generator(width)
    models = {
        "gankern": gankern.fuse(copy.deepcopy(eager)),
        "channels_last": copy.deepcopy(eager).to(memory_format=torch.channels_last),
        "eager": eager,
    }
    noise = torch.randn(batch, 100, 1, 1)

    def run(model: nn.Module) -> Callable[[], object]:
        def step() -> None:
            model(noise).square().mean().backward()
            model.zero_grad()

        return step

    return {name: run(model) for name, model in models.items()}


def measure(sweep: str, size: int, sides: dict[str, Callable[[], object]]) -> Iterator[Point]:
    """Median time and peak memory of each side."""
    rounds(sides, 1)
    times = rounds(sides, 30, budget=BUDGET)
    for name, work in sides.items():
        peak = peak_memory(work)
        seconds = statistics.median(times[name])
        yield Point(sweep, size, name, seconds * 1e3, None if peak is None else peak / 2**20)


def run_all(quick: bool, limit: float) -> Iterator[Point]:
    """Every sweep, size by size."""
    for n in (64, 128) if quick else (64, 128, 256, 512, 1024, 2048, 4096):
        sides, left_out = discrimination_sides(n, limit)
        yield from measure("minibatch discrimination, samples", n, sides)
        for name, why in left_out.items():
            yield Point("minibatch discrimination, samples", n, name, None, None, why)
    for width in (8, 16) if quick else (8, 16, 32, 64):
        yield from measure("generator, width at batch 32", width, generator_sides(width, 32))
    for batch in (1, 2) if quick else (1, 4, 16, 64, 128):
        yield from measure("generator, batch at width 32", batch, generator_sides(32, batch))


def show(points: list[Point], console: Console) -> None:
    """A table for each sweep, sizes down and sides across; ratios are of the fastest other side."""
    for sweep in dict.fromkeys(p.sweep for p in points):
        of = [p for p in points if p.sweep == sweep]
        sides = list(dict.fromkeys(p.side for p in of))
        table = Table("size", *(f"{s}, ms / MiB" for s in sides), "ratio", title=sweep)
        for size in dict.fromkeys(p.size for p in of):
            row = {p.side: p for p in of if p.size == size}
            times = {s: p.milliseconds for s, p in row.items() if p.milliseconds is not None}
            others = [t for s, t in times.items() if s != "gankern"]
            ratio = f"{min(others) / times['gankern']:.2f}" if others else ""
            table.add_row(str(size), *(_cell(row[s]) if s in row else "" for s in sides), ratio)
        console.print(table)


def _cell(point: Point) -> str:
    if point.milliseconds is None:
        return f"left out: {point.left_out}"
    memory = "" if point.mebibytes is None else f" / {point.mebibytes:.1f}"
    return f"{point.milliseconds:.2f}{memory}"


def plot(points: list[Point], path: Path) -> None:
    """Time above, memory below, a column for each sweep."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sweeps = list(dict.fromkeys(p.sweep for p in points))
    figure = Figure(figsize=(5 * len(sweeps), 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(sweeps), squeeze=False)
    for column, sweep in enumerate(sweeps):
        for row, (field, label) in enumerate((("milliseconds", "ms"), ("mebibytes", "peak MiB"))):
            ax = axes[row][column]
            for side in dict.fromkeys(p.side for p in points if p.sweep == sweep):
                line = [
                    (p.size, value)
                    for p in points
                    if p.sweep == sweep and p.side == side and (value := getattr(p, field))
                ]
                ax.plot(*zip(*line, strict=True), marker="o", label=side)
            ax.set(xscale="log", yscale="log", xlabel=sweep, ylabel=label)
            ax.grid(True, which="both", alpha=0.3)
            ax.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/scaling"), help="folder for scaling.json and scaling.png")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    parser.add_argument("--limit", type=float, default=6 * 2**30, help="bytes that a side may need")
    args = parser.parse_args()
    torch.manual_seed(0)
    points = []
    for point in run_all(args.quick, args.limit):
        points.append(point)
        print(f"{point.sweep} {point.size}: {point.side} {_cell(point)}", flush=True)
    show(points, Console())
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "gankern": gankern.__version__, "threads": torch.get_num_threads()}
    found = {"machine": machine, "points": [asdict(p) for p in points]}
    (args.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(points, args.out / "scaling.png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
