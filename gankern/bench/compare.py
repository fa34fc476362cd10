"""What has become slower since a stored result, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from gankern.bench.results import OURS, CaseResult, Comparison, Report, Verdict
from gankern.bench.timing import MIN_ROUNDS, Spread

#: Change of the ratio's median that is noise whatever the spreads say: the spread within a run does not show what
#: differs between processes, such as where their memory lies.
NOISE = 0.05


def compare(old: Report, new: Report, path: str) -> Comparison:
    """Judge each case of a run by a stored one.

    What is compared is gankern's speed relative to the same stock variant in the same run, so that a machine that is
    slower today changes nothing. A verdict other than "within noise" needs the p20-p80 ranges of both runs apart and
    medians that differ by more than `NOISE`.

    Parameters
    ----------
    old, new : Report
        The stored run and this one, from the same machine.
    path : str
        Where `old` was read, for people.

    Returns
    -------
    Comparison
        A verdict for each result of `new`, the points of sweeps included.
    """
    before, after = _by_key(old), _by_key(new)
    verdicts = [
        _judge(name, before[name], result)
        if name in before
        else Verdict(name, "not compared", message=f"not in {path}")
        for name, result in after.items()
    ]
    return Comparison(path, _differences(old.machine, new.machine), verdicts)


def machine_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why two runs' times cannot be compared: each thing about the machine that differs, then and now."""
    return _differing(_machine(old), _machine(new))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What may explain a change without being gankern's: versions."""
    then, now = ({**m.get("versions", {}), "Python": m.get("python")} for m in (old, new))
    return _differing(*({k: v for k, v in side.items() if k in ("torch", "triton", "Python")} for side in (then, now)))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new[name]]


def _machine(info: Mapping[str, Any]) -> dict[str, Any]:
    cpu = info.get("cpu") or {}
    return {
        "CPU": cpu.get("model"),
        "cores": cpu.get("cores"),
        "instruction set": cpu.get("isa"),
        "threads": info.get("threads"),
        "GPUs": ", ".join(info.get("gpus") or []) or "none",
    }


def _by_key(report: Report) -> dict[str, CaseResult]:
    """Results under names that tell the sizes of a sweep apart."""
    found = {result.name: result for result in report.cases}
    for sweep in report.sweeps:
        found |= {f"{sweep.name} {sweep.dimension}={p.size.get(sweep.dimension)}": p for p in sweep.points}
    return found


def _judge(name: str, old: CaseResult, new: CaseResult) -> Verdict:
    for what in ("dtype", "device", "size", "backend"):
        then, now = getattr(old, what), getattr(new, what)
        if then != now:
            return Verdict(name, "not compared", message=f"{what} was {_plain(then)}, is {_plain(now)}")
    if old.status != "ok" or new.status != "ok":
        broken = old.status == "ok" and new.status in ("wrong", "failed")
        return Verdict(name, "broken" if broken else "not compared", message=f"was {old.status}, is {new.status}")
    rounds = min(old.rounds, new.rounds)
    if rounds < MIN_ROUNDS:
        return Verdict(name, "not compared", message=f"{rounds} rounds do not tell a change from noise")
    common = _stock(old) & _stock(new)
    if not common:
        return Verdict(name, "not compared", message="no stock variant is in both")
    variant = min(common, key=lambda side: new.sides[side].seconds.median)
    then, now = _ratio(old, variant), _ratio(new, variant)
    change = now.median / then.median
    verdict: Literal["slower", "faster", "within noise"] = "within noise"
    if now.p80 < then.p20 and change < 1 - NOISE:
        verdict = "slower"
    elif now.p20 > then.p80 and change > 1 + NOISE:
        verdict = "faster"
    return Verdict(name, verdict, then, now, change, f"against {variant}")


def _stock(result: CaseResult) -> set[str]:
    return {name for name in result.sides if not name.startswith(OURS)}


def _ratio(result: CaseResult, variant: str) -> Spread:
    """A stock variant's time / gankern's: as measured round by round, else the widest that both spreads allow."""
    if variant == result.best and result.ratio is not None:
        return result.ratio
    stock, ours = result.sides[variant].seconds, result.sides[result.ours or OURS].seconds
    return Spread(stock.median / ours.median, stock.p20 / ours.p80, stock.p80 / ours.p20)


def _plain(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
