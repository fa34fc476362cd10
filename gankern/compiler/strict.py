"""The first call of a plan beside stock's own run of it, and its first backward pass."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gankern import _stock
from gankern.arguments import first_line
from gankern.compiler.forward import ForwardPlan
from gankern.compiler.penalty import PenaltyPlan, Result, random_state, set_random_state
from gankern.ops.gradient_penalty.autograd import stock_penalty

log = logging.getLogger("gankern.compiler")

#: What a plan's `compared` says.
AS_STOCK, DIFFERS = "as stock", "differs from stock"

# By how much of its norm a result may differ. Rounding is a few units in the last place for each of tens of operations
# in a row, times the network's condition: a thousand units (1e-4 in float32) is well above that, and far below the term
# or factor that a wrong pass changes. Half types have two or three digits to lose.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where results cancel (the gradient of a bias before a norm) rounding is of the size of the largest of them.
_FLOOR = 1e-1
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
        Tensors, or None.
    tolerance : float
    """
    floor = _FLOOR * max((_norm(t) for t in want.values() if _is_number(t)), default=0.0)
    found = {}
    for name, stock in want.items():
        ours = got[name]
        if _is_number(ours) and _is_number(stock) and (ours.shape, ours.dtype) == (stock.shape, stock.dtype):
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


def tolerance_of(tensors: Iterable[Tensor]) -> float:
    """By how much of its norm a result of tensors may differ."""
    return max([0.0, *(_TOLERANCES.get(t.dtype, 1.0) for t in tensors if _is_number(t))]) or _TOLERANCES[torch.float64]


_CONTAINER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


def _plain(source: str) -> str:
    """``L['critic']._modules['0']._parameters['weight']`` as 0.weight."""
    return re.sub(r"^L\['(\w+)'\]", r"\1", _CONTAINER.sub(r".\1", source)).removeprefix("critic.")


def apart(
    got: dict[str, Any], want: dict[str, Any], dtype: torch.dtype, again: Callable[[float, int], dict[str, Any]]
) -> list[str]:
    """What differs by more than rounding explains.

    `again` tells stock's results where what it is given moves by so much of itself: they may move as far then.
    """
    apart = differences(got, want, _TOLERANCES.get(dtype, 1.0))
    moved = dict.fromkeys(apart, 0.0)
    for trial in range(2 if apart else 0):
        other = again(_NUDGE * torch.finfo(dtype).eps, trial)
        for name in apart:
            if _is_number(other[name]) and _is_number(want[name]):
                moved[name] = max(moved[name], _distance(other[name], want[name]))
    far = {name: distance for name, distance in apart.items() if distance > _AMPLIFIED * moved[name]}
    told = [f"{name} by {distance:.2e} of {_size(want[name])}" for name, distance in far.items()]
    return [*told[:5], *([f"and {len(told) - 5} more"] if told[5:] else [])]


def _size(value: Any) -> str:
    return f"{_norm(value):.2e}" if _is_number(value) else "none" if value is None else "whole numbers"


def _nudged(x: Tensor, nudge: float, trial: int) -> Tensor:
    """Values on a leaf of their own, moved by so much of themselves."""
    leaf = x.detach()
    if nudge and _is_number(x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(trial), dtype=torch.float64).to(x)
        leaf = leaf + nudge * noise * leaf.square().mean().sqrt()
    return leaf.requires_grad_(x.requires_grad)


def _gradients(names: Iterable[str], grads: Iterable[Tensor | None]) -> dict[str, Any]:
    return {f"the gradient of {name}": g for name, g in zip(names, grads, strict=True)}


class _Beside(ABC):
    """A call by a plan and by stock, from one state.

    Parameters
    ----------
    plan : PenaltyPlan or ForwardPlan
    call : dict
        As a plan is called.
    tensors : sequence of Tensor
        What the forward reads besides the points.
    """

    def __init__(self, plan: Any, call: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        self._plan, self._call, critic = plan, call, call["critic"]
        #: The points and what else the forward reads, by name.
        self._read = {"the points": call["x"]} | dict(zip(map(_plain, plan.sources), tensors, strict=True))
        known = set(map(id, tensors))
        own = (*critic.named_parameters(), *critic.named_buffers()) if isinstance(critic, nn.Module) else ()
        self._touched = self._read | {name: t for name, t in own if id(t) not in known}
        self._before = self._state()

    @abstractmethod
    def _stock(self, nudge: float, trial: int) -> dict[str, Any]:
        """Stock's results, of what is given moved by so much of itself."""

    @abstractmethod
    def _named(self, result: Any) -> dict[str, Any]:
        """A plan's results by the same names."""

    def compare(self, run: Callable[[], Any]) -> tuple[Any, str]:
        """A plan's result, and in words how it differs from stock's; nothing has happened then."""
        stock = None
        try:
            stock, left = self._again(), self._state()
        except Exception as error:
            # Of a derivative that nobody needs, say: the plan is what there is.
            self._plan.compared = f"stock raises {first_line(error)}"
        self._before.restore()
        result = run()
        if result is None or stock is None:
            return result, ""
        after = self._state()
        told = apart(self._with(self._named(result), after), stock, self._plan.coarsest, self._again)
        if not after.draws_as(left):
            told.insert(0, "the random numbers to come")
        (self._before if told else after).restore()
        self._plan.compared = DIFFERS if told else AS_STOCK
        return result, "; ".join(told)

    def _state(self) -> State:
        return State(self._touched.values(), self._call["x"].device)

    def _again(self, nudge: float = 0.0, trial: int = 0) -> dict[str, Any]:
        """Stock's results, and what it leaves, from the state before."""
        self._before.restore()
        results = self._stock(nudge, trial)
        return self._with(results, self._state())

    def _with(self, results: dict[str, Any], state: State) -> dict[str, Any]:
        return results | {f"{name} afterwards": t for name, t in zip(self._touched, state.values, strict=True)}


class _Penalty(_Beside):
    def __init__(self, plan: PenaltyPlan, call: dict[str, Any], tensors: Sequence[Tensor], how: Sequence[Any]) -> None:
        super().__init__(plan, call, tensors)
        wants, wants_points, self._options = how
        _, *others = self._read.items()
        self._wanted = {name: t for name, t in others if wants and t.requires_grad}
        self._wanted |= {"the points": call["x"]} if wants_points else {}

    def _stock(self, nudge: float, trial: int) -> dict[str, Any]:
        critic, given, args, kwargs = (self._call[name] for name in ("critic", "x", "args", "kwargs"))
        weight, target, *form = self._options
        x = _nudged(given, nudge, trial) if nudge else given
        # Fused attention has no second derivative, and a plan takes none.
        with sdpa_kernel(SDPBackend.MATH):
            loss = stock_penalty(critic, x, args, kwargs, weight, target * (1 + nudge * (1 + trial)), *form)
        tensors = [x if t is given else t for t in self._wanted.values()]
        grads: Sequence[Tensor | None] = [None] * len(tensors)
        if tensors and loss.requires_grad:
            # Outside of autocast, as the backward pass of the user's loss is.
            with torch.autocast(x.device.type, enabled=False):
                grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        found, expected = {"the loss": loss.detach()}, weight * target**2
        near = _TOLERANCES.get(self._plan.coarsest, 1.0) * expected
        if not nudge and not form[-1] and abs(loss.item() - expected) <= near:
            # Norms of nothing but rounding, which points anywhere.
            return found
        return found | _gradients(self._wanted, grads)

    def _named(self, result: Result) -> dict[str, Any]:
        loss, found = result
        grads = {id(self._call["x"] if t is None else t): g for t, g in found}
        return {"the loss": loss} | _gradients(self._wanted, (grads.get(id(t)) for t in self._wanted.values()))


def penalty(plan: PenaltyPlan, call: dict[str, Any], *how: Any) -> tuple[Result | None, str]:
    """The result of a plan's first call, and in words how it differs from stock's; None where it is for others.

    Where it differs nothing has happened.
    """
    tensors = plan.tensors(call, *how[:2])
    return (None, "") if tensors is None else _Penalty(plan, call, tensors, how).compare(lambda: plan(call, *how))


class _Forward(_Beside):
    def __init__(self, plan: ForwardPlan, call: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        super().__init__(plan, call, tensors)
        self._wanted = {name: t for i, (name, t) in enumerate(self._read.items()) if i in plan.wanted}
        #: Stock's output, and what it is to be differentiated by.
        self._graph: tuple[Tensor, list[Tensor]]

    def _stock(self, nudge: float, trial: int) -> dict[str, Any]:
        given = tuple(self._call[name] for name in ("x", "args", "kwargs"))
        # Hooks of what is given are for the plan's gradients.
        leaves = {id(t): _nudged(t, nudge, trial) for t in pytree.tree_leaves(given) if isinstance(t, Tensor)}
        x, args, kwargs = pytree.tree_map(lambda leaf: leaves.get(id(leaf), leaf), given)
        with _stock.forwards():
            output = self._call["critic"](x, *args, **kwargs)
        self._graph = output, [leaves.get(id(t), t) for t in self._wanted.values()]
        return self._named(output)

    def _named(self, result: Tensor) -> dict[str, Any]:
        return {"the output": result.detach(), "whether a gradient is required": torch.tensor(result.requires_grad)}

    def _gradients(self, grad: Tensor) -> dict[str, Any]:
        output, leaves = self._graph
        grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)
        return self._with(_gradients(self._wanted, grads), self._state())

    def gradients(self, grad: Tensor, run: Callable[[], Sequence[Tensor | None]]) -> Sequence[Tensor | None]:
        """A plan's gradients in its first backward pass; stock's, and the plan is given up, where those are others."""
        plan, device = self._plan, self._call["x"].device.type

        def again(nudge: float, trial: int) -> dict[str, Any]:
            with torch.enable_grad(), torch.autocast(device, enabled=plan.casts is not None):
                self._again(nudge, trial)
            now.restore()
            return self._gradients(grad)

        try:
            stock, now = self._gradients(grad), self._state()
        except Exception as error:
            plan.compared = f"stock raises {first_line(error)}"
            return run()
        grads = run()
        told = "; ".join(apart(self._with(_gradients(self._wanted, grads), self._state()), stock, plan.coarsest, again))
        now.restore()
        plan.compared = DIFFERS if told else AS_STOCK
        if not told:
            return grads
        plan.given_up = f"it differed from stock: {told}"
        name = type(self._call["critic"]).__qualname__
        log.error("the plan of %s differs from stock in its backward pass: %s; stock runs", name, told)
        return [stock[name] for name in _gradients(self._wanted, grads)]


def forward(plan: ForwardPlan, call: dict[str, Any]) -> tuple[Tensor | None, str]:
    """As :func:`penalty`, of a forward; its backward pass is compared when it comes."""
    tensors = plan.tensors(call)
    if tensors is None:
        return None, ""
    beside = _Forward(plan, call, tensors)
    output, told = beside.compare(lambda: plan(call))
    if output is not None and output.grad_fn is not None and plan.compared == AS_STOCK:
        plan.compared, plan.is_backward_proven = "", False
        output.grad_fn.beside = beside
    return output, told
