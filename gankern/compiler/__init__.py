"""Plans of steps of the second order: derive, guard, optimise, replay.

A plan is the flat graph of a gradient penalty, derived by running the critic itself under ``make_fx``, so that both
orders of derivatives are autograd's own, and replayed without autograd as long as its guards hold. What cannot be
derived or guarded is refused, with the reason, and stock autograd runs it.
"""

from gankern.compiler.refusal import Refused

__all__ = ["Refused"]
