"""A report as tables: in the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gankern.bench import roofline
from gankern.bench.results import OURS, STOCK, CaseResult, Comparison, Measured, Report, Sweep, TrainingResult
from gankern.bench.timing import Spread

#: A cell is what stands on one line of a wide table and below each other in a narrow one.
Cell = tuple[str, ...]

CASE_COLUMNS = ("case", "fastest stock, ms", "compile, s", "gankern, ms", "ratio (p20-p80)", "peak MiB", "error")
TRAINING_COLUMNS = (
    "model",
    "stock images/s",
    "gankern images/s",
    "ratio (p20-p80)",
    "peak MiB",
    "losses",
    "weights",
)
ROOFLINE_COLUMNS = ("case", "bound", "least ms", "stock", "gankern", "TFLOP/s", "TB/s")
VERDICT_COLUMNS = ("case", "verdict", "ratio then", "ratio now", "change")
STYLES = {"wrong": "red", "failed": "red", "slower": "red", "broken": "red", "faster": "green", "skipped": "dim"}
#: How a ratio is taken, under every table that has one.
RATIO = (
    "Ratio: stock's time / gankern's in each round, the median of the rounds (p20 to p80); not the quotient of the "
    "median times beside it."
)
# Characters that the widest table takes on one line a row.
_WIDE = 130


def case_row(result: CaseResult) -> list[Cell]:
    """Cells under `CASE_COLUMNS`."""
    name = split_name(result.name)
    if result.ours is None:
        return [name, (result.status.upper(),), (), (), (), (), _error(result.error)]
    ours = result.sides[result.ours]
    if result.best is None or result.ratio is None:
        return [name, ("too large",), (), (f"{ours.seconds.median * 1e3:.2f}",), (), _peak(ours), _error(result.error)]
    stock = result.sides[result.best]
    return [
        name,
        (result.best, f"{stock.seconds.median * 1e3:.2f}"),
        () if stock.compile_seconds is None else (f"{stock.compile_seconds:.1f}",),
        (result.ours.removeprefix(OURS).strip(), f"{ours.seconds.median * 1e3:.2f}"),
        ratio(result.ratio),
        _memory(stock, ours),
        _error(result.error),
    ]


def training_row(result: TrainingResult) -> list[Cell]:
    """Cells under `TRAINING_COLUMNS`."""
    errors = [_error(result.loss_error), _error(result.parameter_error)]
    if result.ratio is None:
        return [(result.model,), (result.status.upper(),), (), (), (), *errors]
    return [
        (result.model,),
        (f"{result.images_per_second(STOCK):.0f}",),
        (f"{result.images_per_second(OURS):.0f}",),
        ratio(result.ratio),
        _memory(result.sides[STOCK], result.sides[OURS]),
        *errors,
    ]


def sweep_rows(sweep: Sweep) -> list[list[Cell]]:
    """Cells under `CASE_COLUMNS`, with the size in place of the name."""
    return [case_row(replace(point, name=str(point.size[sweep.dimension]))) for point in sweep.points]


def roofline_row(result: CaseResult, ceilings: Mapping[str, float]) -> list[Cell] | None:
    """Cells under `ROOFLINE_COLUMNS`; None where there is nothing to hold the time against."""
    least = roofline.floor(result, ceilings)
    if least is None or result.best is None or result.ours is None:
        return None
    stock, ours = (result.sides[side].seconds.median for side in (result.best, result.ours))
    rates = [(f"{amount / ours / 1e12:.3f}",) if amount else () for amount in (result.flops, result.moved_bytes)]
    return [
        split_name(result.name),
        (least.bound,),
        (f"{least.seconds * 1e3:.3g}",),
        (f"{least.share(stock):.0%}",),
        (f"{least.share(ours):.0%}",),
        *rates,
    ]


def verdict_rows(comparison: Comparison) -> list[list[Cell]]:
    """Cells under `VERDICT_COLUMNS`."""
    rows: list[list[Cell]] = []
    for verdict in comparison.verdicts:
        row: list[Cell] = [split_name(verdict.name), (verdict.verdict,), (), (), ()]
        if verdict.old is not None and verdict.new is not None and verdict.change is not None:
            row[2:] = [ratio(verdict.old), ratio(verdict.new), (f"{verdict.change - 1:+.0%}",)]
        rows.append(row)
    return rows


def show(report: Report, console: Console) -> None:
    """Print the tables: ops first, then sizes, training and what has changed."""
    wide = console.width >= _WIDE

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        console.print(_table(title, columns, rows, wide))
        console.print()

    if report.cases:
        table("Against the fastest stock variant", CASE_COLUMNS, map(case_row, report.cases))
        rows = [row for case in report.cases if (row := roofline_row(case, report.machine.get("ceilings", {})))]
        if rows:
            table("Share of the roofline; data that lies in a cache may pass it", ROOFLINE_COLUMNS, rows)
    for sweep in report.sweeps:
        table(f"{sweep.name} against {sweep.dimension}", (sweep.dimension, *CASE_COLUMNS[1:]), sweep_rows(sweep))
    if report.training:
        title = "Training on digits: same weights, batches and random numbers"
        table(title, TRAINING_COLUMNS, map(training_row, report.training))
    if report.comparison is not None:
        table(f"Against {report.comparison.path}", VERDICT_COLUMNS, verdict_rows(report.comparison))
    if has_ratios(report):
        console.print(RATIO, style="dim", markup=False, highlight=False)
    for style, line in remarks(report):
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    console.print(machine_line(report.machine), style="dim", markup=False)


def has_ratios(report: Report) -> bool:
    """Whether anything was timed on both sides."""
    return any(result.ratio is not None for _, result in results(report))


def remarks(report: Report) -> list[tuple[str, str]]:
    """Lines under the tables, each with its style: what went wrong, what was left out, what else is known."""
    lines = []
    for name, result in results(report):
        if result.status != "ok":
            lines.append((STYLES[result.status], f"{name}: {result.status}: {result.message}"))
        sides = result.sides if isinstance(result, CaseResult) else {}
        lines += [
            ("dim", f"{name}: {variant} {side.seconds.median * 1e3:.2f} ms, {side.compile_seconds:.1f} s to compile")
            for variant, side in sides.items()
            if side.compile_seconds is not None
        ]
        left_out = result.left_out if isinstance(result, CaseResult) else {}
        lines += [("dim", f"{name}: {variant} left out: {why}") for variant, why in left_out.items()]
    if report.comparison is not None:
        lines += [("yellow", f"since then: {difference}") for difference in report.comparison.differences]
        for verdict in report.comparison.verdicts:
            if verdict.change is None:
                lines.append((STYLES.get(verdict.verdict, "dim"), f"{verdict.name}: {verdict.message}"))
    for heading, notes in report.notes.items():
        lines += [("dim", f"{heading}: {note}") for note in notes]
    return lines


def results(report: Report) -> list[tuple[str, CaseResult | TrainingResult]]:
    """Every result with a name of its own."""
    found: list[tuple[str, CaseResult | TrainingResult]] = [(case.name, case) for case in report.cases]
    for sweep in report.sweeps:
        found += [(f"{sweep.name} {sweep.dimension}={p.size[sweep.dimension]}", p) for p in sweep.points]
    return found + [(training.model, training) for training in report.training]


def markdown(report: Report) -> str:
    """Return the tables in Markdown, with the machine and the command under them."""
    parts = []
    if report.cases:
        parts.append(_markdown_table(CASE_COLUMNS, map(case_row, report.cases)))
    for sweep in report.sweeps:
        columns = (f"{sweep.name}: {sweep.dimension}", *CASE_COLUMNS[1:])
        parts.append(_markdown_table(columns, sweep_rows(sweep)))
    if report.training:
        parts.append(_markdown_table(TRAINING_COLUMNS, map(training_row, report.training)))
    if report.comparison is not None:
        parts.append(_markdown_table(VERDICT_COLUMNS, verdict_rows(report.comparison)))
    how = f"{RATIO} " if has_ratios(report) else ""
    parts.append(f"{how}{machine_line(report.machine)}. `{report.command}`")
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """Say in one line where the numbers come from; `machine` is `Report.machine`."""
    cpu, versions = machine.get("cpu", {}), machine.get("versions", {})
    on_gpu = str(machine.get("device", "cpu")).startswith("cuda")
    parts = [
        ", ".join(machine.get("gpus", [])) if on_gpu else "",
        str(cpu.get("model", "unknown CPU")),
        f"{cpu.get('cores', '?')} cores",
        str(cpu.get("isa", "")),
        f"{machine.get('threads', '?')} threads",
        f"torch {versions.get('torch', '?')}",
        f"Python {machine.get('python', '?')}",
        f"commit {machine['commit']}" if machine.get("commit") else "",
    ]
    return ", ".join(filter(None, parts))


def split_name(name: str) -> Cell:
    """A case's group and its mode."""
    group, dot, mode = name.partition(".")
    return (group, dot + mode) if dot else (name,)


def ratio(spread: Spread) -> Cell:
    """A ratio and its spread, to about three digits."""
    digits = 2 if spread.median < 10 else 1
    return f"{spread.median:.{digits}f}", f"({spread.p20:.{digits}f}-{spread.p80:.{digits}f})"


def on_one_line(cell: Cell) -> str:
    """The text of a cell; a case's name is written together again."""
    return "".join(cell) if len(cell) == 2 and cell[1].startswith(".") else " ".join(filter(None, cell))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], wide: bool) -> Table:
    layout: dict[str, Any] = {} if wide else {"padding": (0, 0), "show_edge": False}
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", **layout)
    for number, column in enumerate(columns):
        heading = column if wide else column.replace(" (", "\n(").replace(", ", ",\n").replace("images", "\nimages")
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    for row in rows:
        cells = [on_one_line(cell) if wide else "\n".join(filter(None, cell)) for cell in row]
        # A name such as a file's may hold what rich takes for a style.
        table.add_row(*(cell.replace("[", r"\[") for cell in cells), style=STYLES.get(cells[1].lower()))
    return table


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rule = "|" + "|".join([":--"] + ["--:"] * (len(columns) - 1)) + "|"
    return "\n".join([line(columns), rule, *(line(map(on_one_line, row)) for row in rows)])


def _memory(stock: Measured, ours: Measured) -> Cell:
    if stock.peak_bytes is None or ours.peak_bytes is None:
        return ("n/a",)
    return f"{stock.peak_bytes / 2**20:.1f}", f"-> {ours.peak_bytes / 2**20:.1f}"


def _peak(side: Measured) -> Cell:
    return ("n/a",) if side.peak_bytes is None else (f"{side.peak_bytes / 2**20:.1f}",)


def _error(error: float | None) -> Cell:
    return () if error is None else (f"{error:.0e}",)
