"""A graph as a plain function: one line a call, tensors let go where they are last used.

What torch's operators compute on a CPU they write where :mod:`gankern.compiler.places` tells them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from gankern.compiler.places import Places
from gankern.compiler.report import Call, call_of

#: Called with each call of a program when it has returned, and with None when the program begins.
Tick = Callable[[Call | None], None]


def compile_graph(
    traced: fx.GraphModule, packed: bool = False, rooms: bool = True, given_out: Collection[fx.Node] | None = None
) -> Program:
    """The function of a graph's placeholders that its nodes compute.

    `packed`, it takes them in one list, which it empties: nobody else then keeps them. Its first run lets torch find a
    place for each result, and later ones put large ones into the workspace, as they lay then; without `rooms` none.
    What is `given_out` to who calls, the first result where that is left out, lies where torch finds place.
    """
    return Program(traced, packed, rooms, given_out)


@contextmanager
def timed(plans: Iterable[Any], tick: Tick) -> Iterator[None]:
    """Let plans tell of each call inside a ``with`` block; elsewhere their programs have nothing of it."""
    given = [getattr(plan, name) for plan in plans for name in plan.PROGRAMS]
    programs = [program for program in given if program is not None]
    try:
        for program in programs:
            program.tell(tick)
        yield
    finally:
        for program in programs:
            program.tell(None)


class _Code(str):
    """An expression, as it is to stand in the source."""


class Program:
    """What `compile_graph` gives.

    Attributes
    ----------
    source : str
        The code that the next run is of.
    calls : list of Call
        What it runs, in order.
    """

    def __init__(
        self, traced: fx.GraphModule, packed: bool, rooms: bool, given_out: Collection[fx.Node] | None
    ) -> None:
        self._traced, self._packed = traced, packed
        self._places = Places(traced.graph, given_out) if rooms else None
        self._seen = self._places is None or not self._places.looks
        found = ((node, call_of(node)) for node in traced.graph.nodes)
        self._calls = {node: call for node, call in found if call is not None}
        self.calls = list(self._calls.values())
        self._tick: Tick | None = None
        self._compile()

    def tell(self, tick: Tick | None) -> None:
        """Run another program from now on, that tells of each call; None for the one that does not."""
        self._tick = tick
        self._compile()

    def __call__(self, *given: Any) -> Any:
        # Each call of a tensor's method would go by way of the mode that a default device is.
        with torch._C.DisableTorchFunction():
            found = self._run(*given)
        if not self._seen:
            self._seen = True
            self._compile()
        return found

    def _compile(self) -> None:
        graph = self._traced.graph
        last_use: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
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
            if isinstance(value, _Code):
                return value
            if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
                inner = ", ".join(map(literal, value))
                return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
            if value is None or isinstance(value, bool | int | str):
                return repr(value)
            return name_of(value)

        look = "" if self._places is None else name_of(self._places.look)
        parameters, lines = [], []
        for node in graph.nodes:
            if node.op == "placeholder":
                parameters.append(node.name)
                if not self._seen and isinstance(node.meta.get("val"), Tensor):
                    lines.append(f"{look}({name_of(node)}, {node.name})")
                continue
            if node.op == "output":
                lines.append(f"return {literal(node.args[0])}")
                break
            if node.op == "get_attr":
                lines.append(f"{node.name} = {name_of(getattr(self._traced, str(node.target)))}")
            elif node.target is operator.getitem:
                lines.append(f"{node.name} = {literal(node.args[0])}[{node.args[1]}]")
            else:
                target, arguments, keywords = node.target, [literal(a) for a in node.args], dict(node.kwargs)
                place = self._places.of(node) if self._places is not None and self._seen else None
                if place is not None:
                    where = place.where.name if isinstance(place.where, fx.Node) else f"{name_of(place.where)}()"
                    target, keywords = place.op, {**(keywords if place.keeps else {}), **place.more}
                    keywords[place.name] = _Code(where)
                arguments += [f"{k}={literal(v)}" for k, v in keywords.items()]
                lines.append(f"{node.name} = {name_of(target)}({', '.join(arguments)})")
            if not self._seen and isinstance(node.meta.get("val"), Tensor):
                lines.append(f"{look}({name_of(node)}, {node.name})")
            if self._tick is not None and node in self._calls:
                lines.append(f"{name_of(self._tick)}({name_of(self._calls[node])})")
            dead = [n.name for n in dies.get(node, ())] + ([node.name] if not node.users else [])
            if dead:
                lines.append(f"del {', '.join(dead)}")
        if self._packed:
            lines[:0] = [f"{', '.join(parameters)}, = given", "given.clear()"] if parameters else []
            parameters = ["given"]
        if self._tick is not None:
            lines.insert(0, f"{name_of(self._tick)}(None)")
        source = f"def replay({', '.join(parameters)}):\n    " + "\n    ".join(lines) + "\n"
        exec(compile(source, "<gankern plan>", "exec"), scope)
        self.source = source
        self._run: Callable[..., Any] = scope["replay"]
