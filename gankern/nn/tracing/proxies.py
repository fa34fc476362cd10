"""What stands for tensors in a trace: fx's proxies, and what those leave out."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from gankern.nn.tracing.values import Untraceable, in_library

_MAY_BE_NONE = frozenset({"grad", "grad_fn", "_grad", "_grad_fn", "_base", "_backward_hooks", "__dict__", "__class__"})


class _Recorded:
    """What fx's proxies leave out: in-place operators, and questions about a value's type."""

    node: fx.Node
    tracer: Any

    def _type(self) -> type:
        if in_library(sys._getframe(1)):
            return type(self)
        if self.node.op == "placeholder":
            return self.tracer.types[self.node.name]
        if self.node.op == "get_attr":
            return Tensor
        raise Untraceable("it asks for the type of a computed value")

    __class__ = property(_type)

    def __getattr__(self, name: str) -> Any:
        if name in _MAY_BE_NONE or not (hasattr(Tensor, name) or hasattr(torch.Size, name)):
            raise Untraceable(f"it asks a tensor for {name}")
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        if not in_library(sys._getframe(1)):
            raise Untraceable("it makes text of a tensor")
        return fx.Proxy.__repr__(self)  # type: ignore[arg-type]


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Recorded, f"__{_name}__", _in_place(getattr(operator, _name)))


class Proxy(_Recorded, fx.Proxy):
    pass


class _Attribute(_Recorded, Attribute):
    pass
