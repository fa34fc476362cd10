"""What the layers of one penalty know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Scope:
    """State shared by the layers of one run of a critic, in whatever thread their derivatives are computed.

    Attributes
    ----------
    input_gradient_only : bool
        Whether the gradient being computed is the one with respect to the critic's input, so that gradients of weights
        are not wanted. A Python Function cannot learn that from ``needs_input_grad``, which stays True.
    want_points : bool
        Whether somebody will ask for the gradient of the penalty with respect to the points; else the first layer
        leaves its input gradient out once the inner gradient is taken.
    as_stock : bool
        Whether the forward pass keeps stock's bits, and with them its activation pattern: a single pre-activation that
        rounds to the other sign moves a float32 gradient by as much as 1e-4 of its norm.
    turns : bool
        Whether layers turn images into channels_last that stock keeps contiguous.
    """

    def __init__(self, want_points: bool = True, as_stock: bool = True, turns: bool = True) -> None:
        self.input_gradient_only = False
        self.want_points = want_points
        self.as_stock = as_stock
        self.turns = turns

    def wants_parameters(self) -> bool:
        """Whether a backward is to compute gradients of weights; their own derivatives are stock's business."""
        if torch.is_grad_enabled() and not self.input_gradient_only:
            raise RuntimeError("critic layers are differentiated twice, and by their input first")
        return not self.input_gradient_only

    @contextmanager
    def input_gradient(self) -> Iterator[None]:
        self.input_gradient_only = True
        try:
            yield
        finally:
            self.input_gradient_only = False
