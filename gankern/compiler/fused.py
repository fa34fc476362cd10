"""Which way a call of a fused module goes: by a plan, as stock, or as stock whose parts may be planned."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gankern import compiler, dispatch
from gankern.compiler import choice, strict
from gankern.compiler.cache import NOTHING, Cache, Kind
from gankern.compiler.forward import ForwardPlan
from gankern.compiler.guards import is_hooked
from gankern.compiler.penalty import is_capturing
from gankern.compiler.pointwise import pointwise_of
from gankern.compiler.refusal import Refused
from gankern.ops.gradient_penalty.choice import watched


class Unplanned(Exception):
    """Stock runs a call.

    Attributes
    ----------
    whole : bool
        Whether the modules inside run stock, too.
    known : Kind or None
        Which is to be told of stock's output.
    """

    def __init__(self, whole: bool, known: Kind | None = None) -> None:
        super().__init__()
        self.whole, self.known = whole, known


@dataclass(eq=False)
class Plans(Cache):
    """The plans of one fused module.

    Attributes
    ----------
    idle : int
        Calls that stock runs without a look at them: a module that no plan pays for.
    reason : str or None
        Why stock ran the last call; None where a plan did, or is to be made of more calls like it.
    """

    idle: int = 0
    reason: str | None = None
    what = "a forward"
    beside_stock = staticmethod(strict.forward)

    def run(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The output by the plan for a call; a plan is made where calls of its kind have come before.

        Raises
        ------
        Unplanned
            Where stock is to run.
        """
        x: Any = args[0] if args else None
        if not isinstance(x, Tensor):
            self.reason = "its first argument is no tensor"
        elif torch.is_inference_mode_enabled():
            self.reason = "inference mode"
        else:
            self.reason = watched(x)
        if self.reason is not None:
            raise Unplanned(whole=False)
        call = {"critic": module, "x": x, "args": tuple(args[1:]), "kwargs": dict(kwargs)}
        strictly = compiler.is_strict() and not is_capturing(x.device)
        try:
            output: Tensor | None = self.ask(strictly, call)
        except Refused:
            # Another thread makes it, whose first replay tells as well; or it differs from stock.
            output = None
        return self._first(strictly, call) if output is None else output

    def _first(self, strictly: bool, call: dict[str, Any]) -> Tensor:
        if is_hooked():
            self.reason = "a hook on all modules"
            raise Unplanned(whole=False)
        known = self.known(call)
        strange = known.calls > 0 and known.strides is None
        if strange or known.calls < max(known.wait, choice.calls_first()):
            self.reason = known.reason or (_NO_TENSOR if strange else None)
            raise Unplanned(self.reason in (None, NOTHING), known)
        try:
            output: Tensor = self.first(known, strictly, call)
        except Refused as refused:
            self.reason = str(refused)
        else:
            return output
        if self.reason == NOTHING and not self.plans:
            self.idle = known.wait
        raise Unplanned(self.reason == NOTHING, known)

    def kind_of(self, call: dict[str, Any], *how: Any) -> Any:
        x = call["x"]
        return (
            *(x.shape, x.stride(), x.dtype, x.device, x.requires_grad, torch.is_grad_enabled()),
            *(call["critic"].training, len(call["args"]), tuple(call["kwargs"]), dispatch.goes_by_size(x.device)),
        )

    def plan_for(self, known: Kind, call: dict[str, Any], *how: Any) -> ForwardPlan:
        plan = ForwardPlan(call, known.strides, pointwise=pointwise_of(call["critic"]))
        if not plan.kernels and not plan.parts and not choice.is_everywhere():
            raise Refused(NOTHING)
        return plan

    def pointwise(self) -> str:
        """What runs between the kernels, where Inductor was asked for: of the plan that ran last."""
        parts = self.plans[0].parts if self.plans else []
        if not parts:
            return "torch: no neighbours to compile" if self.plans else "inductor"
        return next((f"torch: {part.reason}" for part in parts if part.reason), "inductor")


_NO_TENSOR = "its output is no tensor, or lies in memory otherwise each time"

_plans: weakref.WeakKeyDictionary[nn.Module, Plans] = weakref.WeakKeyDictionary()


def known_plans(module: nn.Module) -> Plans | None:
    """The plans of a module; None where it was never called fused."""
    return _plans.get(module)


def plans_of(module: nn.Module) -> Plans:
    """The plans of a module, none at first."""
    found = _plans.get(module)
    return _plans.setdefault(module, Plans()) if found is None else found
