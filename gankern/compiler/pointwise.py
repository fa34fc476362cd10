"""What is left between gankern's kernels, compiled by Inductor where a user asks for it.

    y = conv(x, w)                      y = conv(x, w)
    a = add(y, b)                       (z,) = part(y, b)       one kernel, compiled at its first call
    z = tanh(a)                   ->
    u = conv(z, v)                      u = conv(z, v)

Exact to rounding: Inductor does the arithmetic of neighbours in one go and sums in another order. What draws random
numbers or writes into a tensor is in no part, nor is what is written into: masks are stock's, and buffers are written
when stock writes them. Neighbours only are taken together, so that nothing moves past a write. Each part runs both ways
the first time, and torch's stays where Inductor's leaves other values, strides or shared memory.
"""

from __future__ import annotations

import logging
import operator
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gankern._layout import turned
from gankern.arguments import first_line
from gankern.compiler import origins
from gankern.compiler.passes import effects
from gankern.compiler.replay import compile_graph

aten = torch.ops.aten
log = logging.getLogger("gankern.compiler")

# They have kernels of their own, which Inductor only calls.
_KERNELS = {
    *("convolution", "convolution_backward", "_convolution_double_backward", "mm", "bmm", "addmm", "baddbmm", "addbmm"),
    *("mv", "addmv", "dot", "vdot", "addr", "grid_sampler_2d", "grid_sampler_2d_backward"),
}
# Inductor is faster for what takes two calls or more.
_FEWEST = 2
_lock = threading.RLock()


def pointwise_of(module: Any) -> str:
    """What a module was fused with, of `gankern.compiler.POINTWISE`."""
    return getattr(type(module), "_gankern_pointwise", "torch")


class Part:
    """Neighbouring nodes of a graph as one function of tensors: torch's, by Inductor from its first call on.

    Attributes
    ----------
    reason : str or None
        Why torch's own operators run it; None where Inductor's code does, or will.
    """

    # FX names nodes by it.
    __name__ = "part"

    def __init__(self, module: fx.GraphModule) -> None:
        self._module: fx.GraphModule | None = module
        self._plain: Callable[..., tuple[Tensor, ...]] = compile_graph(module, rooms=False)
        self._compiled: Callable[..., Sequence[Tensor]] | None = None
        self._strides: list[tuple[int, ...]] = []
        self.reason: str | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self._module is not None:
            return self._first(inputs)
        # Its code is for these strides.
        if self._compiled is None or [t.stride() for t in inputs] != self._strides:
            return self._plain(*inputs)
        return self._compiled(*inputs)

    def _first(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        want = self._plain(*inputs)
        if inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return want
        with _lock:
            module = self._module
            if module is None:
                return want
            try:
                compiled = _compile(module, inputs)
                self.reason = _difference(compiled(*inputs), want, inputs)
            except Exception as error:
                self.reason = f"compiling failed with {first_line(error)}"
            if self.reason is None:
                self._compiled, self._strides = compiled, [t.stride() for t in inputs]
            else:
                log.warning("torch's operators run between the kernels: %s", self.reason)
            self._module = None
        return want


def _compile(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx

    begin = time.perf_counter()
    random = torch.get_rng_state()
    try:
        with torch.no_grad(), torch._inductor.config.patch({"triton.cudagraphs": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled: Any = compile_fx(module, [t.detach() for t in inputs])
    finally:
        torch.set_rng_state(random)
    log.info("Inductor compiled %d nodes in %.1f s", len(module.graph.nodes), time.perf_counter() - begin)
    return compiled


def _difference(got: Sequence[Tensor], want: Sequence[Tensor], inputs: Sequence[Tensor]) -> str | None:
    """How Inductor's results differ from torch's by more than rounding."""
    from gankern.compiler.strict import differences, tolerance_of

    for ours, theirs in zip(got, want, strict=True):
        if (ours.dtype, ours.shape, _strides(ours)) != (theirs.dtype, theirs.shape, _strides(theirs)):
            return "Inductor's results lie in memory otherwise than torch's"
    if not _shared(got, inputs) <= _shared(want, inputs):
        return "Inductor's results share memory that torch's do not"
    named = [dict(zip(map(str, range(len(want))), results, strict=True)) for results in (got, want)]
    if differences(named[0], named[1], tolerance_of([*inputs, *want])):
        return "Inductor's results are others than torch's"
    return None


def _strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _shared(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> set[tuple[int, int]]:
    """Pairs of tensors in one memory."""
    memory = [t.untyped_storage()._cdata for t in (*results, *inputs)]
    return {(i, j) for i in range(len(results)) for j in range(i) if memory[i] == memory[j]} | {
        (i, j) for i in range(len(results)) for j in range(len(results), len(memory)) if memory[i] == memory[j]
    }


def group(graph: fx.Graph) -> list[Part]:
    """Put parts in the place of neighbouring nodes that Inductor may compile, in place."""
    fits = _Fits(effects.written(graph))
    for node in list(graph.nodes):
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and fits(node):
            node.args[0].append(node)
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if fits(node):
            runs[-1].append(node)
        elif runs[-1] and not (node.op == "get_attr" or node.target is operator.getitem):
            runs.append([])
    return [part for run in runs if (part := _join(graph, run)) is not None]


class _Fits:
    """Whether a node may be of a part."""

    def __init__(self, changed: set[fx.Node]) -> None:
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.lowering import fallbacks, lowerings

        self._changed, self._decompositions = changed, select_decomp_table()
        self._lowerings, self._fallbacks = lowerings, fallbacks

    def __call__(self, node: fx.Node) -> bool:
        target: Any = node.target
        if node.op != "call_function":
            return False
        if target is operator.getitem:
            # Of a node that has several results.
            return isinstance(node.args[0], fx.Node) and self(node.args[0])
        if target is turned:
            return _order(node) is not None and self._are_plain(node)
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
            return False
        if target._schema.name.partition("::")[2] in _KERNELS or not effects.is_pure(node):
            return False
        known = target in self._decompositions or (target in self._lowerings and target not in self._fallbacks)
        return known and self._are_plain(node)

    def _are_plain(self, node: fx.Node) -> bool:
        return node not in self._changed and all(_is_plain(n.meta.get("val")) for n in (node, *node.all_input_nodes))


def _is_plain(value: Any) -> bool:
    values = pytree.tree_leaves(value)
    return bool(values) and all(
        isinstance(v, Tensor) and v.layout == torch.strided and not v.is_complex() and not v.is_quantized
        for v in values
        if v is not None
    )


def _names(node: fx.Node) -> bool:
    """Whether a node gives a tensor that is there another name."""
    if node.target is operator.getitem:
        return True
    cast = node.target is aten._to_copy.default and node.meta["val"].dtype != node.all_input_nodes[0].meta["val"].dtype
    return effects.views(node) and not cast


def _order(node: fx.Node) -> torch.memory_format | None:
    """The order of memory that images are turned to; None where it has no name."""
    value: Tensor = node.meta["val"]
    orders = [torch.contiguous_format] + [torch.channels_last] * (value.dim() == 4)
    meta = torch.empty(value.shape, device="meta")
    return next((o for o in orders if meta.contiguous(memory_format=o).stride() == node.args[1]), None)


def _join(graph: fx.Graph, run: list[fx.Node]) -> Part | None:
    """One node for those of a run that compute something, with views of their results in between."""
    inside: dict[fx.Node, None] = {}
    for node in run:
        # A view of what comes from outside is no result: two names for one memory would be apart.
        if not _names(node) or node.all_input_nodes[0] in inside:
            inside[node] = None
    while inside and _names(last := next(reversed(inside))):
        del inside[last]
    if sum(not _names(node) and node.target is not turned for node in inside) < _FEWEST:
        return None
    inputs = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in inside)
    results = [n for n in inside if any(user not in inside for user in n.users)]
    if not inputs or not results or any(not isinstance(n.meta["val"], Tensor) for n in (*inputs, *results)):
        return None
    inner = fx.Graph()
    copies = {node: inner.placeholder(node.name) for node in inputs}
    for node in inside:
        copies[node] = inner.node_copy(node, copies.__getitem__)
        if node.target is turned:
            copies[node].target, copies[node].args = aten.clone.default, copies[node].args[:1]
            copies[node].kwargs = {"memory_format": _order(node)}
    inner.output(tuple(copies[n] for n in results))
    part = Part(fx.GraphModule({}, inner))
    with graph.inserting_after(next(reversed(inside))):
        call = graph.call_function(part, tuple(inputs))
    call.meta["val"] = tuple(n.meta["val"] for n in results)
    after = call
    for i, node in enumerate(results):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, i))
        after.meta.update(node.meta)
        node.replace_all_uses_with(after, lambda user: user not in inside)
    for node in inside:
        origins.absorb(call, node)
    for node in reversed(inside):
        graph.erase_node(node)
    return part
