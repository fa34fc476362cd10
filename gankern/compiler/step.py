"""Plans of whole training steps.

The step's own code runs once on fake tensors under ``make_fx``; its backward passes are taken inside, and what
optimizers do stays a call. The graph is cut there:

    zero_grad()                                   optimizer.zero_grad()
    loss = critic(fake).mean() - ...      ->      loss, g1, g2 = program(real, w1, w2)      flat, without autograd
    loss.backward()                               w1.grad, w2.grad = g1, g2                 or added to those there are
    optimizer.step()                              optimizer.step()

Exact: optimizers and hooks on them run as themselves, with the state and the learning rate that they have then.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

from gankern import _stock, backends, compiler
from gankern._capture import record
from gankern.arguments import first_line
from gankern.compiler import attention
from gankern.compiler.derive import Functions, bilinear_convolutions, derive, in_place_of, leaf_like
from gankern.compiler.following import OPAQUE, call_step, followed, mark
from gankern.compiler.guards import Held, make_guards
from gankern.compiler.norms import SECOND_ORDER
from gankern.compiler.passes import common, dead, effects, in_place, views, zeros
from gankern.compiler.penalty import random_state, set_random_state
from gankern.compiler.refusal import Refused
from gankern.compiler.replay import compile_graph
from gankern.ops.gradient_penalty.autograd import is_distributed, stock_penalty

aten = torch.ops.aten

_CONSTANTS = (type(None), bool, int, float, str)


_TENSOR: Any = Tensor
_GRADIENTS = (_TENSOR.grad.__get__, _TENSOR._grad.__get__)


class _Number:
    """What ``.item()`` gives, which is known when the plan runs: it can be returned, and nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Functions(Functions):
    """Also takes the backward passes."""

    _REFUSED = (*Functions._REFUSED, "retain_grad")

    def __init__(self, backward: Callable[..., None], tensors: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        super().__init__({}, tensors, leaves)
        self._backward = backward

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is Tensor.item:
            return _Number(args[0].detach().clone())
        if func in _GRADIENTS:
            raise Refused("it reads .grad, which is known when the plan runs")
        # As stock has it, bit by bit.
        if func in attention.SUBSTITUTES:
            return func(*args, **kwargs)
        return super()._call(func, *args, **kwargs)


class _Opaque:
    """A call that runs as itself: of the object that an expression finds."""

    def __init__(self, place: int, name: str, args: Any, kwargs: Any) -> None:
        self.place, self.name, self.args, self.kwargs = place, name, args, kwargs
        self.grad_mode = torch.is_grad_enabled()


class _Derivation:
    """Runs a step for its graph.

    Attributes
    ----------
    effects : list of list
        What comes after each segment of the graph: opaque calls, and of a backward pass the places of tensors with
        those of their gradients among the outputs.
    outputs : list of Tensor
        What the traced function returns.
    returned : tuple
        For each leaf of what the step returns how it is made, and the structure.
    checks : list of int
        Places of outputs that are finite where the plan is right.
    switched : list of tuple
        Place of a tensor, and whether it requires a gradient afterwards.
    """

    def __init__(self, call: dict[str, Any], held: Sequence[Held], opaque: Sequence[Any]) -> None:
        self._call, self._opaque = call, opaque
        self._models = [h.tensor for h in held]
        self._modules = [h.module for h in held if h.module is not None]
        self.effects: list[list[_Opaque | list[tuple[int, int]]]] = [[]]
        self.outputs: list[Tensor] = []
        self.checks: list[int] = []
        self.switched: list[tuple[int, bool]] = []
        self.returned: tuple[list[tuple[Any, ...]], Any] = ([], None)
        self._leaves: list[Tensor] = []

    def trace(self) -> fx.GraphModule:
        for m in self._models:
            if m.requires_grad and not m.is_leaf:
                raise Refused("it is given a tensor that others are to get gradients through")
        return derive(self._run, [], [m.detach() for m in self._models], known=self._models)

    def _run(self, *tensors: Tensor) -> list[Tensor]:
        self._leaves = [leaf_like(t, model) for t, model in zip(tensors, self._models, strict=True)]
        token = compiler.penalty_in_step.set(self._penalty)
        try:
            with ExitStack() as stack:
                functions = _Functions(self._backward, self._models, self._leaves)
                stack.enter_context(in_place_of(self._modules, functions))
                stack.enter_context(self._intercepted())
                stack.enter_context(_stock.forwards())
                result = self._call["critic"](*self._call["args"], **self._call["kwargs"])
        finally:
            compiler.penalty_in_step.reset(token)
        if any(leaf.grad is not None for leaf in self._leaves):
            raise Refused("a backward pass that is not a tensor's backward()")
        self.returned = self._describe(result)
        self.switched = [
            (i, leaf.requires_grad)
            for i, (leaf, model) in enumerate(zip(self._leaves, self._models, strict=True))
            if leaf.requires_grad != model.requires_grad
        ]
        return self.outputs

    @contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Opaque calls of this thread are noted, and marked in the graph."""
        owner = threading.get_ident()

        def stand_in(place: int, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != owner:
                    return own(*args, **kwargs)
                self._note(place, name, args, kwargs)
                return None

            return call

        put: list[Any] = []
        try:
            for place, thing in enumerate(self._opaque):
                for name, kinds in OPAQUE.items():
                    if isinstance(thing, kinds):
                        before = vars(thing).get(name, put)
                        put.append((thing, name, before))
                        vars(thing)[name] = stand_in(place, name, getattr(thing, name))
            yield
        finally:
            for thing, name, before in reversed(put):
                if before is put:
                    del vars(thing)[name]
                else:
                    vars(thing)[name] = before

    def _note(self, place: int, name: str, args: Any, kwargs: Any) -> None:
        if not all(isinstance(a, _CONSTANTS) for a in (*args, *kwargs.values())):
            raise Refused(f"{name} is called with more than constants")
        self.effects[-1].append(_Opaque(place, name, args, kwargs))
        if name != "step":
            # Nothing in the graph reads gradients.
            return
        with torch.no_grad():
            mark(self._leaves[0], len(self.effects))
        self.effects.append([])
        stepped = {id(p) for group in self._opaque[place].param_groups for p in group["params"]}
        # Stock's backward pass raises where it needs values from before.
        torch.autograd.graph.increment_version(
            [leaf for leaf, m in zip(self._leaves, self._models, strict=True) if id(m) in stepped]
        )

    def _output(self, tensor: Tensor) -> int:
        self.outputs.append(tensor)
        return len(self.outputs) - 1

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if create_graph or inputs is not None:
            raise Refused("backward with create_graph or inputs")
        wanted = [i for i, leaf in enumerate(self._leaves) if leaf.requires_grad]
        leaves = [self._leaves[i] for i in wanted]
        if not leaves:
            raise Refused("a backward pass that reaches nothing")
        with bilinear_convolutions():
            found = torch.autograd.grad(loss, leaves, gradient, retain_graph=bool(retain_graph), allow_unused=True)
        self.checks.append(self._output(loss.detach()))
        reached = [(place, grad) for place, grad in zip(wanted, found, strict=True) if grad is not None]
        self.effects[-1].append([(place, self._output(grad)) for place, grad in reached])

    def _penalty(
        self, critic: Any, points: Tensor, inputs: Any, kwargs: Any, options: tuple[float, float, bool, bool]
    ) -> Tensor:
        """The penalty by stock autograd, of which the graph holds both orders."""
        if is_distributed(critic):
            raise Refused("a critic in DistributedDataParallel")

        def scored(*args: Any, **more: Any) -> Tensor:
            with Functions(SECOND_ORDER, self._models, self._leaves), sdpa_kernel(SDPBackend.MATH):
                scores: Tensor = critic(*args, **more)
            self.checks.append(self._output(scores.detach()))
            return scores

        return stock_penalty(scored, points, inputs, kwargs, *options)

    def _describe(self, result: Any) -> tuple[list[tuple[Any, ...]], Any]:
        leaves, spec = pytree.tree_flatten(result)
        made: list[tuple[Any, ...]] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                place = next((i for i, m in enumerate(self._models) if m is leaf), None)
                if place is not None:
                    made.append(("given", place))
                    continue
                if leaf.requires_grad and not self._is_spent(leaf):
                    raise Refused("it returns a tensor that gradients can still go through: detach it")
                made.append(("made", self._output(leaf.detach()), leaf.requires_grad))
            elif type(leaf) in _CONSTANTS:
                made.append(("constant", leaf))
            elif type(leaf) is _Number:
                made.append(("number", self._output(leaf.tensor)))
            else:
                raise Refused(f"it returns a {type(leaf).__name__}")
        return made, spec

    def _is_spent(self, tensor: Tensor) -> bool:
        """Whether a backward pass has let go of what another one through a tensor would need."""
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad]
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        try:
            with disable_proxy_modes_tracing():
                torch.autograd.grad(tensor, wanted, torch.ones_like(tensor), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            return "second time" in str(error)
        return False


class _Spent(torch.autograd.Function):
    """A result whose graph a backward pass has freed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor]) -> Tensor:
        return box[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "Trying to backward through the graph a second time (or directly access saved tensors after they have "
            "already been freed): the step has called backward on it"
        )


class _Segment:
    """The program between two opaque calls: places of its inputs and outputs among a replay's values."""

    def __init__(self, run: Callable[..., Any], needs: list[int], gives: list[int], graph: _Graph | None) -> None:
        self.run, self.needs, self.gives, self.graph = run, needs, gives, graph


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs on a device."""
    return device.type == "cuda"


class _Graph:
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


class NotFinite(Exception):
    """Values that a plan's folded zeros do not hold for."""


class StepPlan:
    """What runs a step, for calls like the one it was made for.

    Parameters
    ----------
    function : callable
        The step.
    args, kwargs
        Of a call.

    Attributes
    ----------
    size : tuple of int
        Operators in the graph before and after the passes.

    Raises
    ------
    Refused
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        call = {"critic": function, "x": None, "args": args, "kwargs": kwargs}
        opaque: dict[str, Any] = {}
        derivatives: list[Any] = []
        self._guards = make_guards(**call, run=call_step, followed=followed(opaque, derivatives))  # type: ignore[arg-type]
        things = list(opaque.values())
        states = {id(s) for t in things if isinstance(t, Optimizer) for s in (t.state, *t.state.values())}
        if any(id(value) in states for value in self._guards.objects):
            raise Refused("it reads the state of an optimizer")
        held = self._guards.take()
        if not held:
            raise Refused("it reads no tensors")
        self._types = list(map(type, things))
        for thing in things:
            _check_opaque(thing)
        sources = "".join(f"{source}, " for source in opaque)
        self._find: Callable[[Any, Any], tuple[Any, ...]] = eval(f"lambda L, G: ({sources})", {"__builtins__": {}})
        self._kind = torch.is_grad_enabled(), backends.requested()
        self._devices = sorted({h.tensor.device.type for h in held})
        self._casts = [d for d in self._devices if torch.is_autocast_enabled(d)]
        derived = _Derivation(call, held, things)
        traced = derived.trace()
        self._switched = derived.switched
        self.device = held[0].tensor.device
        #: Whether derivatives are differentiated, as a penalty's are.
        self.is_second_order = bool(derivatives)
        self._plan(traced, derived, held)
        call.clear()

    def _plan(self, traced: fx.GraphModule, derived: _Derivation, held: Sequence[Held]) -> None:
        graph = traced.graph
        dead.forget_detach(graph)
        nodes = list(graph.nodes)[:-1]
        inputs = [node for node in nodes if node.op == "placeholder"]
        body: list[list[fx.Node]] = [[]]
        for node in nodes[len(inputs) :]:
            if node.target is mark:
                body.append([])
            else:
                body[-1].append(node)
        before, after = sum(len(part) for part in body), 0
        number_of = {node: number for number, part in enumerate(body) for node in part}
        for node in number_of:
            same = node
            while (changed := effects.changed_and_returned(same)) is not None:
                same = changed
            for user in list(node.users) if same is not node else ():
                if number_of.get(user) != number_of[node]:
                    user.replace_input_with(node, same)
        (outputs,) = next(iter(reversed(graph.nodes))).args
        outputs = [n.args[0] if n.target is aten.detach.default else n for n in outputs]
        place_of = {node: i for i, node in enumerate(inputs)}
        fixed = {i for i, h in enumerate(held) if h.module is not None}
        tensors = [h.tensor for h in held]
        # A look at whether values are finite waits for a GPU.
        self._folds = all(t.device.type == "cpu" for t in tensors)
        self._segments: list[_Segment] = []
        written: set[int] = set()
        crossing: set[fx.Node] = set()
        # Before the first update a call can begin anew, by stock.
        for number, part in enumerate(body):
            inside = set(part)
            later = {used for other in body[number + 1 :] for node in other for used in node.all_input_nodes}
            crossing |= later
            later.update(outputs)
            gives = [node for node in part if node in later]
            needs = list(dict.fromkeys(used for node in part for used in node.all_input_nodes if used not in inside))
            run, count, computes, targets = _program(traced, needs, part, gives, fold=self._folds and number == 0)
            after += count
            for node in targets:
                if node.op != "placeholder":
                    raise Refused("it changes in place what it computed before an update")
                if [_owner(other) for other in needs].count(_owner(node)) > 1:
                    raise Refused("it changes in place what it has a view of from before an update")
                written.add(place_of[node])
            for node in gives:
                place_of[node] = len(place_of)
            own = [place_of[n] for n in needs]
            graph_ = _Graph(run, [i in fixed for i in own]) if computes and _is_on_gpu(part, needs) else None
            self._segments.append(_Segment(run, own, [place_of[n] for n in gives], graph_))
        self.size = before, after
        self._count = len(place_of)
        self._writes = sorted(written)
        storages = [t.untyped_storage()._cdata for t in tensors]
        reached = [pair for list_ in derived.effects for effect in list_ if isinstance(effect, list) for pair in effect]
        stepped = written | {place for place, _ in reached}
        if any(storages.count(storages[i]) > 1 for i in stepped):
            raise Refused("it changes a tensor that shares memory with another")
        owners = [_owner(node) for node in outputs]
        self._draws = any(map(effects.draws, nodes))

        def is_fresh(output: int) -> bool:
            # Nobody else's memory, before or after.
            owner = owners[output]
            return owner.op != "placeholder" and owners.count(owner) == 1 and owner not in crossing_owners

        crossing_owners = set(map(_owner, crossing))

        self._effects: list[list[Any]] = [
            [e if isinstance(e, _Opaque) else [(p, place_of[outputs[o]], is_fresh(o)) for p, o in e] for e in effects_]
            for effects_ in derived.effects
        ]
        self._reached = sorted({place for place, _ in reached})
        of_first = {place for segment in self._segments[:1] for place in segment.gives}
        self._checks = [place_of[outputs[c]] for c in derived.checks if place_of[outputs[c]] in of_first]
        made = [
            (kind, place_of[outputs[what]], *rest) if kind in ("made", "number") else (kind, what)
            for kind, what, *rest in derived.returned[0]
        ]
        for kind, what, *_ in derived.returned[0]:
            if kind == "made" and owners[what].op == "placeholder":
                raise Refused("it returns a view of what it was given")
        self._returned = made, derived.returned[1]
        numels = [
            v.numel()
            for part in body
            for n in part
            for v in pytree.tree_leaves(n.meta.get("val"))
            if isinstance(v, Tensor)
        ]
        self.largest = max(numels, default=0)

    def __call__(self, function: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Whether it ran the call, and what the step returns."""
        found = self.world(function, args, kwargs)
        return (False, None) if found is None else (True, self._replay(*found))

    def world(self, function: Any, args: Any, kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]] | None:
        """Tensors, and what has opaque calls, as they are now; None where the plan is not for the call."""
        if self._kind != (torch.is_grad_enabled(), backends.requested()):
            return None
        call = {"critic": function, "x": None, "args": args, "kwargs": kwargs}
        tensors = self._guards.fetch(call)
        if tensors is None:
            return None
        things = self._find(call, self._guards._function.__globals__)
        if list(map(type, things)) != self._types or not all(map(_runs_as_itself, things)):
            return None
        return (tensors, things) if all(tensors[place].is_leaf for place in self._reached) else None

    def _replay(self, tensors: Sequence[Tensor], things: Sequence[Any]) -> Any:
        kept = [(tensors[i], tensors[i].detach().clone()) for i in self._writes]
        device = tensors[0].device
        random = random_state(device) if self._draws else None
        values: list[Any] = [*tensors, *[None] * (self._count - len(tensors))]
        captured = False
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for d in self._casts:
                stack.enter_context(torch.autocast(d, enabled=False))
            for number, segment in enumerate(self._segments):
                if segment.gives or segment.needs:
                    graph = segment.graph
                    found = (segment.run if graph is None else graph)([values[i] for i in segment.needs])
                    captured = captured or (graph is not None and graph.is_captured)
                    for i, value in zip(segment.gives, found, strict=True):
                        values[i] = value
                if number == 0 and self._folds and not all(bool(values[i].sum().isfinite()) for i in self._checks):
                    for t, before in kept:
                        t.data.copy_(before)
                    if random is not None:
                        set_random_state(device, random)
                    raise NotFinite
                for effect in self._effects[number]:
                    if isinstance(effect, _Opaque):
                        with torch.set_grad_enabled(effect.grad_mode):
                            getattr(things[effect.place], effect.name)(*effect.args, **effect.kwargs)
                    else:
                        _accumulate([(tensors[p], values[i], fresh and not captured) for p, i, fresh in effect])
        for place, on in self._switched:
            tensors[place].requires_grad_(on)
        if captured:
            # A replay counts no versions, and overwrites what it gave before.
            torch.autograd.graph.increment_version([tensors[i] for i in self._writes])
            for kind, what, *_ in self._returned[0]:
                if kind == "made":
                    values[what] = values[what].clone()
        return self._result(tensors, values)

    def _result(self, tensors: Sequence[Tensor], values: Sequence[Any]) -> Any:
        leaves, spec = [], self._returned[1]
        for kind, what, *rest in self._returned[0]:
            if kind == "given":
                leaves.append(tensors[what])
            elif kind == "constant":
                leaves.append(what)
            elif kind == "number":
                leaves.append(values[what].item())
            elif rest[0]:
                with torch.enable_grad():
                    leaves.append(_Spent.apply(torch.empty(0, requires_grad=True), [values[what]]))
            else:
                leaves.append(values[what])
        return pytree.tree_unflatten(leaves, spec)


def _program(
    traced: fx.GraphModule, needs: Sequence[fx.Node], part: Sequence[fx.Node], gives: Sequence[fx.Node], fold: bool
) -> tuple[Callable[..., Any], int, bool, list[fx.Node]]:
    """A part of a graph, optimised; how many calls it has, whether one computes, and which inputs it changes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in needs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta.get("val")
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in gives])
    own = fx.GraphModule(traced, graph)
    graph = own.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    changed = effects.written(graph)
    result = [node for node, copy in zip(needs, places, strict=True) if copy in changed]
    written = in_place.forget(graph)
    common.share(graph)
    if fold:
        zeros.fold(graph)
    dead.drop(graph)
    dead.narrow_masks(graph)
    views.relax(graph)
    in_place.put_back(graph, written)
    graph.lint()
    computes = any(
        n.op == "call_function" and not effects.views(n) and n.target != operator.getitem for n in graph.nodes
    )
    return compile_graph(own, packed=True, rooms=False), len(graph.nodes) - len(needs) - 1, computes, result


def _owner(node: fx.Node) -> fx.Node:
    """The node that made the memory of another."""
    while node.op == "call_function":
        source = effects.changed_and_returned(node)
        if source is None:
            first = node.args[0] if node.args else None
            call = node if isinstance(node.target, torch._ops.OpOverload) else first
            if not isinstance(first, fx.Node) or not isinstance(call, fx.Node) or not effects.views(call):
                break
            source = first
        node = source
    return node


def _check_opaque(thing: Any) -> None:
    if isinstance(thing, Optimizer):
        if not type(thing).__module__.startswith(("torch.optim.", "gankern.optim")):
            raise Refused(f"{type(thing).__name__} is an optimizer that neither torch nor gankern has")
        if any(group.get("differentiable") for group in thing.param_groups):
            raise Refused("an optimizer that is differentiable")
    if not _runs_as_itself(thing):
        raise Refused(f"a hook on {type(thing).__name__}, or a method of it that was replaced")


def _runs_as_itself(thing: Any) -> bool:
    """Whether nobody else's code runs in an opaque call."""
    own = vars(thing)
    if isinstance(thing, nn.Module):
        as_torch = "zero_grad" not in own and type(thing).zero_grad is nn.Module.zero_grad
        return as_torch and not isinstance(thing, DistributedDataParallel)
    hooks = own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]
    globals_ = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    step = own.get("step")
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    return not (any(hooks) or any(globals_) or replaced or "zero_grad" in own)


def _accumulate(found: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
    """What autograd does at leaves, with a gradient for each that may be kept if it is fresh."""
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    copies: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor, grad, fresh in found:
        old = tensor.grad
        if old is None:
            if not _lies_as(tensor, grad):
                tensor.grad = _like(tensor, grad)
            elif fresh:
                tensor.grad = grad
            else:
                copies[0].append(tensor)
                copies[1].append(grad)
        elif old.layout is torch.strided:
            sums[0].append(old)
            sums[1].append(grad)
        else:
            tensor.grad = grad + old
    for tensor, copy in zip(copies[0], torch._foreach_mul(copies[1], 1) if copies[0] else (), strict=True):
        tensor.grad = copy
    if sums[0]:
        torch._foreach_add_(*sums)


def _is_on_gpu(part: Sequence[fx.Node], needs: Sequence[fx.Node]) -> bool:
    """Whether a part can be a CUDA graph: nothing in it is done by the host."""
    found = [v for n in (*part, *needs) for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, Tensor)]
    devices = {v.device for v in found}
    return len(devices) == 1 and bool(needs) and can_capture(devices.pop())


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _lies_as(tensor: Tensor, grad: Tensor) -> bool:
    if grad.stride() == tensor.stride():
        return tensor.is_contiguous() or _is_dense(tensor)
    if not _is_dense(tensor):
        return grad.is_contiguous()
    return all(a == b for a, b, n in zip(tensor.stride(), grad.stride(), tensor.shape, strict=True) if n != 1)


def _like(tensor: Tensor, grad: Tensor) -> Tensor:
    if _is_dense(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
    return grad.clone(memory_format=torch.contiguous_format)
