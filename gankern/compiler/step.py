"""Plans of whole training steps.

The step's own code runs once on fake tensors under ``make_fx``; its backward passes are taken inside, and what
optimizers do stays a call. The graph is optimised whole, and cut into programs at these calls. Exact: optimizers update
as they would by themselves, with the state and the learning rate that they have then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

from gankern import backends
from gankern.arguments import first_line
from gankern.compiler.following import call_step, followed
from gankern.compiler.guards import Held, make_guards
from gankern.compiler.norms import FIRST_ORDER, SECOND_ORDER
from gankern.compiler.passes import dead, effects, optimise_step
from gankern.compiler.penalty import random_state, set_random_state
from gankern.compiler.refusal import Refused
from gankern.compiler.segments import cut, owner_of, separate
from gankern.compiler.step_graph import Derivation, Opaque
from gankern.compiler.updates import accumulate, call_opaque, check_opaque, is_slow, runs_as_itself

aten = torch.ops.aten

#: Why a plan that is right for other values does not run.
NOT_FINITE = "values that are not finite"


class StepPlan:
    """What runs a step, for calls like the one it was made for.

    Parameters
    ----------
    call : dict
        The step and its arguments, as ``critic``, ``args`` and ``kwargs``.

    Attributes
    ----------
    size : tuple of int
        Operators in the graph before and after the passes.
    faster : int
        Kernels in it, derivatives that are differentiated, as a penalty's are, and updates by one call.
    largest : int
        Elements of the largest tensor in it.
    given_up : str
        Why it never runs again.
    compared : str
        How the first call compared with the step's own.

    Raises
    ------
    Refused
    """

    given_up = compared = ""
    PROGRAMS: tuple[str, ...] = ()

    def __init__(self, call: dict[str, Any]) -> None:
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
            check_opaque(thing)
        sources = "".join(f"{source}, " for source in opaque)
        self._find: Callable[[Any, Any], tuple[Any, ...]] = eval(f"lambda L, G: ({sources})", {"__builtins__": {}})
        self._kind = torch.is_grad_enabled(), backends.requested()
        devices = sorted({h.tensor.device.type for h in held})
        self._casts = [d for d in devices if torch.is_autocast_enabled(d)]
        self.device = held[0].tensor.device
        self._derivatives = len(derivatives)
        self.faster = self._derivatives + sum(map(is_slow, things))
        # Of a penalty that it takes by itself nobody knows which forwards are differentiated twice.
        substitutes = SECOND_ORDER if torch.autograd.grad in derivatives else FIRST_ORDER
        derived = Derivation(call, held, things, substitutes)
        traced = derived.trace()
        self._switched = derived.switched
        # A look at whether values are finite waits for a GPU; and before the first update a call can begin anew.
        self._folds = devices == ["cpu"]
        self._plan(traced, derived, held)

    def _plan(self, traced: fx.GraphModule, derived: Derivation, held: Sequence[Held]) -> None:
        graph = traced.graph
        dead.forget_detach(graph)
        output = next(iter(reversed(graph.nodes)))
        output.args = ([n.args[0] if n.target is aten.detach.default else n for n in effects.arguments(output)[0]],)
        before = len(graph.nodes)
        self._draws = any(map(effects.draws, graph.nodes))
        self._writes, first = separate(graph)
        tensors = [h.tensor for h in held]
        storages = [t.untyped_storage()._cdata for t in tensors]
        reached = [pair for list_ in derived.effects for effect in list_ if isinstance(effect, list) for pair in effect]
        self._reached = sorted({place for place, _ in reached})
        if any(storages.count(storages[i]) > 1 for i in {*self._writes, *self._reached}):
            raise Refused("it changes a tensor that shares memory with another")
        self._written_first = first if self._folds else []
        like = next((t for t in tensors if t.is_floating_point()), tensors[0])
        ops = ("critic_layers", "batch_norm_act") if self._folds else ()
        adapters = [backends.select(op, like) for op in ops]
        self.faster += optimise_step(traced, *adapters, folds=self._folds, second_order=bool(self._derivatives))
        self.size = before, len(graph.nodes)
        outputs = effects.arguments(output)[0]
        owners = list(map(owner_of, outputs))
        returned, self._structure = derived.returned
        made = [what for kind, what, *_ in returned if kind == "made"]
        if any(owners[what].op == "placeholder" for what in made):
            raise Refused("it returns a view of what it was given")
        fixed = {i for i, h in enumerate(held) if h.module is not None}
        self._segments, place_of = cut(traced, fixed, [outputs[what] for what in made], *adapters[:1])
        self.PROGRAMS = tuple(f"program_{number}" for number in range(len(self._segments)))
        vars(self).update(zip(self.PROGRAMS, (segment.run for segment in self._segments), strict=True))
        self._count = len(place_of)
        needed = {place for segment in self._segments for place in segment.needs}
        crossing = {owner_of(node) for node, place in place_of.items() if place in needed}
        places = [place_of[node] for node in outputs]
        # Of outputs, whether they have memory of their own, before and after.
        fresh = [o.op != "placeholder" and owners.count(o) == 1 and o not in crossing for o in owners]
        self._effects: list[list[Any]] = [
            [e if isinstance(e, Opaque) else [(p, places[o], fresh[o]) for p, o in e] for e in effects_]
            for effects_ in derived.effects
        ]
        self._checks = [places[c] for c in derived.checks if places[c] in self._segments[0].gives]
        self._returned = [
            (kind, places[what] if kind in ("made", "number") else what, *rest) for kind, what, *rest in returned
        ]
        self._let_go({what for kind, what, *_ in self._returned if kind in ("made", "number")}, len(tensors))
        values = (v for n in graph.nodes for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, Tensor))
        self.largest = max((v.numel() for v in values), default=0)

    def _let_go(self, kept: set[int], inputs: int) -> None:
        """Note after which segment nobody needs a value; of inputs the caller has them all."""
        last: dict[int, int] = {}
        for number, (segment, effects_) in enumerate(zip(self._segments, self._effects, strict=True)):
            given = [i for effect in effects_ if isinstance(effect, list) for _, i, _ in effect]
            last.update(dict.fromkeys((*segment.needs, *segment.gives, *given), number))
        for place, number in last.items():
            if place >= inputs and place not in kept:
                self._segments[number].dead.append(place)

    def __call__(self, call: dict[str, Any]) -> tuple[Any] | None:
        """What the step returns, in a tuple; None where the plan is not for the call.

        Raises
        ------
        Refused
            Where values are not finite, which zeros that were folded are none beside, or an operator raises an error
            before the first update; everything is as before.
        """
        found = self.world(call)
        return None if found is None else (self._replay(*found),)

    def world(self, call: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]] | None:
        """Tensors, and what has opaque calls, as they are now; None where the plan is not for the call."""
        if self.given_up or self._kind != (torch.is_grad_enabled(), backends.requested()):
            return None
        tensors = self._guards.fetch(call)
        if tensors is None:
            return None
        things = self._find(call, self._guards._function.__globals__)
        if list(map(type, things)) != self._types or not all(map(runs_as_itself, things)):
            return None
        return (tensors, things) if all(tensors[place].is_leaf for place in self._reached) else None

    def _replay(self, tensors: Sequence[Tensor], things: Sequence[Any]) -> Any:
        kept = [(tensors[i], tensors[i].detach().clone()) for i in self._written_first]
        device = tensors[0].device
        random = random_state(device) if self._draws and self._folds else None
        values: list[Any] = [*tensors, *[None] * (self._count - len(tensors))]
        captured = False

        def before() -> None:
            for t, value in kept:
                t.data.copy_(value)
            if random is not None:
                set_random_state(device, random)

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for d in self._casts:
                stack.enter_context(torch.autocast(d, enabled=False))
            for number, segment in enumerate(self._segments):
                if segment.gives or segment.needs:
                    graph = segment.graph
                    try:
                        found = (segment.run if graph is None else graph)([values[i] for i in segment.needs])
                    except Exception as error:
                        if number == 0 and self._folds:
                            # The step's own run raises it where it should: after its zero_grad, say.
                            before()
                            raise Refused(f"a call of it failed with {first_line(error)}") from None
                        raise
                    captured = captured or (graph is not None and graph.is_captured)
                    for i, value in zip(segment.gives, found, strict=True):
                        values[i] = value
                    del found
                if number == 0 and self._folds and not all(_is_finite(values[i]) for i in self._checks):
                    before()
                    raise Refused(NOT_FINITE)
                for effect in self._effects[number]:
                    if isinstance(effect, Opaque):
                        with torch.set_grad_enabled(effect.grad_mode):
                            call_opaque(things[effect.place], effect.name, effect.args, effect.kwargs)
                    else:
                        accumulate([(tensors[p], values[i], fresh and not captured) for p, i, fresh in effect])
                for i in segment.dead:
                    values[i] = None
        for place, on in self._switched:
            tensors[place].requires_grad_(on)
        if captured:
            # A replay counts no versions, and overwrites what it gave before.
            torch.autograd.graph.increment_version([tensors[i] for i in self._writes])
            for kind, what, *_ in self._returned:
                if kind == "made":
                    values[what] = values[what].clone()
        return self._result(tensors, values)

    def _result(self, tensors: Sequence[Tensor], values: Sequence[Any]) -> Any:
        leaves = []
        for kind, what, *rest in self._returned:
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
        return pytree.tree_unflatten(leaves, self._structure)


def _is_finite(tensor: Tensor) -> bool:
    return math.isfinite(tensor.item() if tensor.numel() == 1 else tensor.sum().item())


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
