"""Plans of steps of the second order: derive, guard, optimise, replay.

A plan is the flat graph of a gradient penalty, derived by running the critic itself under ``make_fx``, so that both
orders of derivatives are autograd's own, and replayed without autograd as long as its guards hold. What cannot be
derived or guarded is refused, with the reason, and stock autograd runs it.

Nothing here is imported before the first plan is made: Dynamo takes a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from gankern.compiler.refusal import Refused

__all__ = ["Refused", "enabled", "planning"]


def _from_environment() -> bool:
    value = os.environ.get("GANKERN_PLAN", "1")
    if value not in ("0", "1"):
        raise ValueError(f"GANKERN_PLAN must be 0 or 1; got {value!r}")
    return value == "1"


_DEFAULT = _from_environment()
_enabled: ContextVar[bool] = ContextVar("gankern_plans", default=_DEFAULT)


def enabled() -> bool:
    """Whether plans are made and used: unless ``GANKERN_PLAN=0`` or :func:`planning` say otherwise."""
    return _enabled.get()


@contextmanager
def planning(on: bool) -> Iterator[None]:
    """Make and use plans inside a ``with`` block, or leave to stock autograd what they would run.

    Parameters
    ----------
    on : bool
    """
    token = _enabled.set(on)
    try:
        yield
    finally:
        _enabled.reset(token)
