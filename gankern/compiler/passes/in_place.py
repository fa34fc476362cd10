"""Changes in place are calls that return something new while other passes run, and in place again after them.

    y = relu_(x); z = conv(x, w)    ->    y = relu(x); z = conv(y, w)    ->    y = relu_(x); z = conv(y, w)

Exact: of tensors that the graph makes itself and of which nobody reads an older view afterwards, whoever reads one then
sees what was written into it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gankern.compiler.passes import effects

aten = torch.ops.aten

# They have no such tag.
_POINTWISE = {aten.leaky_relu, aten.elu, aten.hardtanh, aten.threshold}


@functools.cache
def _twin(target: Any) -> Any:
    """The operator that computes what another writes into its first argument; None where there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    twin = getattr(packet, target._overloadname, None)
    return twin if twin is not None and _is_pointwise(twin) else None


@functools.cache
def _is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _POINTWISE


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes each element of the elements at the same place."""
    return isinstance(node.target, torch._ops.OpOverload) and _is_pointwise(node.target)


def forget(graph: fx.Graph) -> list[tuple[fx.Node, Any]]:
    """Make new tensors of what is written in place; returns the nodes, and the operators that they were."""
    found = []
    home = effects.homes(graph)
    place = {node: i for i, node in enumerate(graph.nodes)}
    shared: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        shared.setdefault(home[node], []).append(node)
    for node in graph.nodes:
        target: Any = effects.arguments(node)[0] if node.op == "call_function" and node.args else None
        twin = _twin(node.target) if isinstance(target, fx.Node) else None
        if twin is None or effects.written_by(node) != [target] or home[target].op == "placeholder":
            continue
        known = _aliases(node, target)
        others = [n for n in shared[home[target]] if place[n] < place[node] and n not in known]
        if any(place[user] > place[node] for other in others for user in other.users):
            continue
        if not _is_same(node, twin):
            continue
        found.append((node, node.target))
        node.target = twin
        for alias in known:
            for user in list(alias.users):
                if place[user] > place[node]:
                    user.replace_input_with(alias, node)
    return found


def _is_same(node: fx.Node, twin: Any) -> bool:
    """Whether the result of a call lies in memory as what is written in place, and is of its type."""
    args, kwargs = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
    value = node.meta["val"]
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        made = twin(*args, **kwargs)
    return (made.shape, made.stride(), made.dtype) == (value.shape, value.stride(), value.dtype)


def _aliases(node: fx.Node, target: fx.Node) -> list[fx.Node]:
    """The written tensor under its other names: what earlier writes in place returned."""
    names = [target]
    while effects.writes(names[-1]) and names[-1].args and isinstance(effects.arguments(names[-1])[0], fx.Node):
        names.append(effects.arguments(names[-1])[0])
    return names


def put_back(graph: fx.Graph, nodes: list[tuple[fx.Node, Any]]) -> None:
    """Write in place again where nobody reads the argument afterwards."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    home = effects.homes(graph)
    shared: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        shared.setdefault(home[node], []).append(node)
    for node, target in nodes:
        if node not in place or node.target is not _twin(target):
            continue
        given = effects.arguments(node)[0]
        if home[given].op == "placeholder" or not isinstance(given.meta.get("val"), torch.Tensor):
            continue
        if all(place[user] <= place[node] for name in shared[home[given]] for user in name.users):
            node.target = target
