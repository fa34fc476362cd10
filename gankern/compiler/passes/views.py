"""Views are asked for by their shape alone, and what was turned back is what it was.

    y = view(x, [n, -1])    ->    y = reshape(x, [n, -1])
    y = t(t(x))             ->    y = x

Exact: the same elements. Strides of fake tensors are not always those of real ones, and a view of real ones may be
impossible where stock's own code, which saw the real ones, would have copied. Only of memory that nobody changes, and
no result of the graph becomes an argument's or another result's tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gankern.compiler.passes import effects

aten = torch.ops.aten


def relax(graph: fx.Graph) -> None:
    changed = effects.written(graph)
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default) and node not in changed:
            node.target = aten.reshape.default


def turn_back(graph: fx.Graph) -> None:
    changed = effects.written(graph)
    for node in list(graph.nodes):
        order = _order(node)
        if order is None or node in changed:
            continue
        turned: Any = node.args[0]
        before = _order(turned)
        if before is None or [before[i] for i in order] != sorted(order):
            continue
        first: Any = turned.args[0]
        if _is_result(node) and (first.op == "placeholder" or _is_result(first)):
            continue
        node.replace_all_uses_with(first)
        graph.erase_node(node)


_TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)


def _order(node: Any) -> list[int] | None:
    """The dims of what a node turns, in the order of its own; None where it turns nothing."""
    if not isinstance(node, fx.Node) or node.target not in _TURNS:
        return None
    args = effects.arguments(node)
    dims = list(range(args[0].meta["val"].dim()))
    if node.target is aten.permute.default:
        return [dims[i] for i in args[1]]
    i, j = (0, -1) if node.target is aten.t.default else args[1:3]
    if dims:
        dims[i], dims[j] = dims[j], dims[i]
    return dims


def _is_result(node: fx.Node) -> bool:
    return any(user.op == "output" or user.target is effects.returned for user in node.users)
