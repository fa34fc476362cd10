"""Convolutions, their gradients and the piecewise linear activations around them run as gankern's kernels.

    h = convolution(x, w, b, ...)                               y = conv(x, w, b, leaky_relu)
    y = leaky_relu(h, 0.2)
                                                          ->
    dy, _, _ = convolution_backward(g, y, w, ..., [1, 0, 0])    dh = conv_input_grad(g, w, y, leaky_relu)
    dh = leaky_relu_backward(dy, h, 0.2, False)

    _, dw, db = convolution_backward(g, x, w, ..., [0, 1, 1])   dw = conv_weight_grad(g, x, w); db = sum(g)

Exact: a convolution is its kernel's sum in another order; with a slope above zero an activation's output is positive
just where its input is, so that the derivative may be told from either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gankern.compiler import origins
from gankern.compiler.passes import effects
from gankern.compiler.passes.effects import arguments
from gankern.ops.conv_act.reference import ConvOptions

aten = torch.ops.aten

#: Whether a kernel pays: of a pass, images, a weight, and whether the convolution is transposed.
Pays = Callable[[str, Tensor, Tensor, bool], bool]


def lower(graph: fx.Graph, adapter: Any, pays: Pays = lambda *_: True) -> int:
    """Put an adapter's functions in the place of the convolutions that it takes, fused where nobody else reads.

    `pays` tells of "forward", "input" and "weight" whether the kernel of that pass is to run, by images and weight;
    returns how many forward passes do.
    """
    count = 0
    for node in list(graph.nodes):
        args = arguments(node)
        if node.target is aten.convolution.default:
            node.meta["why"] = _refusal(adapter, args[0], args[1], args[3:9])
            if not node.meta["why"]:
                node.meta["why"] = FASTER
                if pays("forward", _value(args[0]), _value(args[1]), args[6]):
                    _lower_forward(graph, node, adapter)
                    count += 1
        elif node.target is aten.convolution_backward.default:
            node.meta["why"] = _refusal(adapter, args[1], args[2], args[4:10])
            if not node.meta["why"]:
                _lower_backward(graph, node, adapter, pays)
    _fuse_forward(graph, adapter)
    _fuse_backward(graph, adapter)
    return count


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _options(geometry: Any) -> ConvOptions:
    stride, padding, dilation, transposed, output_padding, groups = geometry
    return ConvOptions(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)


def _refusal(adapter: Any, input: Any, weight: Any, geometry: Any) -> str:
    """Why an adapter does not run a convolution; empty if it does."""
    x, w = _value(input), _value(weight)
    if x.dim() != 4:
        return f"no kernel for {x.dim() - 2} dimensions"
    refused: str | None = adapter.refuse(x, w)
    return refused or ("" if adapter.takes_conv(x, w, _options(geometry)) else "no kernel for its sizes or groups")


#: Why torch's kernel stays where an adapter has one.
FASTER = "torch's is faster at these sizes"


def _insert(
    graph: fx.Graph, after: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], like: Tensor
) -> fx.Node:
    with graph.inserting_before(after):
        node = graph.call_function(function, args)
    node.meta["val"], node.meta["any_order"] = like, True
    return node


def _lower_forward(graph: fx.Graph, node: fx.Node, adapter: Any) -> None:
    input, weight, bias, *geometry = arguments(node)
    made = _insert(graph, node, adapter.conv, (input, weight, bias, _options(geometry), "none", 0.0), _value(node))
    made.meta["order"] = torch.channels_last
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _lower_backward(graph: fx.Graph, node: fx.Node, adapter: Any, pays: Pays) -> None:
    grad, input, weight, biases, *geometry, mask = arguments(node)
    options = _options(geometry)
    given = _value(input), _value(weight), options.transposed
    wanted = [mask[0] and pays("input", *given), mask[1] and pays("weight", *given)]
    # The bias's gradient is a by-product of the weight's.
    wanted.append(mask[2] and (wanted[1] or not mask[1]))
    for reader in list(node.users):
        place = arguments(reader)[1]
        if not wanted[place]:
            continue
        if place == 0:
            args: tuple[Any, ...] = (grad, weight, input, options, "none", 0.0)
            made = _insert(graph, node, adapter.conv_input_grad, args, _value(reader))
            made.meta["order"] = torch.channels_last
        elif place == 1:
            made = _insert(graph, node, adapter.conv_weight_grad, (grad, input, weight, options), _value(reader))
        else:
            made = _insert(graph, node, aten.sum.dim_IntList, (grad, [0, 2, 3]), _value(reader))
        reader.replace_all_uses_with(made)
        graph.erase_node(reader)
    if node.users:
        node.meta["why"] = FASTER
        left = [needed and not ours for needed, ours in zip(mask, wanted, strict=True)]
        node.args = (grad, input, weight, biases, *geometry, left)
    else:
        graph.erase_node(node)


_RELU = {aten.relu.default, aten.relu_.default}
_TANH = {aten.tanh.default, aten.tanh_.default}
_LEAKY = {aten.leaky_relu.default, aten.leaky_relu_.default}


def activation(node: fx.Node) -> tuple[str, float] | None:
    """The activation that a node applies to its first argument."""
    if node.target in _RELU:
        return "relu", 0.0
    if node.target in _LEAKY:
        slope = arguments(node)[1] if len(node.args) > 1 else 0.01
        return ("leaky_relu", float(slope)) if slope > 0 else None
    return ("tanh", 0.0) if node.target in _TANH else None


def derivative(node: fx.Node) -> tuple[str, float, Any, bool] | None:
    """The activation whose derivative a node multiplies by, what tells it, and whether that is the output."""
    args = arguments(node)
    if node.target is aten.threshold_backward.default and args[2] == 0:
        return "relu", 0.0, args[1], True
    if node.target is aten.leaky_relu_backward.default and args[2] > 0:
        return "leaky_relu", float(args[2]), args[1], bool(args[3])
    return ("tanh", 0.0, args[1], True) if node.target is aten.tanh_backward.default else None


def _fuse_forward(graph: fx.Graph, adapter: Any) -> None:
    for node in list(graph.nodes):
        act = activation(node)
        conv = node.args[0] if act is not None else None
        if act is None or act[0] == "tanh" or not isinstance(conv, fx.Node):
            continue
        if conv.target is not adapter.conv or conv.args[4] != "none":
            continue
        if effects.writes(node):
            # Whoever reads the convolution afterwards sees the activated values.
            if next(iter(conv.users)) is not node or any(user.op == "output" for user in conv.users):
                continue
            conv.args = (*conv.args[:4], *act)
            origins.absorb(conv, node)
            node.replace_all_uses_with(conv)
            graph.erase_node(node)
            continue
        others = [user for user in conv.users if user is not node]
        if all(_tells(user, conv, act) for user in others):
            conv.args = (*conv.args[:4], *act)
            for user in others:
                user.args = (user.args[0], conv, user.args[2], True)
            origins.absorb(conv, node)
            node.replace_all_uses_with(conv)
            graph.erase_node(node)


def _tells(user: fx.Node, conv: fx.Node, act: tuple[str, float]) -> bool:
    found = derivative(user)
    return found is not None and found == (*act, conv, False) and user.args[0] is not conv


def _fuse_backward(graph: fx.Graph, adapter: Any) -> None:
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        found = derivative(node)
        grad = node.args[0] if found is not None else None
        if found is None or found[0] == "tanh" or not isinstance(grad, fx.Node):
            continue
        if grad.target is not adapter.conv_input_grad:
            continue
        act, slope, told_by, _ = found
        # The activation's input tells the same as its output: the signs are equal.
        if len(grad.users) == 1 and grad.args[4] == "none" and place[told_by] < place[grad]:
            grad.args = (*grad.args[:2], told_by, grad.args[3], act, slope)
            origins.absorb(grad, node)
            node.replace_all_uses_with(grad)
            graph.erase_node(node)
