"""Images are turned once, where they enter and leave the parts of a graph that run in channels_last.

    y = conv(x, w)                      y = conv(x, w)              channels_last
    z = mul(y, 2)                  ->   z = mul(y, 2)               channels_last, as its input
    v = view(z, [n, c * h * w])         z1 = turned(z, strides)     as stock has it
                                        v = view(z1, ...)

Exact: an operator that works element by element, or sums, does the same in any order of memory; every other gets its
arguments in the order that stock's graph has them in. What such a one writes in place has that order from the start.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gankern._layout import dense, turned
from gankern.compiler import choice, norms
from gankern.compiler.passes import effects

aten = torch.ops.aten

# Beside those that work element by element.
_ANY_ORDER = {
    *(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cat.default),
    *(aten.slice.Tensor, aten.select.int, aten.expand.default, aten.unsqueeze.default),
    *(aten.leaky_relu_backward.default, aten.threshold_backward.default, aten.copy_.default),
    *(op for ops in norms.NORMS for op in ops),
    *(aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.constant_pad_nd.default),
    *(aten.full_like.default, aten.native_batch_norm.default, aten.native_batch_norm_backward.default),
    *(aten.upsample_nearest2d.default, aten.upsample_nearest2d_backward.default),
    *(aten.upsample_bilinear2d.default, aten.upsample_bilinear2d_backward.default),
    *(aten.avg_pool2d.default, aten.avg_pool2d_backward.default, aten.max_pool2d_with_indices.default),
    *(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default),
    *(aten.reflection_pad2d.default, aten.replication_pad2d.default),
    *(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.native_group_norm.default),
    *(aten.elu_backward.default, aten.softplus_backward.default, aten.hardtanh_backward.default),
    *(aten._prelu_kernel.default, aten._prelu_kernel_backward.default),
}
# They run faster in channels_last.
_CONVOLUTIONS = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}


def settle(graph: fx.Graph, convolutions: bool = False) -> int:
    """Turn what nodes marked with an ``order`` leave in another order than their readers can take.

    `convolutions`, those of torch get images in channels_last, too; returns how many run in it that did not, less those
    that images are turned back for.
    """
    count = 0
    kept = _keep_order(graph)
    changed = effects.last_writes(graph)
    place_of = {node: place for place, node in enumerate(graph.nodes)}
    actual: dict[fx.Node, Any] = {}
    turned_of: dict[fx.Node, fx.Node] = {}
    images_of: dict[fx.Node, fx.Node] = {}

    def to_channels_last(node: fx.Node, source: fx.Node) -> None:
        if changed.get(source, -1) >= place_of[node]:
            return
        copy = images_of.get(source)
        if copy is None:
            image = source.meta["val"].contiguous(memory_format=torch.channels_last)
            with graph.inserting_before(node):
                copy = graph.call_function(turned, (source, tuple(image.stride())))
            copy.meta["val"], actual[copy] = source.meta["val"], image
            place_of[copy] = place_of[node]
            images_of[source] = copy
        node.replace_input_with(source, copy)

    for node in list(graph.nodes):
        stock = node.meta.get("val")
        actual[node] = stock
        if "follows" in node.meta:
            image = dense(actual[effects.arguments(node)[node.meta["follows"]]])
            actual[node] = (image, *stock[1:]) if isinstance(stock, tuple) else image
            continue
        if "order" in node.meta:
            actual[node] = stock.contiguous(memory_format=node.meta["order"])
            continue
        if node.target is operator.getitem and isinstance(actual[effects.arguments(node)[0]], list | tuple):
            actual[node] = actual[effects.arguments(node)[0]][effects.arguments(node)[1]]
            continue
        if convolutions and node.target in _CONVOLUTIONS:
            for place in _CONVOLUTIONS[node.target]:
                source = effects.arguments(node)[place]
                if _is_image(actual[source]) and _is_wide(node):
                    to_channels_last(node, source)
            count += node.target is aten.convolution.default and _moved(effects.arguments(node)[0], actual)
        moved = [n for n in node.all_input_nodes if isinstance(actual[n], Tensor) and _moved(n, actual)]
        if not moved or node.meta.get("any_order"):
            continue
        if _takes_any_order(node):
            # Mixed, operators are slow, and not of one mind which order their result has.
            for source in () if node.target in _CONVOLUTIONS else node.all_input_nodes:
                if source not in moved and _is_image(actual[source]) and actual[source].shape == actual[moved[0]].shape:
                    to_channels_last(node, source)
            args, kwargs = pytree.tree_map(
                lambda a: actual[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
            )
            with torch.no_grad():
                found = node.target(*args, **kwargs)
            actual[node] = pytree.tree_map(_in_channels_last, found) if node.target in _CONVOLUTIONS else found
            continue
        if node.target is operator.getitem:
            actual[node] = actual[effects.arguments(node)[0]][effects.arguments(node)[1]]
            continue
        for source in moved:
            copy = turned_of.get(source)
            if copy is None:
                with graph.inserting_before(node):
                    copy = graph.call_function(turned, (source, tuple(source.meta["val"].stride())))
                copy.meta["val"] = actual[copy] = source.meta["val"]
                if changed.get(source, -1) < place_of[node]:
                    turned_of[source] = copy
            node.replace_input_with(source, copy)
    for copy in kept:
        (made, _) = effects.arguments(copy)
        if not _moved(made, actual):
            copy.replace_all_uses_with(made)
            graph.erase_node(copy)
    return count - len(turned_of)


def _keep_order(graph: fx.Graph) -> list[fx.Node]:
    """Give memory stock's order as soon as it is made, where what goes by that writes it, or views what is written.

    A copy that is turned later would be changed in its place. Returns the nodes that turn.
    """
    copies = []
    home = effects.homes(graph)
    changed = effects.written(graph)
    roots: dict[fx.Node, None] = {}
    for node in graph.nodes:
        seen = effects.written_by(node) + ([node] if effects.views(node) and node in changed else [])
        if not _takes_any_order(node) and node.target is not operator.getitem:
            roots.update(dict.fromkeys(home[n] for n in seen if home[n].op != "placeholder"))
    for root in roots:
        value = root.meta["val"]
        if root.target is aten.empty_like.default:
            root.meta["like"] = str(root.args[0])
            root.target, root.args = torch.empty_strided, (tuple(value.shape), tuple(value.stride()))
            root.kwargs = {"dtype": value.dtype, "device": value.device}
            continue
        for made in [root] if isinstance(value, Tensor) else list(root.users):
            with graph.inserting_after(made):
                copy = graph.call_function(turned, (made, tuple(made.meta["val"].stride())))
            copy.meta.update(val=made.meta["val"], any_order=True)
            for user in list(made.users):
                if user is not copy:
                    user.replace_input_with(made, copy)
            copies.append(copy)
    return copies


def _in_channels_last(value: Any) -> Any:
    """What a convolution leaves; to claim it where it is not costs a look at the strides."""
    images = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if images else value


def _is_wide(node: fx.Node) -> bool:
    """Whether images are more than what it costs to turn the weight."""
    forward = node.target is aten.convolution.default
    output = node.meta["val"] if forward else effects.arguments(node)[0].meta["val"]
    input, weight = (effects.arguments(node)[place].meta["val"] for place in ((0, 1) if forward else (1, 2)))
    return choice.outweighs(input.numel() + output.numel(), weight.numel())


def _is_image(value: Any) -> bool:
    """Whether a tensor is of images that are not in channels_last."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and choice.order_pays(value)
        and not value.is_contiguous(memory_format=torch.channels_last)
    )


def _moved(node: fx.Node, actual: dict[fx.Node, Any]) -> bool:
    return bool(actual[node].stride() != node.meta["val"].stride())


def _takes_any_order(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _CONVOLUTIONS:
        return bool(effects.arguments(node)[0].meta["val"].dim() == 4) and _is_wide(node)
    ordered = effects.draws(node) or not (torch.Tag.pointwise in node.target.tags or node.target in _ANY_ORDER)
    return not ordered
