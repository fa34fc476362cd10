"""What a node does besides computing its result."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from gankern import _library
from gankern._layout import dense, turned

aten = torch.ops.aten

#: Stands for the output as whoever got it has left it when a backward pass reads it.
returned = _library.define("returned(Tensor output) -> Tensor", torch.empty_like, torch.empty_like)

#: Stands where a step calls what runs as itself, which may change parameters; numbered by what comes before.
mark = _library.define("step_mark(Tensor(a!)[] parameters, int number) -> ()", lambda *_: None, lambda *_: None)

# Their schemas do not say that they write the running statistics.
_WRITE_STATISTICS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}

# Functions that give what they were given, or a part of it.
_SHARE = (operator.getitem, dense, turned)


@functools.cache
def _schema(target: Any) -> tuple[bool, bool, bool]:
    """Whether an operator writes an argument, draws random numbers, and returns a view."""
    if not isinstance(target, torch._ops.OpOverload):
        # Python's getitem, and kernels that a pass has put in: they return new tensors.
        return False, False, False
    schema = target._schema
    infos = [a.alias_info for a in schema.arguments]
    writes = any(info is not None and info.is_write for info in infos)
    views = any(r.alias_info is not None for r in schema.returns)
    random = torch.Tag.nondeterministic_seeded in target.tags
    # These return their input itself where nothing is to be done.
    return writes, random, views or target in (aten._to_copy.default, aten.reshape.default, aten.contiguous.default)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments, whose kinds a node's operator tells."""
    return node.args


def writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments."""
    if node.target in _WRITE_STATISTICS:
        return any(isinstance(statistic, fx.Node) for statistic in node.args[3:5])
    return node.op == "call_function" and _schema(node.target)[0]


def written_by(node: fx.Node) -> list[fx.Node]:
    """Arguments that a node changes."""
    if not writes(node):
        return []
    if node.target in _WRITE_STATISTICS:
        return [a for a in node.args[3:5] if isinstance(a, fx.Node)]
    target: Any = node.target
    infos = target._schema.arguments
    places = [i for i, a in enumerate(infos) if a.alias_info is not None and a.alias_info.is_write]
    given = [node.args[i] if i < len(node.args) else node.kwargs.get(infos[i].name) for i in places]
    lists = (a if isinstance(a, list | tuple) else (a,) for a in given)
    return [a for found in lists for a in found if isinstance(a, fx.Node)]


def changed_and_returned(node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes and returns, its first argument or ``out``; None where it does no such thing."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    results, given = node.target._schema.returns, written_by(node)
    same = len(results) == len(given) == 1 and results[0].alias_info is not None and results[0].alias_info.is_write
    return given[0] if same else None


def is_pure(node: fx.Node) -> bool:
    """Whether a node may be left out where nobody reads it, and be shared with its equals."""
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
        # An assertion.
        return False
    return node.op in ("call_function", "get_attr") and not (writes(node) or draws(node))


def draws(node: fx.Node) -> bool:
    """Whether a node takes random numbers, each for the next element in memory."""
    return node.op == "call_function" and _schema(node.target)[1]


def views(node: fx.Node) -> bool:
    """Whether a node's result may share memory with one of its arguments."""
    return node.op == "call_function" and _schema(node.target)[2]


def homes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node that made the memory of each."""
    home: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first = changed_and_returned(node) or (node.args[0] if node.args else None)
        shares = views(node) or node.target in _SHARE or any(used is first for used in written_by(node))
        if shares and isinstance(first, fx.Node):
            home[node] = home.get(first, first)
        else:
            home[node] = node
    return home


def written(graph: fx.Graph, marks: bool = True) -> set[fx.Node]:
    """Nodes whose memory is changed after they were computed, in whatever view of it."""
    return set(last_writes(graph, marks))


def last_writes(graph: fx.Graph, marks: bool = True) -> dict[fx.Node, int]:
    """Where in the graph the memory of a node is changed for the last time, of those whose is."""
    home = homes(graph)
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(graph.nodes):
        for used in written_by(node) if marks or node.target is not mark else ():
            last[home[used]] = place
    return {node: last[home[node]] for node in graph.nodes if home[node] in last}
