"""What `torch.compile` leaves on modules and functions, without importing it: that takes longer than torch itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch

if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule

#: Whether Dynamo passes modules to functions marked by `constant`.
TAKES_MODULES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

F = TypeVar("F", bound=Callable[..., Any])


def is_compiled(value: Any) -> TypeGuard[OptimizedModule]:
    """Whether a value is the module that `torch.compile` puts around another, which is its ``_orig_mod``."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(value, frames.OptimizedModule)


def constant(function: F) -> F:
    """Mark a function that Dynamo runs while it traces: `torch.compiler.assume_constant_result`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
