"""Whether fused modules run the code they were made of, for a derivative that stock autograd takes twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_asked: ContextVar[bool] = ContextVar("gankern_stock", default=False)


@contextmanager
def forwards() -> Iterator[None]:
    """Let fused modules run as stock inside a ``with`` block."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_asked() -> bool:
    """Whether to run as stock.

    Not where saved tensors have hooks: a checkpoint runs the module again in the backward pass, where nobody asks, and
    both runs must save the same.
    """
    if torch.compiler.is_compiling() or not _asked.get():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None
