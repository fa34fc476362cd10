"""Plans of steps of the second order: derive, guard, optimise, replay.

A plan is the flat graph of a gradient penalty, derived by running the critic itself under ``make_fx``, so that both
orders of derivatives are autograd's own, and replayed without autograd as long as its guards hold. What cannot be
derived or guarded is refused, with the reason, and stock autograd runs it.

Nothing here is imported before the first plan is made: Dynamo takes a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from gankern.compiler.refusal import Refused

__all__ = ["Refused", "enabled", "planning"]

#: What may run between the kernels of a plan.
POINTWISE = ("torch", "inductor")

# Values of GANKERN_PLAN.
_MODES: dict[str, bool | Literal["strict"]] = {"0": False, "1": True, "strict": "strict"}


def _from_environment() -> bool | Literal["strict"]:
    value = os.environ.get("GANKERN_PLAN", "1")
    if value not in _MODES:
        raise ValueError(f"GANKERN_PLAN must be 0, 1 or strict; got {value!r}")
    return _MODES[value]


_DEFAULT = _from_environment()
_mode: ContextVar[bool | Literal["strict"]] = ContextVar("gankern_plans", default=_DEFAULT)


#: Computes the penalties of a step that is being derived whole; None outside of one.
penalty_in_step: ContextVar[Callable[..., Any] | None] = ContextVar("gankern_penalty_in_step", default=None)


def check_pointwise(pointwise: str) -> str:
    """The same value, where it is one of `POINTWISE`."""
    if pointwise not in POINTWISE:
        raise ValueError(f"pointwise must be {' or '.join(map(repr, POINTWISE))}; got {pointwise!r}")
    return pointwise


def enabled() -> bool:
    """Whether plans are made and used: unless ``GANKERN_PLAN=0`` or :func:`planning` say otherwise."""
    return bool(_mode.get())


def is_strict() -> bool:
    """Whether each plan's first call is compared with stock's: with ``GANKERN_PLAN=strict``, or :func:`planning`."""
    return _mode.get() == "strict"


@contextmanager
def planning(on: bool | Literal["strict"]) -> Iterator[None]:
    """Make and use plans inside a ``with`` block, or leave to stock autograd what they would run.

    Parameters
    ----------
    on : bool or "strict"
        With "strict" the first call of each plan also runs stock, on the same state, and compares loss, gradients, what
        the forward writes and the random numbers to come. A plan that differs by more than rounding explains is
        dropped, the logger ``gankern.compiler`` gets an error that names the critic and what differs by how much, and
        the call returns stock's result. The state afterwards is that of one forward.
    """
    if on not in (True, False, "strict"):
        raise ValueError(f"on must be True, False or 'strict'; got {on!r}")
    token = _mode.set(on)
    try:
        yield
    finally:
        _mode.reset(token)
