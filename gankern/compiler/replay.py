"""A graph as a plain function: one line a call, tensors let go where they are last used."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx


def compile_graph(traced: fx.GraphModule, packed: bool = False) -> Callable[..., Any]:
    """The function of a graph's placeholders that its nodes compute.

    `packed`, it takes them in one list, which it empties: nobody else then keeps them.
    """
    last_use: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    dies: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last_use.items():
        dies.setdefault(node, []).append(used)
    scope: dict[str, Any] = {}
    names: dict[Any, str] = {}

    def name_of(value: Any) -> str:
        """A global that holds a value which has no literal."""
        key = id(value)
        if key not in names:
            names[key] = f"_{len(names)}"
            scope[names[key]] = value
        return names[key]

    def literal(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            inner = ", ".join(map(literal, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        return name_of(value)

    parameters, lines = [], []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            parameters.append(node.name)
            continue
        if node.op == "output":
            lines.append(f"return {literal(node.args[0])}")
            break
        if node.op == "get_attr":
            lines.append(f"{node.name} = {name_of(getattr(traced, str(node.target)))}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {literal(node.args[0])}[{node.args[1]}]")
        else:
            arguments = [literal(a) for a in node.args] + [f"{k}={literal(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {name_of(node.target)}({', '.join(arguments)})")
        dead = [n.name for n in dies.get(node, ())] + ([node.name] if not node.users else [])
        if dead:
            lines.append(f"del {', '.join(dead)}")
    if packed:
        lines[:0] = [f"{', '.join(parameters)}, = given", "given.clear()"]
        parameters = ["given"]
    source = f"def replay({', '.join(parameters)}):\n    " + "\n    ".join(lines) + "\n"
    exec(compile(source, "<gankern plan>", "exec"), scope)
    run: Callable[..., Any] = scope["replay"]
    run.source = source  # type: ignore[attr-defined]
    return run
