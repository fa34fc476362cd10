"""What nobody reads is not computed.

    dx, dw, _ = convolution_backward(..., [1, 1, 0])            dx, _, _ = convolution_backward(..., [1, 0, 0])
    dw unused                                             ->
    z = detach(y)                                               z is y

Exact: what is left out has no reader and writes nothing; a detach is there for autograd, which a replay has none of.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from gankern.compiler import attention, norms
from gankern.compiler.passes import effects

aten = torch.ops.aten

# Operators whose last argument says which of their results are wanted.
_MASKED = {aten.convolution_backward.default, aten.native_batch_norm_backward.default}
_MASKED |= {op for ops in norms.NORMS for op in ops[1:]}
_MASKED |= {*attention.MASKED}
_MASKED |= {aten.native_layer_norm_backward.default, aten.native_group_norm_backward.default}


def forget_detach(graph: fx.Graph) -> None:
    """Put the tensor itself in the place of its detached alias, except where the graph returns it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0], lambda user: user.op != "output")
            if not node.users:
                graph.erase_node(node)


def drop(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and effects.is_pure(node):
            graph.erase_node(node)


def narrow_masks(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in _MASKED and node.args and isinstance(node.args[-1], list | tuple):
            read = {user.args[1] for user in node.users if user.target is operator.getitem}
            node.args = (*node.args[:-1], [wanted and i in read for i, wanted in enumerate(node.args[-1])])
