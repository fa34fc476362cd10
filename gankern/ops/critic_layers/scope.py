"""What the layers of one penalty know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Scope:
    """State shared by the layers of one run of a critic, in whatever thread their derivatives are computed.

    Attributes
    ----------
    input_gradient_only : bool
        Whether the gradient being computed is the one with respect to the critic's input, so that gradients of weights
        are not wanted. A Python Function cannot learn that from ``needs_input_grad``, which stays True.
    """

    def __init__(self) -> None:
        self.input_gradient_only = False

    @contextmanager
    def input_gradient(self) -> Iterator[None]:
        self.input_gradient_only = True
        try:
            yield
        finally:
            self.input_gradient_only = False
