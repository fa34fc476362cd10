"""Images are turned once, where they enter and leave the parts of a graph that run in channels_last.

    y = conv(x, w)                      y = conv(x, w)              channels_last
    z = mul(y, 2)                  ->   z = mul(y, 2)               channels_last, as its input
    v = view(z, [n, c * h * w])         z1 = turned(z, strides)     as stock has it
                                        v = view(z1, ...)

Exact: an operator that works element by element, or sums, does the same in any order of memory; every other gets its
arguments in the order that stock's graph has them in.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gankern.compiler import norms
from gankern.compiler.passes import effects
from gankern.compiler.refusal import Refused

aten = torch.ops.aten

# Beside those that work element by element.
_ANY_ORDER = {
    *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cat.default),
    *(aten.slice.Tensor, aten.select.int, aten.expand.default, aten.unsqueeze.default),
    *(aten.leaky_relu_backward.default, aten.threshold_backward.default, aten.copy_.default),
    *(*norms.LAYER_NORM, *norms.GROUP_NORM),
    *(aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.constant_pad_nd.default),
}


def turned(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same elements in another order of memory."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def settle(graph: fx.Graph) -> None:
    """Turn what nodes marked with an ``order`` leave in another order than their readers can take."""
    changed = effects.written(graph)
    actual: dict[fx.Node, Any] = {}
    turned_of: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        stock = node.meta.get("val")
        actual[node] = stock
        if "order" in node.meta:
            actual[node] = stock.contiguous(memory_format=node.meta["order"])
            continue
        if node.target is operator.getitem and isinstance(actual[node.args[0]], list | tuple):
            actual[node] = actual[node.args[0]][node.args[1]]
            continue
        moved = [n for n in node.all_input_nodes if isinstance(actual[n], Tensor) and _moved(n, actual)]
        if not moved or node.meta.get("any_order"):
            continue
        if _takes_any_order(node):
            args, kwargs = pytree.tree_map(
                lambda a: actual[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
            )
            with torch.no_grad():
                actual[node] = node.target(*args, **kwargs)
            continue
        if node.target is operator.getitem:
            actual[node] = actual[node.args[0]][node.args[1]]
            continue
        # A copy would be changed in the place of the images.
        if (effects.views(node) and node in changed) or any(n in effects.written_by(node) for n in moved):
            raise Refused(f"images are changed in place, by or after {node.target}")
        for source in moved:
            copy = turned_of.get(source)
            if copy is None:
                with graph.inserting_before(node):
                    copy = graph.call_function(turned, (source, tuple(source.meta["val"].stride())))
                copy.meta["val"] = actual[copy] = source.meta["val"]
                if source not in changed:
                    turned_of[source] = copy
            node.replace_input_with(source, copy)


def _moved(node: fx.Node, actual: dict[fx.Node, Any]) -> bool:
    return bool(actual[node].stride() != node.meta["val"].stride())


def _takes_any_order(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    ordered = effects.draws(node) or not (torch.Tag.pointwise in node.target.tags or node.target in _ANY_ORDER)
    return not ordered
