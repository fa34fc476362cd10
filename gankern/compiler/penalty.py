"""Plans of gradient penalties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from gankern import _library, _stock, backends
from gankern.arguments import first_line
from gankern.compiler.derive import Functions, bilinear_convolutions, coarsest, derive, in_place_of, leaf_like
from gankern.compiler.guards import Held, make_guards, modules_of
from gankern.compiler.norms import SECOND_ORDER
from gankern.compiler.passes import effects, optimise
from gankern.compiler.pointwise import group, pointwise_of
from gankern.compiler.refusal import Refused
from gankern.compiler.replay import compile_graph


def _tail(grad: Tensor, weight: float, target: float, one_sided: bool, squared: bool) -> tuple[Tensor, Tensor]:
    loss, cotangent = backends.select("gradient_penalty", grad).tail(grad, weight, target, one_sided, squared)
    return loss, cotangent


def _tail_fake(grad: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(()), torch.empty_like(grad)


tail_op = _library.define(
    "penalty_tail(Tensor grad, float weight, float target, bool one_sided, bool squared)"
    " -> (Tensor loss, Tensor cotangent)",
    _tail,
    _tail_fake,
)


#: A loss, and tensors with their gradients; None for the points.
Result = tuple[Tensor, list[tuple[Tensor | None, Tensor]]]


class PenaltyPlan:
    """What computes a penalty and its gradients, for calls like the one it was made for.

    Parameters
    ----------
    call : dict
        The critic, points that require a gradient, args and kwargs, under these names (``x`` for the points).
    wants : bool
        Whether gradients are wanted: of all that the forward reads and that requires one.
    wants_points : bool
        Whether one with respect to the points is wanted too.

    Attributes
    ----------
    sources : list of str
        Expressions for what the forward reads.
    given_up : str
        Why it never runs again: its first replay failed.
    compared : str
        How the first call compared with stock's, in strict mode.

    Raises
    ------
    Refused
    """

    given_up = compared = ""
    PROGRAMS = ("_run",)

    def __init__(self, call: dict[str, Any], wants: bool, wants_points: bool) -> None:
        pointwise = pointwise_of(call["critic"])
        self._guards = make_guards(**call)
        held = self._guards.take()
        self.sources = [h.source for h in held]
        self._kind = wants, wants_points, backends.requested()
        self._wanted = [i for i, h in enumerate(held) if wants and h.tensor.requires_grad]
        state = [h.tensor.detach() for h in held]
        self.graph = derive(self._step(call, held), [call["x"].detach()], state, modules_of(call["critic"], held))
        self.coarsest = coarsest(self.graph.graph)
        _open_options(self.graph.graph)
        changed = effects.written(self.graph.graph)
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        self._writes = [node in changed for node in inputs[: len(held) + 1]]
        _refuse_aliases([call["x"], *(h.tensor for h in held)], self._writes)
        self._draws = any(map(effects.draws, self.graph.graph.nodes))
        self._proven = False
        optimise(self.graph, backends.select("critic_layers", call["x"]))
        if pointwise == "inductor":
            group(self.graph.graph)
        self._run = compile_graph(self.graph)

    def _step(self, call: dict[str, Any], held: Sequence[Held]) -> Callable[..., list[Tensor | None]]:
        """The penalty as a function of the points and of the tensors that the forward reads."""
        critic, args, kwargs = call["critic"], call["args"], call["kwargs"]
        models = [h.tensor for h in held]
        modules = [h.module for h in held if h.module is not None]

        def step(points: Tensor, *tensors: Tensor) -> list[Tensor | None]:
            leaves = [leaf_like(t, model) for t, model in zip(tensors, models, strict=True)]
            wanted = [leaves[i] for i in self._wanted]
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                points = points.detach().requires_grad_()
                with in_place_of(modules, Functions(SECOND_ORDER, models, leaves)), _stock.forwards():
                    scores = critic(points, *args, **kwargs)
                wanted += [points] if self._kind[1] else []
                (grad,) = torch.autograd.grad(
                    scores, points, torch.ones_like(scores), create_graph=bool(wanted), allow_unused=True
                )
                if grad is None:
                    raise Refused("its scores do not depend on the points")
                loss, cotangent = tail_op(grad.detach(), 1.0, 0.0, False, False)
                found: Sequence[Tensor | None] = [None] * len(wanted)
                if wanted and grad.requires_grad:
                    with bilinear_convolutions():
                        found = torch.autograd.grad(grad, wanted, cotangent, allow_unused=True)
                return [loss, scores.detach(), *found]

        return step

    def __call__(
        self, call: dict[str, Any], wants: bool, wants_points: bool, options: tuple[float, float, bool, bool]
    ) -> Result | None:
        """Loss, and each tensor that gets a gradient with it; None where the plan is not for this call."""
        tensors = self.tensors(call, wants, wants_points)
        if tensors is None:
            return None
        # Casts of autocast are in the graph already.
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast(call["x"].device.type, enabled=False):
            loss, *grads = self._attempt(call["x"], *tensors, *options)
        wanted = [tensors[i] for i in self._wanted] + ([None] if wants_points else [])
        return loss, [(t, g) for t, g in zip(wanted, grads, strict=True) if g is not None]

    def tensors(self, call: dict[str, Any], wants: bool, wants_points: bool) -> tuple[Tensor, ...] | None:
        """What the forward reads, as it is now; None where the plan is not for this call."""
        if self.given_up or (wants, wants_points, backends.requested()) != self._kind:
            return None
        return self._guards.fetch(call)

    def _attempt(self, x: Tensor, *rest: Any) -> list[Any]:
        """A replay; where it cannot be right, the state is as before, and stock runs."""
        tensors = [t for t, written in zip((x, *rest), self._writes, strict=False) if written]
        kept = [t.clone() for t in tensors]
        state = random_state(x.device) if self._draws or not self._proven else None
        failed = None
        try:
            loss, scores, *grads = self._run(x, *rest)
            # Zeros were folded that are none beside an infinite value.
            if x.device.type == "cpu" and not math.isfinite(loss.item() + scores.sum().item()):
                failed = "values that are not finite"
        except Exception as error:
            if self._proven:
                raise
            failed = self.given_up = f"its replay failed with {first_line(error)}"
        if failed is not None:
            for t, before in zip(tensors, kept, strict=True):
                # Autograd is not told: a graph that holds it saw the value that comes back.
                t.data.copy_(before)
            if state is not None:
                set_random_state(x.device, state)
            raise Refused(failed)
        self._proven = True
        return [loss, *grads]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be read back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the processor's generator, and of the device's; a capture's is not to be read."""
    states = [torch.get_rng_state()]
    if device.type == "cuda" and not is_capturing(device):
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _refuse_aliases(tensors: Sequence[Tensor], writes: Sequence[bool]) -> None:
    """What is written is read nowhere else: in the graph all inputs are apart."""
    storages = [t.untyped_storage()._cdata for t in tensors]
    if any(written and storages.count(s) > 1 for s, written in zip(storages, writes, strict=True)):
        raise Refused("it changes a tensor that shares memory with another")


def _open_options(graph: fx.Graph) -> None:
    """Make the penalty's weight, target and form inputs of the graph."""
    (tail,) = [node for node in graph.nodes if node.target is tail_op]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        options = [graph.placeholder(name) for name in ("squared", "one_sided", "target", "weight")]
    tail.args = (tail.args[0], *reversed(options))
