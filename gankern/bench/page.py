"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup

from gankern import html
from gankern.bench import plots, roofline
from gankern.bench.report import RATIO, machine_line, results
from gankern.bench.results import OURS, STOCK, CaseResult, Measured, Report, Sweep
from gankern.bench.timing import Spread
from gankern.html import Cell, Section, Tone

Row = list[Cell | str]
MIB = 2**20
TONES: dict[str, Tone] = {"slower": "worse", "broken": "worse", "faster": "better", "wrong": "worse", "failed": "worse"}
_TIMES = ("p20, ms", "p80, ms", "peak MiB")


def write(report: Report, path: Path) -> None:
    """Write the page, with all it needs in it."""
    html.write_page(path, "gankern bench", list(_sections(report)), lead=machine_line(report.machine))


def _sections(report: Report) -> Iterator[Section]:
    if report.comparison is not None:
        yield Section(f"Against {report.comparison.path}", _comparison(report))
    ratios = [(case.name, case.ratio) for case in report.cases if case.ratio is not None]
    ratios += [(f"training {t.model}", t.ratio) for t in report.training if t.ratio is not None]
    if ratios:
        yield Section("Ratio", [html.paragraph(f"{RATIO} Stock is its fastest variant."), plots.ratios(ratios)])
    if report.cases:
        yield Section("Cases", [_cases(report.cases)])
    shares = _shares(report)
    if shares:
        yield Section("Share of the roofline", shares)
    if report.sweeps:
        yield Section("Against size", [block for sweep in report.sweeps for block in _sweep(sweep)])
    if report.training:
        yield Section("Training on digits", [_training(report)])
    if any(case.sides for case in report.cases):
        yield Section("Every side", [_sides(report.cases)])
    if report.notes:
        blocks = [(html.subheading(heading), html.code("\n".join(lines))) for heading, lines in report.notes.items()]
        yield Section("What runs on gankern", [block for pair in blocks for block in pair])
    left_out = _left_out(report)
    if left_out:
        yield Section("Left out or without a time", [html.table(("case", "what", "why"), left_out)])
    yield Section("Command", [html.code(report.command)])
    yield Section("Machine and versions", [_machine(report)])


def _cases(cases: list[CaseResult]) -> Markup:
    columns = ["case", "stock", "stock, ms", "compile, s", "gankern, ms", "ratio", "p20", "p80"]
    columns += ["stock peak MiB", "gankern peak MiB", "error", "allowed"]
    return html.table(columns, [_case_row(case, case.name) for case in cases], caption="Fastest stock variant, gankern")


def _case_row(case: CaseResult, name: str) -> Row:
    row: Row = [name]
    if case.ours is None:
        row += [Cell(case.status.upper(), tone=TONES.get(case.status, "muted")), *[""] * 8]
    elif case.best is None or case.ratio is None:
        ours = case.sides[case.ours]
        row += [Cell("too large", tone="muted"), "", "", _ms(ours.seconds.median), *[""] * 4, _mib(ours.peak_bytes)]
    else:
        stock, ours = case.sides[case.best], case.sides[case.ours]
        row += [case.best, _ms(stock.seconds.median), _number(stock.compile_seconds, ".1f"), _ms(ours.seconds.median)]
        row += [*_spread(case.ratio), _mib(stock.peak_bytes), _mib(ours.peak_bytes)]
    return [*row, _number(case.error, ".0e"), _number(case.tolerance, ".0e")]


def _sides(cases: list[CaseResult]) -> Markup:
    rows: list[Row] = [
        [f"{case.name}: {name}", _ms(side.seconds.median), *_times(side), _number(side.compile_seconds, ".1f")]
        for case in cases
        for name, side in case.sides.items()
    ]
    return html.table(("side", "median, ms", *_TIMES, "compile, s"), rows, caption="Time and memory of one call")


def _times(side: Measured) -> list[Cell]:
    return [_ms(side.seconds.p20), _ms(side.seconds.p80), _mib(side.peak_bytes)]


def _shares(report: Report) -> list[Markup]:
    measured = report.machine.get("ceilings", {})
    rows: list[Row] = []
    bars = []
    for case in report.cases:
        least = roofline.floor(case, measured)
        if least is None or case.best is None or case.ours is None:
            continue
        shares = [least.share(case.sides[side].seconds.median) for side in (case.best, case.ours)]
        bars.append((case.name, shares[0], shares[1]))
        rows.append([case.name, least.bound, _ms(least.seconds), *(Cell(f"{s:.1%}", s) for s in shares)])
    if not rows:
        return []
    text = (
        "The least time that this device's measured rates allow, as a share of the time taken: operations of stock's "
        "algorithm by the rate of a large matrix product, or bytes that must move by the rate of a copy, whichever "
        "takes longer. An algorithm with fewer operations can exceed 100%."
    )
    ceilings: list[Row] = [[name, Cell(f"{value:.4g}", value)] for name, value in measured.items()]
    columns = ("case", "bound", "least ms", "stock", "gankern")
    return [
        html.paragraph(text),
        plots.shares(bars),
        html.table(columns, rows, caption="Share of the roofline"),
        html.table(("ceiling", "a second, or seconds"), ceilings, caption="Measured ceilings"),
    ]


def _sweep(sweep: Sweep) -> list[Markup]:
    points = [(point.size[sweep.dimension], point) for point in sweep.points]
    columns = (sweep.dimension, "side", "median, ms", *_TIMES)
    rows: list[Row] = [
        [Cell(str(size), size), name, _ms(side.seconds.median), *_times(side)]
        for size, point in points
        for name, side in point.sides.items()
    ]
    seconds = plots.line_points(points, lambda side: side.seconds.median * 1e3)
    memory = plots.line_points(points, lambda side: (side.peak_bytes or 0) / MIB)
    name = f"{sweep.name} against {sweep.dimension}"
    blocks = [
        plots.lines(values, sweep.dimension, unit, f"{what} of {name}")
        for values, unit, what in ((seconds, "ms", "Time"), (memory, "peak MiB", "Memory"))
        if values
    ]
    return [html.subheading(name), *blocks, html.table(columns, rows, caption=name)]


def _training(report: Report) -> Markup:
    columns = ["model", "stock images/s", "gankern images/s", "ratio", "p20", "p80"]
    columns += ["stock peak MiB", "gankern peak MiB", "losses differ", "weights differ"]
    rows: list[Row] = []
    for result in report.training:
        row: Row = [result.model]
        if result.ratio is None:
            row += [Cell(result.status.upper(), tone=TONES.get(result.status, "muted")), *[""] * 6]
        else:
            row += [_number(result.images_per_second(side), ".0f") for side in (STOCK, OURS)]
            row += [*_spread(result.ratio), *(_mib(result.sides[side].peak_bytes) for side in (STOCK, OURS))]
        rows.append([*row, _number(result.loss_error, ".0e"), _number(result.parameter_error, ".0e")])
    return html.table(columns, rows, caption="Same weights, batches and random numbers on both sides")


def _comparison(report: Report) -> list[Markup]:
    assert report.comparison is not None
    blocks = [html.paragraph(f"Since then: {difference}.") for difference in report.comparison.differences]
    columns = ("case", "verdict", "ratio then", "p20 then", "p80 then", "ratio now", "p20 now", "p80 now", "change")
    rows: list[Row] = []
    for verdict in report.comparison.verdicts:
        row: Row = [verdict.name, Cell(verdict.verdict, tone=TONES.get(verdict.verdict, "muted"))]
        if verdict.old is not None and verdict.new is not None and verdict.change is not None:
            row += [*_spread(verdict.old), *_spread(verdict.new), Cell(f"{verdict.change - 1:+.0%}", verdict.change)]
        else:
            row += [*[""] * 6, verdict.message]
        rows.append(row)
    return [*blocks, html.table(columns, rows, caption="Noise-aware: ranges apart, and medians by more than 5%")]


def _left_out(report: Report) -> list[Row]:
    rows: list[Row] = []
    for name, result in results(report):
        if result.status != "ok":
            rows.append([name, Cell(result.status, tone=TONES.get(result.status, "muted")), result.message])
        if isinstance(result, CaseResult):
            rows += [[name, variant, why] for variant, why in result.left_out.items()]
    return rows


def _machine(report: Report) -> Markup:
    def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flat(item, f"{name} {key}".strip())
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield name, text

    known = {key: value for key, value in report.machine.items() if key not in ("ceilings", "backends")}
    known["backend"] = {
        "in force": report.machine.get("backend"),
        **{name: reason or "available" for name, reason in report.machine.get("backends", {}).items()},
    }
    return html.table(("what", "here"), [list(row) for row in flat(known)], caption="Where the numbers come from")


def _ms(seconds: float) -> Cell:
    return Cell(f"{seconds * 1e3:.3g}" if seconds < 1e-3 else f"{seconds * 1e3:.2f}", seconds)


def _mib(size: int | None) -> Cell:
    return Cell("n/a") if size is None else Cell(f"{size / MIB:.1f}", size)


def _number(value: float | None, form: str) -> Cell:
    return Cell("") if value is None else Cell(format(value, form), value)


def _spread(ratio: Spread) -> list[Cell]:
    tone: Tone | None = "better" if ratio.p20 > 1 else "worse" if ratio.p80 < 1 else None
    return [Cell(f"{ratio.median:.2f}", ratio.median, tone), *(Cell(f"{v:.2f}", v) for v in (ratio.p20, ratio.p80))]
