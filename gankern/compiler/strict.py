"""The first call of a plan beside stock's own run of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gankern.arguments import first_line
from gankern.compiler.penalty import PenaltyPlan, Result, random_state, set_random_state
from gankern.ops.gradient_penalty.autograd import stock_penalty

# By how much of its norm a result may differ. Rounding is a few units in the last place for each of tens of operations
# in a row, times the network's condition: a thousand units (1e-4 in float32) is well above that, and far below the term
# or factor that a wrong pass changes. Half types have two or three digits to lose.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where results cancel (the gradient of a bias before a norm) rounding is of the size of the largest of them.
_FLOOR = 1e-2
# Units in the last place by which points and target move, to see how far stock's own results move then.
_NUDGE = 64
# Rounding inside of a deep network is some times larger than such a nudge of what enters it.
_AMPLIFIED = 20


class State:
    """What a forward may change, as it is now: tensors, and the random numbers to come.

    Parameters
    ----------
    tensors : iterable of Tensor
    device : torch.device
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._device, self._random = device, random_state(device)
        self._tensors = list(tensors)
        self.values = [t.detach().clone() for t in self._tensors]

    def restore(self) -> None:
        """Make everything as it was, the version counters too: a graph may hold what a forward wrote uncounted."""
        counted = tuple(t for t in self._tensors if not t.is_inference())
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(counted):
            for tensor, value in zip(self._tensors, self.values, strict=True):
                # An expanded one, say, cannot be written.
                if not bool(((tensor == value) | (tensor != tensor) & (value != value)).all()):
                    tensor.copy_(value)
        set_random_state(self._device, self._random)

    def draws_as(self, other: State) -> bool:
        """Whether the same random numbers are to come."""
        return all(map(torch.equal, self._random, other._random))


def differences(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> dict[str, float]:
    """Distances, by name, of the results that differ by more than the tolerance of their norm.

    Parameters
    ----------
    got, want : dict
        Tensors of one shape each, or None.
    tolerance : float
    """
    floor = _FLOOR * max((_norm(t) for t in want.values() if _is_number(t)), default=0.0)
    found = {}
    for name, stock in want.items():
        ours = got[name]
        if _is_number(ours) and _is_number(stock):
            distance, allowed = _distance(ours, stock), tolerance * (_norm(stock) + floor)
        else:
            same = ours is stock if ours is None or stock is None else torch.equal(ours, stock)
            distance, allowed = 0.0 if same else torch.inf, 0.0
        if distance > allowed:
            found[name] = distance
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double().nan_to_num(0, 0, 0)))


def _distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference; infinite where one is NaN or infinite and the other is not."""
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.linalg.vector_norm(torch.where(same, 0.0, a - b).nan_to_num(torch.inf)))


def _coarsest(values: Iterable[Any]) -> torch.dtype:
    return max({v.dtype for v in values if _is_number(v)}, key=lambda dtype: torch.finfo(dtype).eps)


def tolerance_of(tensors: Iterable[Tensor]) -> float:
    """By how much of its norm a result of tensors may differ."""
    return _TOLERANCES.get(_coarsest([torch.empty(0, dtype=torch.float64), *tensors]), 1.0)


def _tolerance(graph: fx.Graph) -> tuple[float, float]:
    """Tolerance and unit in the last place of the coarsest dtype that a graph computes in."""
    coarsest = _coarsest(v for node in graph.nodes for v in pytree.tree_leaves(node.meta.get("val")))
    return _TOLERANCES.get(coarsest, 1.0), torch.finfo(coarsest).eps


_CONTAINER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


def _plain(source: str) -> str:
    """``L['critic']._modules['0']._parameters['weight']`` as 0.weight."""
    return re.sub(r"^L\['(\w+)'\]", r"\1", _CONTAINER.sub(r".\1", source)).removeprefix("critic.")


class _Comparison:
    """A call by a plan and by stock, from one state.

    Parameters
    ----------
    call, options
        As a plan is called.
    touched : dict
        What a forward may write, by name; the points under this name.
    wanted : dict
        Those of them that get a gradient.
    """

    def __init__(self, call: dict[str, Any], options: Any, touched: dict[str, Tensor], wanted: dict[str, Tensor]):
        self._call, self._options, self._touched, self._wanted = call, options, touched, wanted
        self.before = self.state()

    def state(self) -> State:
        return State(self._touched.values(), self._call["x"].device)

    def named(self, loss: Tensor, grads: Iterable[Tensor | None], state: State) -> dict[str, Any]:
        """All that a run gave."""
        results: dict[str, Any] = {"the loss": loss}
        results |= {f"the gradient of {name}": g for name, g in zip(self._wanted, grads, strict=True)}
        return results | {f"{name} afterwards": t for name, t in zip(self._touched, state.values, strict=True)}

    def stock(self, nudge: float = 0.0, trial: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients by stock from the state before; of points and target moved by so much of themselves."""
        self.before.restore()
        given, (weight, target, *form) = self._call["x"], self._options
        x = given
        if nudge:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(trial), dtype=torch.float64).to(x)
            x = (x + nudge * noise * x.square().mean().sqrt()).detach().requires_grad_()
            target *= 1 + nudge * (1 + trial)
        critic, args, kwargs = (self._call[name] for name in ("critic", "args", "kwargs"))
        # Fused attention has no second derivative, and a plan takes none.
        with sdpa_kernel(SDPBackend.MATH):
            loss = stock_penalty(critic, x, args, kwargs, weight, target, *form)
        tensors = [x if t is given else t for t in self._wanted.values()]
        if not tensors or not loss.requires_grad:
            return loss.detach(), [None] * len(tensors)
        # Outside of autocast, as the backward pass of the user's loss is.
        with torch.autocast(x.device.type, enabled=False):
            return loss.detach(), list(torch.autograd.grad(loss, tensors, allow_unused=True))

    def explained(self, apart: dict[str, float], want: dict[str, Any], eps: float) -> set[str]:
        """Names of results of stock's that move as far when what it is given moves by a few units."""
        moved = dict.fromkeys(apart, 0.0)
        for trial in range(2):
            other = self.named(*self.stock(_NUDGE * eps, trial), self.state())
            for name in apart:
                if _is_number(other[name]) and _is_number(want[name]):
                    moved[name] = max(moved[name], _distance(other[name], want[name]))
        return {name for name, far in apart.items() if far <= _AMPLIFIED * moved[name]}


def first_call(
    plan: PenaltyPlan,
    call: dict[str, Any],
    wants: bool,
    wants_points: bool,
    options: tuple[float, float, bool, bool],
) -> tuple[Result | None, str]:
    """The result of a plan, or stock's where that is another one, with words that say what differs.

    Both run on the same state, and leave what one of them leaves. None where the plan is not for this call.
    """
    critic, x = call["critic"], call["x"]
    tensors = plan.tensors(call, wants, wants_points)
    if tensors is None:
        return None, ""
    touched = dict(zip(map(_plain, plan.sources), tensors, strict=True))
    wanted = {name: t for name, t in touched.items() if wants and t.requires_grad} | ({"x": x} if wants_points else {})
    if isinstance(critic, nn.Module):
        read = set(map(id, tensors))
        own = (*critic.named_parameters(), *critic.named_buffers())
        touched |= {name: t for name, t in own if id(t) not in read}
    both = _Comparison(call, options, {"x": x} | touched, wanted)
    result = plan(call, wants, wants_points, options)
    if result is None:
        return None, ""
    after = both.state()
    try:
        loss, grads = both.stock()
    except Exception as error:
        # Of a derivative that nobody needs, say: the plan is what there is.
        after.restore()
        plan.compared = f"stock raises {first_line(error)}"
        return result, ""
    left = both.state()
    plan.compared = "as stock"
    found = {id(x if t is None else t): g for t, g in result[1]}
    got, want = both.named(result[0], [found.get(id(t)) for t in wanted.values()], after), both.named(loss, grads, left)
    tolerance, eps = _tolerance(plan.graph.graph)
    apart = differences(got, want, tolerance)
    draws = [] if after.draws_as(left) else ["the random numbers to come"]
    if apart and not draws:
        for name in both.explained(apart, want, eps):
            del apart[name]
        left.restore()
    if not apart and not draws:
        return result, ""
    told = [f"{name} by {far:.2e} of {_size(want[name])}" for name, far in apart.items()]
    ours = [(None if t is x else t, g) for t, g in zip(wanted.values(), grads, strict=True) if g is not None]
    return (loss, ours), "; ".join([*draws, *told[:5], *([f"and {len(told) - 5} more"] if told[5:] else [])])


def _size(value: Any) -> str:
    return f"{_norm(value):.2e}" if _is_number(value) else "none" if value is None else "whole numbers"
