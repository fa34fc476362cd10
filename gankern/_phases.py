"""Where the parts of an operation begin and end, for whoever measures them; off, a part costs one look at a global."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

#: Called with a part's name while somebody measures.
hook: Callable[[str], AbstractContextManager[Any]] | None = None
#: Whether the dispatch modes are the profiler's own: the penalty and fused modules run as they do without.
inline = False


def phase(name: str) -> AbstractContextManager[Any]:
    """Context of a part of an operation."""
    if hook is None or torch.compiler.is_compiling():
        return nullcontext()
    return hook(name)
