"""A graph as a plain function: one line a call, tensors let go where they are last used.

What torch's operators compute on a CPU they write into the workspace, where they can be told where to: memory that is
freshly allocated costs a page fault every 4 KiB.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from gankern import workspace
from gankern._layout import turned
from gankern.compiler import choice
from gankern.compiler.report import Call, call_of

#: Called with each call of a program when it has returned, and with None when the program begins.
Tick = Callable[[Call | None], None]

aten = torch.ops.aten


class _Into(NamedTuple):
    """An operator that writes where it is told, the name of that argument, and arguments of its own."""

    op: Any
    name: str
    more: Mapping[str, Any] = {}


@cache
def _into(op: OpOverload) -> _Into | None:
    """The form of an operator with room for its result; None where that would be a copy."""
    if op is aten.relu.default:
        return _Into(aten.clamp_min.out, "out", {"min": 0})
    if len(op._schema.returns) != 1 or op._schema.returns[0].alias_info is not None:
        return None
    given = [(a.name, str(a.type)) for a in op._schema.arguments]
    for overload in op.overloadpacket.overloads():
        form = getattr(op.overloadpacket, overload)
        results = [a.name for a in form._schema.arguments if a.is_out]
        others = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
        if len(results) == 1 and others == given and torch.Tag.generated not in form.tags:
            return _Into(form, results[0])
    return None


def _may_have_room(node: fx.Node) -> bool:
    """Whether the result of a node is large enough for the workspace, and an operator's that can write there."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout is not torch.strided:
        return False
    if workspace.kernels is None:
        return False
    if not choice.workspace_pays(value.numel() * value.element_size()):
        return False
    return node.target in _BY_COPY or (isinstance(node.target, OpOverload) and _into(node.target) is not None)


def _room(found: Tensor) -> Callable[[], Tensor] | None:
    """Room for a tensor like one that torch has found a place for; None where that has gaps."""
    spread = sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True)) + 1
    return workspace.place(found.shape, found.stride(), found.dtype) if spread == found.numel() else None


def _clone(room: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    return room().copy_(tensor)


def _turned(room: Callable[[], Tensor], tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return tensor if tensor.stride() == strides else room().copy_(tensor)


def _pad(room: Callable[[], Tensor], tensor: Tensor, pad: list[int], value: float = 0) -> Tensor:
    """:func:`torch.nn.functional.pad`, as torch does it."""
    result = inner = room().fill_(value)
    for back, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        start, length = max(before, 0), tensor.size(-back) + min(before, 0) + min(after, 0)
        inner = inner.narrow(-back, start, length)
        tensor = tensor.narrow(-back, max(-before, 0), length)
    inner.copy_(tensor)
    return result


_BY_COPY = {
    aten.clone.default: _clone,
    aten._to_copy.default: _clone,
    aten.constant_pad_nd.default: _pad,
    turned: _turned,
}


def compile_graph(traced: fx.GraphModule, packed: bool = False, rooms: bool = True) -> Program:
    """The function of a graph's placeholders that its nodes compute.

    `packed`, it takes them in one list, which it empties: nobody else then keeps them. Its first run lets torch find a
    place for each result, and later ones put large ones into the workspace, as they lay then; without `rooms` none.
    """
    return Program(traced, packed, rooms)


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


class Program:
    """What `compile_graph` gives.

    Attributes
    ----------
    source : str
        The code that the next run is of.
    calls : list of Call
        What it runs, in order.
    """

    def __init__(self, traced: fx.GraphModule, packed: bool, rooms: bool) -> None:
        self._traced, self._packed = traced, packed
        (results,) = next(node for node in traced.graph.nodes if node.op == "output").args
        # Who calls may do with the output whatever can be done with a tensor of torch's.
        given_out = results[0] if isinstance(results, list | tuple) and results else results
        #: Room for the results of nodes; at first what looks at where torch has put them.
        self._rooms: dict[fx.Node, Callable[..., Any] | None] = {
            node: partial(self._see, node)
            for node in traced.graph.nodes
            if rooms and node.op == "call_function" and node is not given_out and _may_have_room(node)
        }
        self._seen = not self._rooms
        found = ((node, call_of(node)) for node in traced.graph.nodes)
        self._calls = {node: call for node, call in found if call is not None}
        self.calls = list(self._calls.values())
        self._tick: Tick | None = None
        self._compile()

    def tell(self, tick: Tick | None) -> None:
        """Run another program from now on, that tells of each call; None for the one that does not."""
        self._tick = tick
        self._compile()

    def _see(self, node: fx.Node, found: Tensor) -> None:
        self._rooms[node] = _room(found)

    def __call__(self, *given: Any) -> Any:
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
            if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
                inner = ", ".join(map(literal, value))
                return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if value else "()"
            if value is None or isinstance(value, bool | int | str):
                return repr(value)
            return name_of(value)

        parameters, lines = [], []
        for node in graph.nodes:
            if node.op == "placeholder":
                parameters.append(node.name)
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
                room = self._rooms.get(node) if self._seen else None
                into = None if room is None or target in _BY_COPY else _into(target)
                if room is not None and into is None:
                    # What else they are told is what the room is like.
                    target, keywords = _BY_COPY[target], {}
                    arguments.insert(0, name_of(room))
                elif into is not None:
                    target, keywords = into.op, {**keywords, **into.more}
                arguments += [f"{k}={literal(v)}" for k, v in keywords.items()]
                if into is not None:
                    arguments.append(f"{into.name}={name_of(room)}()")
                lines.append(f"{node.name} = {name_of(target)}({', '.join(arguments)})")
                if not self._seen and node in self._rooms:
                    lines.append(f"{name_of(self._rooms[node])}({node.name})")
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
