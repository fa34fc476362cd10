"""Batch norms over a batch's own statistics run as gankern's kernels, with the activation behind them.

    y, mean, invstd = native_batch_norm(x, w, b, ...)        y, mean, invstd, var = forward_train(x, w, b, relu)
    a = relu(y)
                                                       ->
    dy = threshold_backward(g, a, 0)                         dx, dw, db = backward(g, x, w, b, mean, invstd, relu)
    dx, dw, db = native_batch_norm_backward(dy, x, ...)

Exact: the same sums in another order; the derivative of the activation is told from the normalised value, which the
kernel has at hand.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from gankern._layout import dense
from gankern.compiler import choice, origins
from gankern.compiler.passes import effects
from gankern.compiler.passes.convolutions import FASTER, activation, derivative
from gankern.ops.conv_transpose_bn_act import reference

aten = torch.ops.aten


def fuse(graph: fx.Graph, adapter: Any) -> int:
    """Put an adapter's functions in the place of batch norms that it takes; how many."""
    return sum(_fuse(graph, node, adapter) for node in list(graph.nodes) if _takes(node, adapter))


def fold(graph: fx.Graph) -> int:
    """Let convolutions normalise by running statistics as well, where nobody differentiates; how many do.

    y = convolution(x, w, b); z = native_batch_norm(y, gamma, beta, mean, var, False)
        ->    s = gamma / sqrt(var + eps); z = convolution(x, w * s, (b - mean) * s + beta)
    """
    return sum(_fold(graph, node) for node in list(graph.nodes) if node.target is aten.native_batch_norm.default)


def _fold(graph: fx.Graph, node: fx.Node) -> bool:
    conv, gamma, beta, mean, var, training, _, eps = effects.arguments(node)
    results = _results(node)
    statistics = isinstance(mean, fx.Node) and isinstance(var, fx.Node)
    if training or not statistics or conv.target is not aten.convolution.default or len(conv.users) > 1:
        return False
    weight, bias, transposed, groups = (effects.arguments(conv)[place] for place in (1, 2, 6, 8))
    given = [n.meta["val"] for n in (weight, bias, gamma, beta, mean, var) if isinstance(n, fx.Node)]
    same = all(t.dtype == conv.meta["val"].dtype for t in given)
    if set(results) != {0} or len(results) != len(node.users) or not same or (transposed and groups > 1):
        return False

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        made.meta["val"] = target(*values)
        return made

    with graph.inserting_before(conv), torch.no_grad():
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, var, eps))
        scale = scale if gamma is None else call(aten.mul.Tensor, scale, gamma)
        # What it adds is minus the mean, and the convolution's own bias.
        shift = call(aten.neg.default, mean) if bias is None else call(aten.sub.Tensor, bias, mean)
        shift = call(aten.mul.Tensor, shift, scale)
        shift = shift if beta is None else call(aten.add.Tensor, shift, beta)
        places = [1] * weight.meta["val"].dim()
        places[1 if transposed else 0] = -1
        scaled = call(aten.mul.Tensor, weight, call(aten.view.default, scale, places))
    conv.args = (conv.args[0], scaled, shift, *conv.args[3:])
    results[0].replace_all_uses_with(conv)
    for old in (results[0], node):
        graph.erase_node(old)
    return True


def _takes(node: fx.Node, adapter: Any) -> bool:
    if node.target is not aten.native_batch_norm.default or not effects.arguments(node)[5]:
        return False
    x = effects.arguments(node)[0].meta["val"]
    given = [a.meta["val"] for a in effects.arguments(node)[1:5] if isinstance(a, fx.Node)]
    pays = choice.norm_pays(x)
    node.meta["why"] = (
        (adapter.refuse(x) or "its tensors or readers are of kinds that ours has not") if pays else FASTER
    )
    return bool(
        pays
        and (effects.arguments(node)[3] is None) == (effects.arguments(node)[4] is None)
        and all(t.dtype == x.dtype and t.is_contiguous() for t in given)
        and adapter.refuse(x) is None
    )


def _results(node: fx.Node) -> dict[int, fx.Node]:
    return {effects.arguments(user)[1]: user for user in node.users if user.target is operator.getitem}


def _fuse(graph: fx.Graph, node: fx.Node, adapter: Any) -> bool:
    x, weight, bias, running_mean, running_var, _, momentum, eps = effects.arguments(node)
    results = _results(node)
    if len(results) != len(node.users) or 0 not in results:
        return False
    output = results[0]
    backwards = {user for place in (1, 2) if place in results for user in results[place].users}
    if any(user.target is not aten.native_batch_norm_backward.default for user in backwards):
        return False
    # What was written into the input meanwhile, behind autograd's back, is another.
    if any(effects.arguments(backward)[1:3] != (x, weight) for backward in backwards):
        return False
    fused = _activation_of(output, backwards)
    act: tuple[str, float] = ("none", 0.0) if fused is None else fused[1]
    # What others hold tells the derivative of the last activation.
    is_told = fused is not None and any(user.target is effects.returned for user in fused[0].users)
    value = x.meta["val"]
    with graph.inserting_before(node):
        # The backward pass reads it, which stock's does not: its changes are nobody's error.
        kept = graph.call_function(torch.clone, (bias,)) if isinstance(bias, fx.Node) and backwards else bias
        x = graph.call_function(dense, (x,))
        x.meta.update(val=dense(value), follows=0)
        made = graph.call_function(adapter.forward_train, (x, weight, kept, eps, *act))
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(4)]
        statistics = value.new_empty(value.size(1))
        for part, like in zip(parts, (value, *[statistics] * 3), strict=True):
            part.meta["val"] = like
        if isinstance(kept, fx.Node) and kept is not bias:
            kept.meta["val"] = bias.meta["val"]
        made.meta.update(val=(value, *[statistics] * 3), follows=0)
        if running_mean is not None:
            count = value.numel() // value.size(1)
            arguments = (running_mean, running_var, parts[1], parts[3], momentum, count / max(count - 1, 1))
            update = getattr(adapter, "update_running", reference.update_running)
            graph.call_function(update, arguments).meta["val"] = None
    if fused is not None:
        origins.absorb(made, fused[0])
        fused[0].replace_all_uses_with(parts[0])
    output.replace_all_uses_with(parts[0])
    for backward in backwards:
        saved = (x, weight, kept, parts[1], parts[2])
        _fuse_backward(graph, backward, saved, ("none", 0.0) if is_told else act, adapter)
    for old in (fused[0] if fused is not None else None, *results.values(), node):
        if old is not None:
            graph.erase_node(old)
    return True


def _activation_of(output: fx.Node, backwards: set[fx.Node]) -> tuple[fx.Node, tuple[str, float]] | None:
    """The activation behind a norm, where all that is read of what is before it are its own derivatives."""
    found = [(user, act) for user in output.users if (act := activation(user)) is not None]
    if len(found) != 1:
        return None
    node, act = found[0]
    if any(user.target is effects.returned for user in node.users):
        return (node, act) if len(output.users) == 1 else None
    for user in output.users:
        if user is not node and not (_is_derivative(user, act, output) and set(user.users) <= backwards):
            return None
    # What reads the activation's own derivative must be the norm's backward pass, which takes it over.
    for user in node.users:
        if _is_derivative(user, act, node) and not set(user.users) <= backwards:
            return None
    # And that must read nothing else: it is to be given what the derivative is multiplied by.
    for backward in backwards:
        grad = effects.arguments(backward)[0]
        if not (_is_derivative(grad, act, node) or _is_derivative(grad, act, output)) or len(grad.users) > 1:
            return None
    return (node, act) if len(backwards) <= 1 else None


def _is_derivative(user: fx.Node, act: tuple[str, float], told_by: fx.Node) -> bool:
    found = derivative(user)
    return found is not None and found[:2] == act and found[2] is told_by and effects.arguments(user)[0] is not told_by


def _fuse_backward(
    graph: fx.Graph, node: fx.Node, saved: tuple[Any, ...], act: tuple[str, float], adapter: Any
) -> None:
    grad = effects.arguments(node)[0]
    step = None
    if act[0] != "none":
        step = grad
        grad = effects.arguments(step)[0]
    value = saved[0].meta["val"]
    with graph.inserting_before(node):
        made = graph.call_function(adapter.backward, (grad, *saved, True, *act))
        made.meta.update(val=(value, *[value.new_empty(value.size(1))] * 2), follows=1)
        for place, old in _results(node).items():
            part = graph.call_function(operator.getitem, (made, place))
            part.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(part)
            graph.erase_node(old)
    graph.erase_node(node)
    if step is not None and not step.users:
        graph.erase_node(step)
