"""Registration of kernels as torch operators in the namespace ``gankern``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("gankern", "DEF")


def define(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register one operator for every device and return its overload, bound once.

    The implementation is below autograd: differentiation is in Functions outside the operator.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gankern::{name}", fake, lib=_library)
    return getattr(torch.ops.gankern, name).default
