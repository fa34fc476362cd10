"""Plans of a module's forward pass and of its first derivatives.

The graph of both is derived at once, by running the module and autograd under ``make_fx``, optimised, and cut where the
gradient of the output comes in. A derivative of the second order is stock autograd's own, of a forward that runs again.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gankern import _library, _stock, backends, dispatch
from gankern._layout import turned
from gankern.arguments import first_line
from gankern.compiler import origins
from gankern.compiler.derive import Functions, coarsest, derive, in_place_of, leaf_like
from gankern.compiler.guards import Held, make_guards, modules_of
from gankern.compiler.norms import FIRST_ORDER
from gankern.compiler.passes import dead, effects, in_place, optimise_first_order
from gankern.compiler.passes.effects import returned
from gankern.compiler.penalty import random_state, set_random_state
from gankern.compiler.pointwise import Part, group
from gankern.compiler.refusal import Refused
from gankern.compiler.replay import compile_graph

aten = torch.ops.aten
log = logging.getLogger("gankern.compiler")

#: Tensors with copies of their values, a device, and the states of its random numbers.
State = tuple[list[tuple[Tensor, Tensor]], torch.device, list[Tensor]]

#: Stands for the gradient of the output where a graph is derived.
_tangent = _library.define("tangent(Tensor output) -> Tensor", torch.empty_like, torch.empty_like)


class ForwardPlan:
    """What computes a module's output, and its gradients, for calls like the one it was made for.

    Parameters
    ----------
    call : dict
        The module, its first argument, the others and its keywords, as ``critic``, ``x``, ``args`` and ``kwargs``.
    strides : tuple of int or None
        Of the output that stock gave; None where nobody knows.
    guards : object, optional
        Has the tensors that the module reads besides its first argument, as `Guards` has; made where it is left out.
    pointwise : {"torch", "inductor"}
        What runs between the kernels.

    Attributes
    ----------
    parts : list of Part
        What Inductor compiles.
    sources : list of str
        Expressions for these tensors.
    given_up : str
        Why stock runs from then on: a first replay failed or was not stock's, or somebody differentiated its gradient.
    compared : str
        How the first call, and the first backward pass, compared with stock's, in strict mode.

    Raises
    ------
    Refused
    """

    given_up = compared = ""
    PROGRAMS = ("_forward", "_backward")

    def __init__(
        self, call: dict[str, Any], strides: tuple[int, ...] | None, guards: Any = None, pointwise: str = "torch"
    ) -> None:
        self._guards = make_guards(**call) if guards is None else guards
        held = self._guards.take()
        self.sources = [h.source for h in held]
        self._places = [_place_of(h) for h in held]
        x = call["x"]
        inputs = [x, *(h.tensor for h in held)]
        self._kind = torch.is_grad_enabled(), backends.requested(), dispatch.goes_by_size(x.device)
        #: The device whose autocast was on.
        self.casts = x.device.type if torch.is_autocast_enabled(x.device.type) else None
        #: Places of the inputs that get a gradient.
        self.wanted = [i for i, t in enumerate(inputs) if self._kind[0] and t.requires_grad]
        graph = derive(
            self._step(call, held),
            [x.detach()],
            [t.detach() for t in inputs[1:]],
            modules_of(call["critic"], held),
        )
        self.coarsest = coarsest(graph.graph)
        changed = effects.written(graph.graph)
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._writes = [i for i, node in enumerate(places) if node in changed]
        for i in self._writes:
            # Buffers of a graph that Dynamo captured are among its arguments.
            foreign = guards is None and (i == 0 or held[i - 1].module is None)
            if foreign or inputs[i].requires_grad:
                raise Refused("it changes its input, or a parameter")
        storages = [t.untyped_storage()._cdata for t in inputs]
        if any(storages.count(storages[i]) > 1 for i in self._writes):
            raise Refused("it changes a tensor that shares memory with another")
        #: Those of them whose values from before a forward that runs again needs.
        self.feeds_back = [i for i in self._writes if _feeds_back(places[i])]
        self._draws = any(map(effects.draws, graph.graph.nodes))
        _read_returned(graph.graph)
        self.kernels = optimise_first_order(
            graph,
            backends.select("critic_layers", x),
            backends.select("batch_norm_act", x),
            any(node.target is _tangent for node in graph.graph.nodes),
        )
        strides = _check_output(graph.graph, strides)
        self.parts: list[Part] = []
        self._forward, self._backward, self.reads_output = _cut(graph, self.parts if pointwise == "inductor" else None)
        self._strides = strides
        self._proven = self.is_backward_proven = False

    def _step(self, call: dict[str, Any], held: Sequence[Held]) -> Callable[..., list[Tensor | None]]:
        module, args, kwargs = call["critic"], call["args"], call["kwargs"]
        requires_grad = call["x"].requires_grad
        models = [h.tensor for h in held]
        modules = [h.module for h in held if h.module is not None]

        def step(points: Tensor, *tensors: Tensor) -> list[Tensor | None]:
            leaves = [leaf_like(t, model) for t, model in zip(tensors, models, strict=True)]
            with torch.set_grad_enabled(self._kind[0]):
                points = points.detach().requires_grad_(requires_grad)
                with in_place_of(modules, Functions(FIRST_ORDER, models, leaves)), _stock.forwards():
                    output = module(points, *args, **kwargs)
                if not isinstance(output, Tensor):
                    raise Refused(f"its output is a {type(output).__name__}")
                wanted = [(points, *leaves)[i] for i in self.wanted]
                result = output.detach()
                if not (wanted and output.requires_grad):
                    return [result]
                tangent = _tangent(result)
                return [result, *torch.autograd.grad(output, wanted, tangent, allow_unused=True)]

        return step

    def __call__(self, call: dict[str, Any]) -> Tensor | None:
        """The output, which autograd follows where the stock one would be; None where the plan is not for this call."""
        kind = torch.is_grad_enabled(), backends.requested(), dispatch.goes_by_size(call["x"].device)
        if self.given_up or kind != self._kind:
            return None
        tensors = self._guards.fetch(call)
        if tensors is None:
            return None
        inputs = (call["x"], *tensors)
        with torch._C.DisableTorchFunction():
            if self._backward is None:
                return self.run_forward(inputs)[0]
            output: Tensor = _Planned.apply(self, call, *inputs)
            return output

    def tensors(self, call: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """What the module reads besides its first argument, as it is now; None where the plan is not for this call."""
        tensors: tuple[Tensor, ...] | None = self._guards.fetch(call)
        return tensors

    def run_forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The output, and what the backward pass needs."""
        found = self._replay(inputs)
        found[0] = turned(found[0], self._strides)
        return found

    def _replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with self._plain():
            if self._proven:
                found: list[Tensor] = self._forward([*inputs])
                return found
            kept = self.state(inputs, self._writes)
            try:
                found = self._forward([*inputs])
            except Exception as error:
                _restore(kept)
                self.given_up = f"its replay failed with {first_line(error)}"
                raise Refused(self.given_up) from None
            self._proven = True
            return found

    def run_backward(self, given: list[Tensor]) -> list[Tensor | None]:
        """Gradients, of the output's and what was saved; the list is emptied, so that each is let go after its use."""
        with self._plain():
            assert self._backward is not None
            given[0] = turned(given[0], self._strides)
            found: list[Tensor | None] = self._backward(given)
            return found

    def _plain(self) -> Any:
        # Casts of autocast are in the graph already.
        return nullcontext() if self.casts is None else torch.autocast(self.casts, enabled=False)

    def state(self, inputs: Sequence[Tensor], places: Sequence[int]) -> State:
        """Inputs at places, and random numbers to come where it draws any, as they are now."""
        kept = [(inputs[i], inputs[i].detach().clone()) for i in places]
        return kept, inputs[0].device, random_state(inputs[0].device) if self._draws else []

    @contextmanager
    def put_back(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Modules hold the parameters and buffers of then, which ``torch.func.functional_call`` takes out again."""
        now = []
        try:
            for place, tensor in zip(self._places, inputs[1:], strict=True):
                owner = None if place is None else place[0]()
                if place is not None and owner is not None:
                    table = vars(owner)[place[1]]
                    now.append((table, place[2], table.get(place[2])))
                    table[place[2]] = tensor
            yield
        finally:
            for table, name, tensor in reversed(now):
                table[name] = tensor

    @contextmanager
    def again(self, inputs: Sequence[Tensor], before: Any) -> Iterator[None]:
        """The state before a forward, inside; outside nothing has happened."""
        now = self.state(inputs, self._writes)
        _restore(before)
        try:
            yield
        finally:
            _restore(now)


def _place_of(held: Held) -> tuple[weakref.ref[Any], str, str] | None:
    """The module that has a tensor, and where."""
    if held.module is None:
        return None
    for table in ("_parameters", "_buffers"):
        for name, tensor in vars(held.module)[table].items():
            if tensor is held.tensor:
                return weakref.ref(held.module), table, name
    raise Refused(f"{held.source} is not where it was found")


def _feeds_back(node: fx.Node) -> bool:
    """Whether what is computed depends on what a forward finds in a tensor that it writes."""
    for user in node.users:
        statistics = user.target is aten.native_batch_norm.default and user.args[5] and node not in user.args[:3]
        if not statistics and not (effects.written_by(user) == [node] and not user.users and node not in user.args[1:]):
            return True
    return False


def _restore(state: State) -> None:
    kept, device, random = state
    for tensor, before in kept:
        # Autograd is not told: a graph that holds it saw the value that comes back.
        tensor.data.copy_(before)
    if random:
        set_random_state(device, random)


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ForwardPlan, call: dict[str, Any], *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.before = plan.state(inputs, plan.feeds_back)
        output, *saved = plan.run_forward(inputs)
        ctx.plan, ctx.call, ctx.inputs, ctx.version = plan, call, inputs, call["x"]._version
        ctx.save_for_backward(*saved, *([output] if plan.reads_output else []))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: ForwardPlan = ctx.plan
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(found)
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        if torch.is_grad_enabled():
            grads = _second_order(plan, ctx, grad)
        else:
            given = [grad, *ctx.saved_tensors]
            if not keeps:
                ctx.maybe_clear_saved_tensors()
            grads = plan.run_backward(given) if plan.is_backward_proven else _first_backward(plan, ctx, given)
        if not keeps:
            # A loss that somebody keeps holds no images.
            ctx.call = ctx.inputs = None
        for place, value in zip(plan.wanted, grads, strict=True):
            found[2 + place] = value
        return tuple(found)


def _first_backward(plan: ForwardPlan, ctx: Any, given: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradients by the plan; by stock, and the plan is given up, where its first backward pass fails."""
    grad = given[0]
    # Stock's run of the forward, in strict mode.
    beside = getattr(ctx, "beside", None)
    try:
        run = functools.partial(plan.run_backward, given)
        grads: Sequence[Tensor | None] = run() if beside is None else beside.gradients(grad, run)
    except Exception as error:
        reason = f"its backward pass failed with {first_line(error)}"
        log.warning("no plan: %s; stock runs", reason)
        return [None if g is None else g.detach() for g in _second_order(plan, ctx, grad, reason)]
    plan.is_backward_proven = True
    return grads


def _second_order(
    plan: ForwardPlan, ctx: Any, grad: Tensor, reason: str = "somebody differentiated its gradient"
) -> Sequence[Tensor | None]:
    """Gradients that can be differentiated, of stock's own forward run again; the plan is given up."""
    if ctx.inputs is None:
        raise RuntimeError("Trying to backward through the graph a second time, which a backward has freed")
    plan.given_up = reason
    by_output = plan.reads_output and torch.is_grad_enabled()
    call, inputs = ctx.call, ctx.inputs
    if call["x"]._version != ctx.version:
        raise RuntimeError(
            "the input of a fused module was changed in place between its forward and a backward with "
            "create_graph=True, which runs the forward again: call gankern.unfuse on it"
        )
    with plan.again(inputs, ctx.before), _stock.forwards(), torch.enable_grad():
        with plan.put_back(inputs):
            if plan._guards.fetch(call) is None:
                raise RuntimeError(
                    "a fused module has changed between its forward and a backward with create_graph=True, which runs "
                    "the forward again: call gankern.unfuse on it"
                )
        # Each input by itself: one may have been computed from another. A view of it all would not keep the strides of
        # dims of one element, by which torch's convolutions choose what they call.
        places = [torch.ops.aten.alias.default(t) if i in plan.wanted else t for i, t in enumerate(inputs)]
        known = {id(t): place for t, place in zip(inputs, places, strict=True)}
        x, args, kwargs = pytree.tree_map(lambda t: known.get(id(t), t), (call["x"], call["args"], call["kwargs"]))
        with plan.put_back(places):
            output = call["critic"](x, *args, **kwargs)
        wanted = [places[i] for i in plan.wanted]
        if not by_output:
            return torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True)
        # Its derivatives go by the output, as stock's do, which others hold and watch.
        own = torch.ops.aten.alias.default(grad)
        grads = torch.autograd.grad(output, wanted, own, create_graph=True, allow_unused=True)
    return _ByOutput.apply((output, own, wanted, grads), grad, ctx.saved_tensors[-1], *(inputs[i] for i in plan.wanted))


class _ByOutput(torch.autograd.Function):
    """Gradients of a forward that ran again; what their derivatives say of its output is said of the one before."""

    @staticmethod
    def forward(ctx: Any, again: Any, grad: Tensor, output: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.again = again
        return tuple(None if g is None else g.detach() for g in again[-1])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        output, grad, inputs, grads = ctx.again
        places = [grad, *inputs]
        pairs = [(g, gg) for g, gg in zip(grads, grad_grads, strict=True) if gg is not None and g.requires_grad]
        if not pairs:
            return (None,) * (3 + len(inputs))
        found: list[Tensor] = []

        def take(share: Tensor) -> Tensor:
            found.append(share)
            return torch.zeros_like(share)

        hook = output.register_hook(take)
        try:
            gradients = iter(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    [t for t in places if t.requires_grad],
                    [gg for _, gg in pairs],
                    # What came of this one's own gradients, in the same pass, leads into that graph as well.
                    retain_graph=True,
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
            )
        finally:
            hook.remove()
        first, *others = [next(gradients) if t.requires_grad else None for t in places]
        return None, first, found[0] if found else None, *others


def _read_returned(graph: fx.Graph) -> None:
    """Let the backward pass read the output that others hold, and may write to, where stock's reads that memory."""
    dead.forget_detach(graph)
    nodes = list(graph.nodes)
    marker = next((node for node in nodes if node.target is _tangent), None)
    if marker is None:
        return
    first, later = nodes[: nodes.index(marker)], {*nodes[nodes.index(marker) + 1 : -1]}
    output: Any = _undetached(nodes[-1].args[0][0])
    base = output
    while _shares(base):
        base = base.args[0]
    names = [base]
    for node in first:
        if _shares(node) and node.args[0] in names:
            names.append(node)
    kept, found = output.meta["val"], None
    for node in names:
        if later.isdisjoint(node.users):
            continue
        value = node.meta["val"]
        if found is None:
            with graph.inserting_before(marker):
                found = graph.call_function(returned, (output,))
            found.meta["val"] = kept
            origins.absorb(found, output)
        same = found
        if (value.shape, value.stride()) != (kept.shape, kept.stride()):
            if not (value.is_contiguous() and kept.is_contiguous() and value.numel() == kept.numel()):
                raise Refused("its backward pass reads memory that its output is a part of")
            with graph.inserting_after(marker):
                same = graph.call_function(aten.view.default, (found, list(value.shape)))
            same.meta["val"] = value
        node.replace_all_uses_with(same, later.__contains__)


def _shares(node: fx.Node) -> bool:
    """Whether what a node returns has its first argument's memory."""
    return effects.views(node) or node.args[:1] == tuple(effects.written_by(node))[:1] != ()


def _undetached(node: fx.Node) -> fx.Node:
    found: Any = node.args[0] if node.target is aten.detach.default else node
    return found


def _check_output(graph: fx.Graph, strides: tuple[int, ...] | None) -> tuple[int, ...]:
    """The strides of the output; refuse one that shares memory with an input, or that lies otherwise than stock's.

    The output is a tensor of its own, which others may change in place: what is saved tells by its version.
    """
    nodes = list(graph.nodes)
    output = node = nodes[-1].args[0][0]
    found: tuple[int, ...] = node.meta["val"].stride()
    shape = node.meta["val"].shape
    if strides is not None and _apart(shape, found) != _apart(shape, strides):
        raise Refused("its output lies in memory otherwise than stock's")
    while _shares(node):
        node = node.args[0]
    if node.op == "placeholder":
        raise Refused("its output is a view of what it was given")
    detached, output = output, _undetached(output)
    marker = next((i for i, node in enumerate(nodes) if node.target is _tangent), len(nodes))
    if effects.views(output) or any(output in node.all_input_nodes for node in nodes[marker + 1 : -1]):
        with graph.inserting_after(output):
            copy = graph.call_function(torch.clone, (output,))
        copy.meta["val"] = output.meta["val"]
        origins.absorb(copy, output)
        output = copy
    nodes[-1].args = ([output, *nodes[-1].args[0][1:]],)
    if detached.target is aten.detach.default:
        detached.replace_all_uses_with(output)
        graph.erase_node(detached)
    return found if strides is None else strides


def _apart(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides that tell elements apart: what those of a single one say is nobody's."""
    return [stride for size, stride in zip(shape, strides, strict=True) if size != 1]


def _cut(
    traced: fx.GraphModule, parts: list[Part] | None
) -> tuple[Callable[..., Any], Callable[..., Any] | None, bool]:
    """The two programs of a graph: what comes before the gradient of the output, and what comes after it.

    And whether the second reads the output, which is then its last argument. What Inductor is to compile of them goes
    into a list of parts, where there is one.
    """
    nodes = list(traced.graph.nodes)
    (results,) = nodes.pop().args
    marker = next((node for node in nodes if node.target is _tangent), None)
    split = len(nodes) if marker is None else nodes.index(marker)
    output, grads = results[0], results[1:]
    first, later = [node for node in nodes[:split] if node.target is not returned], nodes[split + 1 :]
    kept = [node for node in nodes if node.target is returned]
    read = {used for node in later for used in node.all_input_nodes} | {g for g in grads if isinstance(g, fx.Node)}
    saved = [node for node in first if node in read]
    if any(not isinstance(node.meta.get("val"), Tensor) for node in saved):
        raise Refused("its backward pass reads what is no tensor")

    def program(inputs: Sequence[fx.Node], body: Sequence[fx.Node], outputs: Sequence[Any]) -> Callable[..., Any]:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node, copy in copies.items():
            copy.meta.update(node.meta)
        for node in body:
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[o] if isinstance(o, fx.Node) else o for o in outputs])
        if parts is not None:
            written = in_place.forget(graph)
            parts.extend(group(graph))
            in_place.put_back(graph, written)
        return compile_graph(fx.GraphModule(traced, graph), packed=True)

    forward = program([n for n in first if n.op == "placeholder"], first, [output, *saved])
    if marker is None:
        return forward, None, False
    return forward, program([marker, *saved, *kept], later, grads), bool(kept)
