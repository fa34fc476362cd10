"""What the penalty's layers take of a critic, told without running it."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gankern import backends, compiler, dispatch
from gankern.backends import Explanation, explain_call
from gankern.compiler.choice import plan_pays
from gankern.ops import _check
from gankern.ops.critic_layers import Chain

SMALL = "critic and batch are so small that it is faster"
#: Where calls count for more than arithmetic.
PLANNED = "a plan of the whole critic is faster than its layers one by one"
PLAIN_CALL = "only a module's own call with the points alone is looked into, without params and create_graph"


@dataclass(frozen=True)
class PenaltyExplanation(Explanation):
    """What :func:`gankern.explain` found for a gradient penalty and its critic.

    Attributes
    ----------
    op, chosen, refused
        As in :class:`gankern.backends.Explanation`, for the points and the penalty itself.
    reason : str or None
        Why gankern's layers do not run the critic; None where they do.
    plan : str or None
        What became of the calls so far that a plan could run in their place: how many plans were made and used, and why
        stock autograd ran the others; or why such a call gets none. None where there was no such call.
    calls : tuple of gankern.compiler.report.Call
        What the plan that ran last calls: each kernel with the backend, the line of the critic's code and the module.
    taken : dict of str to int
        Modules of the critic by class that gankern's layers run.
    stock : dict of str to int
        Those that stock autograd differentiates twice, as without gankern.
    linear : dict of str to int
        Those that stock autograd runs and that are linear in the activations: shapes. Nothing is lost.
    """

    reason: str | None = None
    plan: str | None = None
    taken: dict[str, int] = field(default_factory=dict)
    stock: dict[str, int] = field(default_factory=dict)
    linear: dict[str, int] = field(default_factory=dict)
    calls: tuple[Any, ...] = field(default=(), kw_only=True, repr=False)

    def __str__(self) -> str:
        if self.reason is not None:
            told = f"critic, by a plan or stock autograd: {self.reason}", f"plans: {self.plan or 'no call yet'}"
            return "\n".join([super().__str__(), *told, *_table(self.calls)])
        lines = [super().__str__()]
        for what, calls in (
            ("by gankern's layers", self.taken),
            ("linear and left as it is", self.linear),
            ("by stock autograd", self.stock),
        ):
            lines.append(f"critic, {what}: " + (", ".join(f"{name} {n}" for name, n in calls.items()) or "nothing"))
        return "\n".join(lines)


def explain_penalty(function: Callable[..., Any], found: Explanation, *args: Any, **kwargs: Any) -> Explanation:
    """Add to what was found for the points what gankern takes of the critic; nothing where no critic is given.

    The critic does not run.
    """
    from gankern.ops.gradient_penalty import autograd, check_points, choose, small, trainable

    names = list(inspect.signature(function).parameters)
    if not (args and callable(args[0]) and not isinstance(args[0], Tensor)) and "critic" not in kwargs:
        return found
    call = inspect.signature(function).bind(*args, **kwargs).arguments
    points = [call[name] for name in names[1:3] if name in ("real", "fake")]
    for name, value in zip(names[1:3], points, strict=False):
        check_points(name, value)
        _check.same_shape(name, value, names[1], points[0])
    # Labels and the like have no say in which backend runs.
    found = explain_call(found.op, *points)
    critic = autograd.inner_module(call["critic"])
    given = trainable(critic, call.get("params"))
    plain_call = not any(call.get(name) for name in ("inputs", "critic_kwargs", "create_graph"))
    if not isinstance(critic, nn.Module) or call.get("params") is not None or not plain_call:
        plan, calls_made = told_of_plans(critic, call, points[0])
        return PenaltyExplanation(found.op, found.chosen, found.refused, PLAIN_CALL, plan, calls=calls_made)
    made = points[0].detach()
    made = made if len(points) == 1 else made.to(torch.promote_types(made.dtype, points[1].dtype))
    chain = choose(critic, made)
    with torch.enable_grad():
        if isinstance(chain, Chain) and small.is_small(critic, made, given):
            chain = SMALL
    if isinstance(chain, Chain) and compiler.enabled() and plan_pays(made) and backends.requested() != "reference":
        chain = PLANNED
    if dispatch.is_small(made):
        chain = dispatch.SMALL
    if isinstance(chain, str):
        plan, calls_made = told_of_plans(critic, call, made)
        return PenaltyExplanation(found.op, found.chosen, found.refused, chain, plan, calls=calls_made)
    calls: dict[str, Counter[str]] = {"taken": Counter(), "stock": Counter(), "linear": Counter()}
    for step in chain.steps:
        how = "taken" if step.kind.run is not None else "stock" if step.kind.bends else "linear"
        calls[how][type(step.module).__name__] += 1
    return PenaltyExplanation(found.op, found.chosen, found.refused, None, None, *map(dict, calls.values()))


def told_of_plans(critic: Any, call: Mapping[str, Any], points: Tensor) -> tuple[str | None, tuple[Any, ...]]:
    """Why a call gets no plan; else what became of the critic's calls so far, without bringing Dynamo in.

    With it come the calls of the plan that ran last.
    """
    if call.get("create_graph"):
        return "none with create_graph", ()
    if backends.requested() == "reference":
        return "none on the backend 'reference'", ()
    if dispatch.is_small(points, captured=True):
        return f"none: {dispatch.SMALL}", ()
    if not compiler.enabled():
        return "switched off", ()
    cache = sys.modules.get(f"{compiler.__name__}.cache")
    found = None if cache is None else cache.known_plans(critic)
    return (None, ()) if found is None else (str(found), found.calls)


def _table(calls: Sequence[Any]) -> Iterable[str]:
    if not calls:
        return ()
    from gankern.compiler.report import as_lines

    return as_lines(calls)
