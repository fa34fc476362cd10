"""What the layers of one penalty know of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Activated:
    """Outputs of activations, each with what stands for the activation's input, and the slope.

    A layer that multiplies its input's gradient by the activation's derivative itself takes that for its input.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Tensor, float]] = {}

    def note(self, output: Tensor, edge: Tensor, negative_slope: float) -> None:
        self._known[id(output)] = weakref.ref(output), output._version, edge, negative_slope

    def find(self, tensor: Tensor) -> tuple[Tensor, float] | None:
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        # Not where it was changed in place since, nor where somebody waits for its gradient.
        watched = tensor._backward_hooks or tensor.retains_grad
        return None if known[1] != tensor._version or watched else known[2:]

    def clear(self) -> None:
        self._known.clear()


class Scope:
    """State shared by the layers of one run of a critic, in whatever thread their derivatives are computed.

    Attributes
    ----------
    input_gradient_only : bool
        Whether the gradient being computed is the one with respect to the critic's input, so that gradients of weights
        are not wanted. A Python Function cannot learn that from ``needs_input_grad``, which stays True.
    points : Tensor or None
        The critic's input, where nobody will ask for the gradient of the penalty with respect to it: once the inner
        gradient is taken, a layer that stands right behind it leaves its input gradient out.
    as_stock : bool
        Whether the forward pass keeps stock's bits, and with them its activation pattern: a single pre-activation that
        rounds to the other sign moves a float32 gradient by as much as 1e-4 of its norm.
    turns : bool
        Whether layers turn images into channels_last that stock keeps contiguous. Other functions get them contiguous.
    fuses : bool
        Whether convolutions take their input together with the activation before it: not where a third derivative will
        be asked for.
    activated : Activated
        What they take.
    """

    def __init__(
        self,
        points: Tensor | None = None,
        as_stock: bool = True,
        turns: bool = True,
        fuses: bool = False,
    ) -> None:
        self.input_gradient_only = False
        self.points = points
        self.as_stock = as_stock
        self.turns = turns
        self.fuses = fuses
        self.activated = Activated()

    @contextmanager
    def input_gradient(self) -> Iterator[None]:
        self.input_gradient_only = True
        try:
            yield
        finally:
            self.input_gradient_only = False
