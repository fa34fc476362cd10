"""What a plan holds: which kernel runs which line of the user's code, how often, and why torch's own runs the rest."""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from gankern import backends
from gankern.compiler import origins
from gankern.compiler.passes import effects

#: Orders of derivatives.
PASSES = ("forward", "gradient", "second")
# Of functions whose own names do not say it.
_NAMES = {
    "forward_train": "batch_norm",
    "backward": "batch_norm_backward",
    "turned": "memory order",
    "part": "inductor",
}


class Call(NamedTuple):
    """One call of a plan.

    Attributes
    ----------
    kernel : str
        Name of what is called, with the activation in it.
    by : str
        Backend that runs it, or "torch".
    lines : str
        The user's code that it stands for, file and line; of several lines each, as in "critic.py:12, 14".
    module : str
        The module of the user's that it runs in; empty for the outermost.
    order : int
        0 in the forward, 1 in its derivative, 2 in that one's.
    why : str
        Why torch's kernel runs where gankern has one; else empty.
    """

    kernel: str
    by: str
    lines: str = ""
    module: str = ""
    order: int = 0
    why: str = ""


def call_of(node: fx.Node) -> Call | None:
    """What a node calls; None where that only looks at a tensor in another way."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    copies = node.target is torch.ops.aten._to_copy.default
    if effects.views(node) and not effects.writes(node) and not copies:
        return None
    kernel, by = _named(node.target)
    acts = [a for a in node.args if isinstance(a, str) and a != "none"] if by != "torch" else []
    found = origins.of(node)
    lines = _joined(dict.fromkeys(origin.line for origin in found if origin.line))
    module, order = (found[0].module, found[0].order) if found else ("", 0)
    return Call(
        " + ".join([kernel, *acts]), by, lines, module, order, node.meta.get("why", "") if by == "torch" else ""
    )


def _joined(lines: Iterable[str]) -> str:
    """Places in files, the files once."""
    files: dict[str, list[str]] = {}
    for line in lines:
        file, _, number = line.rpartition(":")
        files.setdefault(file, []).append(number)
    return "; ".join(f"{file}:{', '.join(numbers)}" for file, numbers in files.items())


def _named(target: Any) -> tuple[str, str]:
    """The name of a function, and who made it."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
        return name, "torch" if target.namespace == "aten" else target.namespace
    if isinstance(target, functools.partial):
        # On an adapter, which is a module.
        return target.func.__name__.strip("_"), _backend(getattr(target.args[0], "__name__", "gankern"))
    name = getattr(target, "__name__", type(target).__name__)
    return _NAMES.get(name, name), _backend(getattr(target, "__module__", None) or "torch")


def _backend(module: str) -> str:
    last = module.rpartition(".")[2]
    return last if last in backends.NAMES else module.partition(".")[0]


def calls_of(plan: Any) -> list[Call]:
    """What a plan calls, in order: its `PROGRAMS` are names of functions by `compile_graph`, or None."""
    programs = (getattr(plan, name) for name in plan.PROGRAMS)
    return [call for run in programs if run is not None for call in run.calls]


def as_lines(calls: Sequence[Call]) -> Iterator[str]:
    """A table of 80 columns where names allow: a line for each kernel of gankern's and line of code, with its calls.

    What torch runs of one line is together. Files are named without their folders.
    """
    kernels: dict[Call, Counter[str]] = {}
    modules: dict[Call, dict[str, None]] = {}
    for call in calls:
        plain = call.by == "torch" and not call.why
        key = call._replace(kernel="" if plain else call.kernel, module="", order=min(call.order, len(PASSES) - 1))
        kernels.setdefault(key, Counter())[call.kernel] += 1
        modules.setdefault(key, {})[call.module] = None
    yield _row("pass", "kernel", "by", "where", "module", "n")
    before = None
    for key in sorted(kernels, key=lambda key: key.order):
        names, inside = (_short(list(found), width) for found, width in ((kernels[key], 28), (modules[key], 8)))
        head = "" if key.order == before else PASSES[key.order]
        lines = re.sub(r"[^; ]*/", "", key.lines)
        yield _row(head, names, key.by, lines, inside, str(kernels[key].total()))
        before = key.order
    reasons = Counter((call.kernel, call.why) for call in calls if call.why)
    for (kernel, why), count in reasons.items():
        yield f"torch's {kernel}{f' ({count} calls)' if count > 1 else ''}: {why}"


def _short(names: list[str], width: int) -> str:
    """Names in a row, the last ones as their number where they are too many."""
    text, names = "", list(filter(None, names))
    for shown in range(len(names), 0, -1):
        text = ", ".join(names[:shown]) + (f" +{len(names) - shown}" if shown < len(names) else "")
        if len(text) <= width:
            break
    return text


def _row(*cells: str) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, (8, 28, 7, 20, 8), strict=False)]
    return " ".join([*padded, f"{cells[-1]:>2}"])
