"""Tensors of zeros, and what they reach, fall away.

    z = zeros_like(y)                                 dw = g
    _, dw0, _ = convolution_backward(z, x, w, ...)  ->
    dw = g + dw0

Autograd writes the second derivative of a piecewise linear activation as zeros, and drives them through the whole
forward graph. Exact for finite values: a map that is linear in an argument is zero at zero. (Where a weight or an
activation is infinite stock computes 0 * inf; its scores are not finite then either.)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from gankern.compiler import norms
from gankern.compiler.passes import effects

aten = torch.ops.aten

_SOURCES = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default, aten._efficientzerotensor.default}

# Operators that are linear in the arguments at these places, all others held fixed: zero where one of them is.
_LINEAR: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default), (0, 1)),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.sum.default), (0,)),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.t.default), (0,)),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.view.default, aten._unsafe_view.default), (0,)),
    **dict.fromkeys((aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim), (0,)),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dims, aten.slice.Tensor, aten.select.int), (0,)),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default, aten.constant_pad_nd.default), (0,)),
    **dict.fromkeys((aten.slice_backward.default, aten.select_backward.default), (0,)),
    **dict.fromkeys((aten.threshold_backward.default, aten.leaky_relu_backward.default), (0,)),
    **dict.fromkeys((aten.convolution_backward.default,), (0,)),
    **dict.fromkeys((aten.avg_pool2d.default, aten.avg_pool2d_backward.default), (0,)),
    **dict.fromkeys((op for ops in norms.NORMS for op in ops[1:]), (0,)),
    **dict.fromkeys((aten.native_batch_norm_backward.default,), (0,)),
}


def _is_zero(node: Any, zero: set[fx.Node]) -> bool:
    return isinstance(node, fx.Node) and node in zero


def _meta(node: fx.Node) -> Any:
    return node.meta.get("val")


def _same(a: fx.Node, b: fx.Node) -> bool:
    """Whether one may stand for the other: shape, dtype and strides."""
    x, y = _meta(a), _meta(b)
    return bool(
        isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and x.shape == y.shape
        and x.dtype == y.dtype
        and x.stride() == y.stride()
    )


def fold(graph: fx.Graph) -> None:
    """Up to the first update in it: before that, a run whose values are not finite can begin anew."""
    changed = effects.written(graph)
    zero: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target is effects.mark:
            break
        if node.op != "call_function" or node in changed:
            continue
        if node.target in _SOURCES or (node.target is aten.full_like.default and node.args[1] == 0):
            zero.add(node)
        elif node.target is operator.getitem:
            if _is_zero(node.args[0], zero):
                zero.add(node)
        elif node.target in _LINEAR:
            if any(_is_zero(node.args[place], zero) for place in _LINEAR[node.target] if place < len(node.args)):
                zero.add(node)
        elif node.target in (aten.add.Tensor, aten.sub.Tensor) and len(node.args) == 2:
            _fold_sum(node, zero, changed)
    for node in zero:
        _materialise(graph, node, zero)


def _fold_sum(node: fx.Node, zero: set[fx.Node], changed: set[fx.Node]) -> None:
    args = effects.arguments(node)
    first, second = (_is_zero(a, zero) for a in args)
    if any(used in changed for used in node.all_input_nodes):
        return
    if first and second:
        zero.add(node)
    elif second and isinstance(args[0], fx.Node) and _same(node, args[0]):
        node.replace_all_uses_with(args[0])
    elif first and node.target is aten.add.Tensor and not node.kwargs and _same(node, args[1]):
        node.replace_all_uses_with(args[1])


def _materialise(graph: fx.Graph, node: fx.Node, zero: set[fx.Node]) -> None:
    """Zeros that something else reads are made as such, not computed."""
    value = _meta(node)
    readers = [user for user in node.users if user not in zero]
    if not readers or node.target in _SOURCES or not isinstance(value, torch.Tensor):
        return
    with graph.inserting_before(node):
        made = graph.call_function(zeros, (tuple(value.shape), tuple(value.stride()), value.dtype, value.device))
    made.meta["val"] = value
    node.replace_all_uses_with(made, lambda user: user not in zero)


def zeros(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()
