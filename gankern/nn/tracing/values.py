"""Values that a trace may freeze, since they cannot change or can be compared, and the calls that it stands for."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn


class Untraceable(Exception):
    """Why a forward cannot be traced."""


_SIMPLE = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(...), slice}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)


def is_simple(value: Any) -> bool:
    """Whether a value cannot change and may be compared."""
    kind = type(value)
    return kind in _SIMPLE or (kind in (tuple, torch.Size) and all(map(is_simple, value)))


def is_constant(value: Any) -> bool:
    """Whether a value is simple, or a function, whose code is vetted when it is called."""
    return is_simple(value) or isinstance(value, (enum.Enum, FunctionType, BuiltinFunctionType))


def check_defaults(function: Any) -> None:
    """Raise Untraceable if a function's defaults may change."""
    defaults = [
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
    ]
    if not all(map(is_constant, defaults)):
        raise Untraceable(f"{function.__name__} has a default that may change")


def in_library(frame: FrameType) -> bool:
    """Whether a frame runs torch's code or that of the tracer."""
    name = frame.f_globals.get("__name__", "")
    return name == "torch" or name.startswith(("torch.", "gankern.nn.", "gankern.ops."))


@dataclass(frozen=True)
class Leaf:
    """Where a call has a tensor, or a number that the trace leaves open."""

    type: type


_TENSOR, _FLOAT = Leaf(Tensor), Leaf(float)


def flatten(value: Any, leaves: list[Any], key: list[Any], *, open_floats: bool) -> Any:
    """The value with `Leaf` for tensors, which go to `leaves`; Untraceable if it is made of other things.

    `key` gets all else that two calls must share to be alike, types included.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter or (kind is float and open_floats):
        leaves.append(value)
        key.append(kind is float)
        return _FLOAT if kind is float else _TENSOR
    key.append(kind)
    if kind in (tuple, list):
        key.append(len(value))
        return kind([flatten(v, leaves, key, open_floats=open_floats) for v in value])
    if kind is dict:
        key.append(tuple(value))
        return {k: flatten(v, leaves, key, open_floats=open_floats) for k, v in value.items()}
    if not is_simple(value):
        raise Untraceable(f"it is given a {kind.__name__}")
    key.append(value)
    return value
