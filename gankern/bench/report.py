"""Tables, Markdown and the chart of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gankern.bench.results import OURS, STOCK, CaseResult, Measured, Report, TrainingResult
from gankern.bench.timing import Spread

RATE_COLUMNS = ("case", "gankern, us", "TFLOP/s", "of the product's", "TB/s", "of the copy's")
CASE_COLUMNS = ("case", "fastest stock, ms", "gankern, ms", "ratio (p20-p80)", "peak MiB", "error")
TRAINING_COLUMNS = (
    "model",
    "stock images/s",
    "gankern images/s",
    "ratio (p20-p80)",
    "peak MiB",
    "losses",
    "weights",
)


def case_row(result: CaseResult) -> list[str]:
    """Cells under `CASE_COLUMNS`."""
    if result.best is None or result.ours is None or result.ratio is None:
        return [result.name, result.status.upper(), "", "", "", _error(result.error)]
    stock, ours = result.sides[result.best], result.sides[result.ours]
    return [
        result.name,
        f"{result.best} {stock.seconds.median * 1e3:.2f}",
        f"{result.ours.removeprefix(OURS)} {ours.seconds.median * 1e3:.2f}".strip(),
        _ratio(result.ratio),
        _memory(stock, ours),
        _error(result.error),
    ]


def training_row(result: TrainingResult) -> list[str]:
    """Cells under `TRAINING_COLUMNS`."""
    errors = [_error(result.loss_error), _error(result.parameter_error)]
    if result.ratio is None:
        return [result.model, result.status.upper(), "", "", "", *errors]
    return [
        result.model,
        f"{result.images_per_second(STOCK):.0f}",
        f"{result.images_per_second(OURS):.0f}",
        _ratio(result.ratio),
        _memory(result.sides[STOCK], result.sides[OURS]),
        *errors,
    ]


def rates_row(result: CaseResult, ceilings: dict[str, float]) -> list[str]:
    """Cells under `RATE_COLUMNS`: what gankern's fastest side achieves of a GPU's measured ceilings."""
    if result.ours is None:
        return [result.name, *[""] * (len(RATE_COLUMNS) - 1)]
    seconds = result.sides[result.ours].seconds.median
    cells = [result.name, f"{seconds * 1e6:.1f}"]
    for amount, ceiling in (
        (result.flops, ceilings[f"{result.dtype}_flops"]),
        (result.moved_bytes, ceilings["copy_bytes"]),
    ):
        rate = (amount or 0) / seconds
        cells += [f"{rate / 1e12:.3f}", f"{rate / ceiling:.0%}"] if amount else ["", ""]
    return cells


def show(report: Report, console: Console) -> None:
    """Print the tables: ops first, then training."""
    if report.cases:
        console.print(_table("Against the fastest stock variant", CASE_COLUMNS, map(case_row, report.cases)))
        if "ceilings" in report.machine:
            rows = [rates_row(case, report.machine["ceilings"]) for case in report.cases]
            console.print(_table("Rates", RATE_COLUMNS, rows))
        for case in report.cases:
            _explain(case.name, case, console)
            for variant, why in case.left_out.items():
                console.print(f"{case.name}: {variant} left out: {why}", style="dim", markup=False)
    if report.training:
        title = "Training on digits: same weights, batches and random numbers"
        console.print(_table(title, TRAINING_COLUMNS, map(training_row, report.training)))
        for training in report.training:
            _explain(training.model, training, console)
    console.print(machine_line(report.machine), style="dim", markup=False)


def markdown(report: Report) -> str:
    """Return the same tables in Markdown, with the machine and the command under them."""
    parts = []
    if report.cases:
        parts.append(_markdown_table(CASE_COLUMNS, map(case_row, report.cases)))
    if report.training:
        parts.append(_markdown_table(TRAINING_COLUMNS, map(training_row, report.training)))
    parts.append(f"{machine_line(report.machine)}. `{report.command}`")
    return "\n\n".join(parts) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    """Say in one line where the numbers come from; `machine` is `gankern.info()`."""
    cpu, versions = machine.get("cpu", {}), machine.get("versions", {})
    gpu = ", ".join(machine.get("gpus", [])) if "ceilings" in machine else ""
    parts = [
        gpu,
        str(cpu.get("model", "unknown CPU")),
        f"{cpu.get('cores', '?')} cores",
        str(cpu.get("isa", "")),
        f"{machine.get('threads', '?')} threads",
        f"torch {versions.get('torch', '?')}",
        f"Python {machine.get('python', '?')}",
        f"commit {machine['commit']}" if machine.get("commit") else "",
    ]
    return ", ".join(filter(None, parts))


def save_chart(report: Report, path: Path) -> bool:
    """Draw a bar per ratio, with its spread; return whether there was any to draw."""
    bars = [(result.name, result.ratio) for result in report.cases if result.ratio is not None]
    bars += [(f"training {result.model}", result.ratio) for result in report.training if result.ratio is not None]
    if not bars:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.35 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [name for name, _ in bars]
    medians = [ratio.median for _, ratio in bars]
    below = [max(0.0, ratio.median - ratio.p20) for _, ratio in bars]
    above = [max(0.0, ratio.p80 - ratio.median) for _, ratio in bars]
    colors = ["#3b7dd8" if median >= 1 else "#d9822b" for median in medians]
    axes.barh(names, [median - 1 for median in medians], left=1, color=colors)
    axes.errorbar(medians, names, xerr=[below, above], fmt="none", ecolor="#555555")
    for name, ratio in bars:
        axes.annotate(
            f"{ratio.median:.2f}x", (max(ratio.p80, 1), name), (6, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlim(min(0.5, *medians) * 0.9, max(2.0, *(ratio.p80 for _, ratio in bars)) * 1.7)
    axes.invert_yaxis()
    axes.set_xlabel("fastest stock time / gankern time: median, p20 to p80")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _explain(name: str, result: CaseResult | TrainingResult, console: Console) -> None:
    if result.status != "ok":
        style = "dim" if result.status == "skipped" else "red"
        console.print(f"{name}: {result.status}: {result.message}", style=style, markup=False, soft_wrap=True)


def _table(title: str, columns: Sequence[str], rows: Iterable[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number > 0)
    for row in rows:
        table.add_row(
            *(cell.replace("[", r"\[") for cell in row), style="red" if row[1] in ("WRONG", "FAILED") else None
        )
    return table


def _markdown_table(columns: Sequence[str], rows: Iterable[list[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rule = "|" + "|".join([":--"] + ["--:"] * (len(columns) - 1)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"


def _memory(stock: Measured, ours: Measured) -> str:
    if stock.peak_bytes is None or ours.peak_bytes is None:
        return "n/a"
    return f"{stock.peak_bytes / 2**20:.1f} -> {ours.peak_bytes / 2**20:.1f}"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"
