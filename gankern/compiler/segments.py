"""The programs that a step's graph is cut into, where what it calls runs as itself; on a GPU a CUDA graph each.

zero_grad()                                   optimizer.zero_grad()
loss = critic(fake).mean() - ...      ->      loss, g1, g2 = program(real, w1, w2)      flat, without autograd
loss.backward()                               w1.grad, w2.grad = g1, g2                 or added to those there are
optimizer.step()                              optimizer.step()
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gankern._capture import record
from gankern._layout import dense, turned
from gankern.arguments import first_line
from gankern.compiler.passes import direct, effects
from gankern.compiler.passes.effects import mark
from gankern.compiler.refusal import Refused
from gankern.compiler.replay import Program, compile_graph


class Segment:
    """The program between two opaque calls.

    Attributes
    ----------
    needs, gives : list of int
        Places of its inputs and outputs among a replay's values.
    dead : list of int
        Places of values that nobody needs after it.
    """

    def __init__(self, run: Program, needs: list[int], gives: list[int], graph: Graph | None) -> None:
        self.run, self.needs, self.gives, self.graph = run, needs, gives, graph
        self.dead: list[int] = []


def separate(graph: fx.Graph) -> tuple[list[int], list[int]]:
    """Let no part of a graph read what another one wrote in place by its other name.

    Returns
    -------
    list of int, list of int
        Places of inputs that it writes, and of those that its first part writes.

    Raises
    ------
    Refused
        Where a part writes what an earlier one has made or has a view of: a CUDA graph has copies of these.
    """
    home, part_of = effects.homes(graph), {}
    part = 0
    for node in graph.nodes:
        part += node.target is mark
        part_of[node] = -1 if node.op == "placeholder" else part
    for node in graph.nodes:
        same = node
        while (changed := effects.changed_and_returned(same)) is not None:
            same = changed
        for user in list(node.users) if same is not node else ():
            if part_of[user] != part_of[node] and user.op != "output":
                user.replace_input_with(node, same)
    written: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for target in effects.written_by(node) if node.target is not mark else ():
            root = home[target]
            if root.op != "placeholder" and part_of[root] != part_of[node]:
                raise Refused("it changes in place what it computed before an update")
            views = (n for n in part_of if home[n] is root and n is not root and part_of[n] < part_of[node])
            if any(part_of[user] == part_of[node] for n in views for user in n.users):
                raise Refused("it changes in place what it has a view of from before an update")
            written.setdefault(root, part_of[node])
    places = [(place, written.get(n)) for place, n in enumerate(graph.find_nodes(op="placeholder"))]
    return [place for place, part in places if part is not None], [place for place, part in places if part == 0]


def cut(
    traced: fx.GraphModule, fixed: Collection[int], returned: Collection[fx.Node], adapter: Any = None
) -> tuple[list[Segment], dict[fx.Node, int]]:
    """The segments of a graph, and the place of each value that enters or leaves one, inputs first.

    `fixed` are places of inputs that lie where they are, `returned` nodes that who calls the step gets; norms are
    an adapter's, where there is one.
    """
    _turn_early(traced.graph)
    *nodes, output = traced.graph.nodes
    place_of = {node: place for place, node in enumerate(n for n in nodes if n.op == "placeholder")}
    body: list[list[fx.Node]] = [[]]
    for node in nodes[len(place_of) :]:
        if node.target is mark:
            body.append([])
        else:
            body[-1].append(node)
    segments = []
    later = [set(output.all_input_nodes)]
    for part in reversed(body[1:]):
        later.insert(0, later[0].union(*(node.all_input_nodes for node in part)))
    owned = {owner_of(node) for node in returned}
    for part, read in zip(body, later, strict=True):
        inside = set(part)
        gives = [node for node in part if node in read]
        needs = list(dict.fromkeys(used for node in part for used in node.all_input_nodes if used not in inside))
        run = _program(traced, needs, part, gives, owned, adapter)
        own = [place_of[node] for node in needs]
        for node in gives:
            place_of[node] = len(place_of)
        computes = any(
            n.op == "call_function" and not effects.views(n) and n.target is not operator.getitem for n in part
        )
        graph = Graph(run, [place in fixed for place in own]) if computes and _is_on_gpu(part, needs) else None
        segments.append(Segment(run, own, [place_of[node] for node in gives], graph))
    return segments, place_of


def _turn_early(graph: fx.Graph) -> None:
    """Turn what is given out in the part that makes it, whose gradients are wanted before the next one."""
    before: dict[fx.Node, fx.Node] = {}
    marks = graph.find_nodes(op="call_function", target=mark)
    following = iter([*marks, None])
    end = next(following)
    for node in list(graph.nodes):
        if node is end:
            end = next(following)
        elif end is not None:
            before[node] = end
        if node.target is turned and any(user.op == "output" for user in node.users):
            source = node.all_input_nodes[0]
            if before.get(source) is not before.get(node):
                before[source].prepend(node)
                before[node] = before[source]


def _program(
    traced: fx.GraphModule,
    needs: Sequence[fx.Node],
    part: Sequence[fx.Node],
    gives: Sequence[fx.Node],
    owned: Collection[fx.Node],
    adapter: Any,
) -> Program:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in needs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in gives])
    graph.lint()
    own = fx.GraphModule(traced, graph)
    given_out = [copy for copy, node in zip(own.graph.nodes, (*needs, *part), strict=False) if node in owned]
    if hasattr(adapter, "takes_conv"):
        direct.bind(own.graph, adapter)
    return compile_graph(own, packed=True, given_out=given_out)


def owner_of(node: fx.Node) -> fx.Node:
    """The node that made the memory of another."""
    while node.op == "call_function":
        source = effects.changed_and_returned(node)
        if source is None:
            first = node.args[0] if node.args else None
            if not isinstance(first, fx.Node):
                break
            call = first if node.target is operator.getitem else node
            if not effects.views(call) and node.target not in (turned, dense):
                break
            source = first
        node = source
    return node


def _is_on_gpu(part: Sequence[fx.Node], needs: Sequence[fx.Node]) -> bool:
    """Whether a part can be a CUDA graph: nothing in it is done by the host."""
    found = [v for n in (*part, *needs) for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, Tensor)]
    devices = {v.device for v in found}
    return len(devices) == 1 and bool(needs) and can_capture(devices.pop())


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs on a device."""
    return device.type == "cuda"


class Graph:
    """A segment as a CUDA graph, of tensors where they lie.

    Parameters
    ----------
    run : callable
        The segment.
    fixed : sequence of bool
        Which of its inputs lie where the graph reads them, as parameters and buffers do; others are copied there.
    """

    # Runs before it is captured, that load kernels and choose algorithms, and how often it is captured in all.
    _WARMUP, _MOST = 2, 4

    def __init__(self, run: Callable[..., Any], fixed: Sequence[bool]) -> None:
        self._run, self._fixed = run, fixed
        self._runs = self._captures = 0
        self._stream: Any = None
        self._graph: Any = None
        self._where: list[int] = []
        self._inputs: list[Tensor | None] = []
        self._outputs: list[Tensor] = []
        self.reason = ""

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """What the segment gives; overwritten by the next call where it is captured."""
        where = [t.data_ptr() for t, fixed in zip(inputs, self._fixed, strict=True) if fixed]
        if self._graph is not None and where != self._where:
            self._graph = None
        if self._graph is None:
            if self.reason or self._captures >= self._MOST:
                return self._run(inputs)
            if self._runs < self._WARMUP:
                self._runs += 1
                return self._aside(inputs)
            self._capture(inputs)
            if self._graph is None:
                return self._run(inputs)
            self._where = where
        for kept, given in zip(self._inputs, inputs, strict=True):
            if kept is not None:
                kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _aside(self, inputs: list[Tensor]) -> list[Tensor]:
        """The segment on the stream that it is captured on, so that its buffers belong there."""
        device = inputs[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        here = torch.cuda.current_stream(device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found: list[Tensor] = self._run([*inputs])
        here.wait_stream(self._stream)
        for t in found:
            if t.is_cuda:
                t.record_stream(here)
        return found

    def _capture(self, inputs: list[Tensor]) -> None:
        self._captures += 1
        given = [t if fixed else t.clone() for t, fixed in zip(inputs, self._fixed, strict=True)]
        try:
            with torch.cuda.device(inputs[0].device):
                self._graph, self._outputs = record(lambda: self._run([*given]), self._stream)
        except Exception as error:
            self._graph, self.reason = None, f"not captured in a CUDA graph: {first_line(error)}"
        self._inputs = [None if fixed else t for t, fixed in zip(given, self._fixed, strict=True)]
