"""Plans of whole steps, found again by the calls that they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils import _pytree as pytree

from gankern._autograd import onlooker
from gankern.arguments import first_line
from gankern.backends import Explanation
from gankern.compiler import choice
from gankern.compiler.cache import NOTHING, Cache, Kind
from gankern.compiler.guards import is_hooked
from gankern.compiler.penalty import random_state, set_random_state
from gankern.compiler.refusal import Refused
from gankern.compiler.step import StepPlan
from gankern.compiler.strict import AS_STOCK, DIFFERS, apart
from gankern.compiler.updates import is_dense

# Calls without a look at them where there is no plan.
_RESTS = 32


@dataclass(eq=False)
class Plans(Cache):
    """The plans of one step.

    Attributes
    ----------
    step : Step
        Whose ``idle`` tells how many calls to come are run as they are.
    reason : str
        Why the last call ran as it is; empty where a plan ran it.
    """

    step: Any = None
    reason: str = ""
    _since: int = 0
    what = "a step"
    # A step's derivation takes as long as hundreds of steps.
    patience = 100.0
    # One for each size, penalty or not; more where a number changes from call to call.
    free = 4

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the step returns, by a plan where there is one for the call."""
        reason = _watched()
        if reason is None:
            call = {"critic": function, "x": None, "args": args, "kwargs": kwargs}
            try:
                # A plan's first run is compared, strict or not.
                found = self.ask(True, call)
                found = self._first(call) if found is None else found
                self._since += 1
                self.reason = ""
                return found[0]
            except Refused as refused:
                reason = str(refused)
        self.reason = reason
        return function(*args, **kwargs)

    def _first(self, call: dict[str, Any]) -> tuple[Any]:
        known = self.known(call)
        if known.waits or known.calls < choice.calls_first():
            known.calls += 1
            if known.reason:
                self._rest()
            raise Refused(known.reason or "too few calls so far")
        try:
            found: tuple[Any] = self.first(known, True, call)
        except Refused:
            self._rest()
            raise
        return found

    def _rest(self) -> None:
        """Look at no call for a while, where no plan has run one since the last rest."""
        if not self._since:
            self.step.idle = _RESTS
        self._since = 0

    def kind_of(self, call: dict[str, Any], *how: Any) -> Any:
        args, kwargs = call["args"], call["kwargs"]
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return (
            *((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors),
            *(len(args), tuple(kwargs), torch.is_grad_enabled()),
        )

    def plan_for(self, known: Kind, call: dict[str, Any], *how: Any) -> StepPlan:
        plan = StepPlan(call)
        if not choice.step_pays(plan.device, plan.faster, plan.largest):
            raise Refused(NOTHING)
        return plan

    @staticmethod
    def beside_stock(plan: StepPlan, call: dict[str, Any]) -> tuple[tuple[Any] | None, str]:
        """The step's own result, and state, and in words how the plan's differ from the same state; then as before."""
        found = plan.world(call)
        if found is None:
            return None, ""
        world = World(*found, call["args"], call["kwargs"])
        told, ours = "", {}
        try:
            run = plan(call)
            assert run is not None
            ours = world.named(run[0])
        except Refused as refused:
            plan.given_up = str(refused)
            raise
        except Exception as error:
            told = f"its replay failed with {first_line(error)}"
        random = random_state(world.device)

        def stock(nudge: float = 0.0, trial: int = 0) -> Any:
            world.restore()
            world.nudge(nudge, trial)
            return call["critic"](*call["args"], **call["kwargs"])

        result = stock()
        if not told:
            want, drawn = world.named(result), random_state(world.device)
            told = _apart(ours, want, lambda nudge, trial: world.named(stock(nudge, trial)))
            if not told and not all(map(torch.equal, random, drawn)):
                told = "the random numbers to come"
            if world.nudged and not told:
                result = stock()
        if told:
            world.restore()
        plan.compared = DIFFERS if told else AS_STOCK
        return (result,), told

    def explain(self, name: str) -> Explanation:
        ours = sum(call.by != "torch" for call in self.calls)
        sizes = [
            f"a program of {p.size[1]} calls, {p.size[0]} before the passes; {ours} are of gankern's kernels"
            for p in self.plans[:1]
        ]
        reasons = {"plan": self.reason} if self.reason else {}
        return Explanation(name, "python" if self.reason else "plan", reasons, notes=(str(self), *sizes))


def _watched() -> str | None:
    """Why no plan may run now, whatever it is for."""
    if torch.is_inference_mode_enabled():
        return "inference mode"
    if is_hooked():
        return "a hook on all modules"
    if torch.is_anomaly_enabled():
        return "anomaly detection"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return onlooker()


class World:
    """What a step may change, as it is now.

    Parameters
    ----------
    tensors : sequence of Tensor
    things : sequence
        Optimizers, of what runs as itself.
    args, kwargs
        Of the call.
    """

    def __init__(self, tensors: Sequence[Tensor], things: Sequence[Any], args: Any, kwargs: Any) -> None:
        self._optimizers = [t for t in things if isinstance(t, Optimizer)]
        stepped = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        modules = [p for m in things if isinstance(m, torch.nn.Module) for p in m.parameters()]
        known = {id(t): t for t in (*tensors, *stepped, *given, *modules)}
        self._tensors = list(known.values())
        self._stepped = {id(p) for p in stepped}
        self.device = next((t.device for t in tensors if t.device.type == "cuda"), tensors[0].device)
        self._random = random_state(self.device)
        self.nudged = False
        self._before = [(t.detach().clone(), t.requires_grad, t.grad if t.is_leaf else None) for t in self._tensors]
        self._grads = [None if g is None else g.detach().clone() for _, _, g in self._before]
        self._states = [_copied(o) for o in self._optimizers]

    def restore(self) -> None:
        """Make everything as it was."""
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self._tensors)):
            for t, (value, requires_grad, grad), kept in zip(self._tensors, self._before, self._grads, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)
                if t.is_leaf:
                    t.requires_grad_(requires_grad)
                    if grad is not None:
                        grad.copy_(kept)
                    t.grad = grad
        for optimizer, (state, groups) in zip(self._optimizers, self._states, strict=True):
            _put_back(optimizer, state, groups)
        set_random_state(self.device, self._random)

    def nudge(self, by: float, trial: int) -> None:
        """Move numbers by so much of themselves."""
        if not by:
            return
        self.nudged, generator = True, torch.Generator().manual_seed(trial)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self._tensors)):
            for t in self._tensors:
                # An expanded one, say, cannot be written.
                if t.is_floating_point() and is_dense(t):
                    t.mul_(1 + by * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t))

    def named(self, result: Any) -> dict[str, Any]:
        """Copies of all that a run gave and left."""
        found: dict[str, Any] = {}
        for i, leaf in enumerate(pytree.tree_leaves(result)):
            leaf = torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf
            found[f"result {i}"] = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        for i, t in enumerate(self._tensors):
            # What rounding leaves of a gradient that is zero becomes a whole step of Adam's.
            if id(t) not in self._stepped:
                found[f"tensor {i}"] = t.detach().clone()
            found[f"gradient {i}"] = t.grad.detach().clone() if t.is_leaf and t.grad is not None else None
            found[f"flag {i}"] = t.requires_grad
        return found


def _copied(optimizer: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    state = {
        p: {k: (v, v.detach().clone() if isinstance(v, Tensor) else None) for k, v in own.items()}
        for p, own in optimizer.state.items()
    }
    return state, [dict(group) for group in optimizer.param_groups]


def _put_back(optimizer: Any, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    for p in [p for p in optimizer.state if p not in state]:
        del optimizer.state[p]
    with torch.no_grad():
        for p, own in state.items():
            now = optimizer.state[p]
            now.clear()
            for name, (value, copy) in own.items():
                if copy is not None:
                    value.copy_(copy)
                now[name] = value
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)


def _apart(got: Mapping[str, Any], want: Mapping[str, Any], again: Callable[[float, int], dict[str, Any]]) -> str:
    """What differs by more than rounding explains; empty where nothing does. `again` is as for a comparison."""
    if got.keys() != want.keys():
        return "another number of values"
    tensors = {k: v for k, v in want.items() if isinstance(v, Tensor)}
    told = [k for k, v in want.items() if k not in tensors and (type(got[k]) is not type(v) or got[k] != v)]
    for name, v in tensors.items():
        ours = got[name]
        if not isinstance(ours, Tensor) or (ours.shape, ours.dtype, ours.stride()) != (v.shape, v.dtype, v.stride()):
            told.append(name)
    both = {k: v for k, v in tensors.items() if k not in told}
    numbers = [v.dtype for v in both.values() if v.is_floating_point()]
    coarsest: torch.dtype = max(numbers, key=lambda d: torch.finfo(d).eps, default=torch.float64)
    told += apart({k: got[k] for k in both}, both, coarsest, again)
    return ", ".join(told[:5])
