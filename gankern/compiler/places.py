"""Where results of a program's calls lie: in the memory of an argument, in the workspace, or where torch finds place.

    y = elu(x); z = y * 2    ->    y = elu(x, out=x); z = mul(y, 2, out=y)    or    out=room()

Memory that is freshly allocated costs a page fault every 4 KiB when it is written, and a cache line for each. Exact: a
call is told a place of the size and strides that torch chose when the program ran first. The memory of an argument is
taken by operators that go element by element, where the argument lies as the result does and nobody reads it, or what
shares its memory, afterwards; who shared memory in the first run tells, and what came from outside is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from gankern import workspace
from gankern._layout import turned
from gankern.compiler import choice
from gankern.compiler.passes import effects
from gankern.compiler.passes.in_place import is_pointwise
from gankern.compiler.refusal import Refused

aten = torch.ops.aten


class Place(NamedTuple):
    """The form of a call that is told where to write.

    Attributes
    ----------
    op : callable
    name : str
        Of the argument that is the place.
    where : fx.Node, callable or None
        The argument whose memory it is, or what finds room; None before it is known.
    more : mapping
        Arguments of its own.
    keeps : bool
        Whether it takes the keywords of the plain form; else these only say what the place is like.
    """

    op: Any
    name: str
    where: Any = None
    more: Mapping[str, Any] = {}
    keeps: bool = True


def _copy(tensor: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(tensor)


def _turn(tensor: Tensor, strides: tuple[int, ...], *, out: Tensor) -> Tensor:
    return tensor if tensor.stride() == strides else out.copy_(tensor)


def _pad(tensor: Tensor, pad: list[int], value: float = 0, *, out: Tensor) -> Tensor:
    """:func:`torch.nn.functional.pad`, as torch does it."""
    inner = out.fill_(value)
    for back, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        start, length = max(before, 0), tensor.size(-back) + min(before, 0) + min(after, 0)
        inner = inner.narrow(-back, start, length)
        tensor = tensor.narrow(-back, max(-before, 0), length)
    inner.copy_(tensor)
    return out


_OURS = {
    aten.clone.default: Place(_copy, "out", keeps=False),
    aten._to_copy.default: Place(_copy, "out", keeps=False),
    aten.constant_pad_nd.default: Place(_pad, "out"),
    aten.relu.default: Place(aten.clamp_min.out, "out", more={"min": 0}),
    turned: Place(_turn, "out"),
}


@cache
def _into(op: Any) -> Place | None:
    """The form of an operator that is told where to write; None where that would be a copy."""
    if op in _OURS:
        return _OURS[op]
    if not isinstance(op, OpOverload) or len(op._schema.returns) != 1 or op._schema.returns[0].alias_info is not None:
        return None
    given = [(a.name, str(a.type)) for a in op._schema.arguments]
    for overload in op.overloadpacket.overloads():
        form = getattr(op.overloadpacket, overload)
        results = [a.name for a in form._schema.arguments if a.is_out]
        others = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
        if len(results) == 1 and others == given and torch.Tag.generated not in form.tags:
            return Place(form, results[0])
    return None


class Places:
    """What a graph's calls are told, once :meth:`look` has seen all tensors of a run.

    Attributes
    ----------
    wanted : set of fx.Node
        Calls that may be told; a program without any need not be looked at.
    """

    def __init__(self, graph: fx.Graph, given_out: Collection[fx.Node] | None = None) -> None:
        nodes = list(graph.nodes)
        self._position = {node: i for i, node in enumerate(nodes)}
        self._last_use = {node: max((self._position[u] for u in node.users), default=i) for i, node in enumerate(nodes)}
        if given_out is None:
            results = nodes[-1].args[0]
            given_out = [results[0] if isinstance(results, list | tuple) and results else results]
        # Who calls may do with these whatever can be done with a tensor of torch's.
        self.wanted = {node for node in nodes if node not in given_out and _may_be_told(node)}
        self._draws = any(map(effects.draws, nodes))
        #: Whether a run is to be looked at.
        self.looks = bool(self.wanted) or self._draws
        self._room: dict[fx.Node, Callable[[], Tensor] | None] = {}
        self._layout: dict[fx.Node, Any] = {}
        self._shared: dict[fx.Node, set[fx.Node]] = {}
        self._as_derived: dict[str, bool] = {}
        self._of_storage: dict[int, set[fx.Node]] = {}

    def look(self, node: fx.Node, found: Tensor) -> None:
        """Learn where torch has put a result, and whose memory that is."""
        shape, strides = tuple(found.shape), found.stride()
        self._layout[node] = shape, strides, found.dtype
        if self._draws:
            self._follow(node)
        spread = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        if node in self.wanted:
            self._room[node] = workspace.place(shape, strides, found.dtype) if spread == found.numel() else None
        storage = found.untyped_storage()._cdata
        known = self._of_storage.get(storage, set())
        # Of memory that nobody reads any more the address may have been given out again.
        if not any(self._last_use[other] >= self._position[node] for other in known):
            known = self._of_storage[storage] = set()
        known.add(node)
        self._shared[node] = known

    def _follow(self, node: fx.Node) -> None:
        """Refuse random numbers for memory whose order was derived of what torch lays otherwise."""
        self._as_derived[node.name] = not self._differs(node) and all(
            self._as_derived.get(n.name, True) for n in node.all_input_nodes
        )
        if "like" in node.meta and not self._as_derived.get(node.meta["like"], False):
            self._as_derived[node.name] = False
        if effects.draws(node) and not self._as_derived[node.name]:
            raise Refused(f"{node} draws for images whose order in memory is another than was derived")

    def _differs(self, node: fx.Node) -> bool:
        """Whether torch lays a result otherwise than its fake did, of arguments that lie alike."""
        made = node.all_input_nodes[0] if node.target is operator.getitem else node
        if not isinstance(made.target, OpOverload):
            return False
        given = [n for n in made.all_input_nodes if n in self._layout]
        return _order(node, self._layout[node][1]) != _order(node) and all(
            _order(n, self._layout[n][1]) == _order(n) for n in given
        )

    def of(self, node: fx.Node) -> Place | None:
        """What a call is told; None where it is the plain one."""
        room = self._room.get(node)
        if room is None:
            return None
        into = _into(node.target)
        assert into is not None
        where = next((a for a in node.all_input_nodes if self._is_free(a, node)), None) if is_pointwise(node) else None
        return into._replace(where=room if where is None else where)

    def _is_free(self, argument: fx.Node, node: fx.Node) -> bool:
        """Whether a call may write over an argument."""
        if self._layout.get(argument) != self._layout[node]:
            return False
        position = self._position[node]
        return all(n.op == "call_function" and self._last_use[n] <= position for n in self._shared[argument])


def _order(node: fx.Node, strides: tuple[int, ...] | None = None) -> list[int]:
    """Strides of what a node was derived to be, or others of the same, without those that are nobody's."""
    value = node.meta["val"]
    pairs = zip(value.shape, value.stride() if strides is None else strides, strict=True)
    return [stride for size, stride in pairs if size != 1]


def _may_be_told(node: fx.Node) -> bool:
    """Whether the result of a node is large enough for the workspace, and an operator's that is told where to write."""
    value = node.meta.get("val")
    # The workspace is the compiled kernels'.
    if workspace.kernels is None or node.op != "call_function" or not isinstance(value, Tensor):
        return False
    if value.device.type != "cpu" or value.layout is not torch.strided:
        return False
    if not choice.workspace_pays(value.numel() * value.element_size()):
        return False
    return _into(node.target) is not None
