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


def define_direct(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`define` of an operator of tensors and numbers, for calls with autograd off.

    Nobody has to see the operator in an eager call of plain tensors: what is returned goes past torch's dispatcher
    then, whose way through Python takes longer than a launch.
    """
    op = define(schema, impl, fake)

    def run(*args: Any) -> Any:
        seen = torch.compiler.is_compiling() or is_watched() or not _PLAIN.issuperset(map(type, args))
        return (op if seen else impl)(*args)

    return run


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def is_watched() -> bool:
    """Whether somebody may see operators: a mode, a profiler or a tracer."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )
