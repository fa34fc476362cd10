"""Argument checks: each error names the argument, the rule and what was received."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")


def floating(name: str, value: Any) -> None:
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype; got {value.dtype}")


def ndim(name: str, value: Tensor, dims: int, form: str) -> None:
    if value.dim() != dims:
        raise ValueError(f"{name} must have shape {form}; got {tuple(value.shape)}")


def vector(name: str, value: Any, size: int) -> None:
    floating(name, value)
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name} must have shape ({size},); got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}; got {value.device}")


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} must have {other_name}'s shape {tuple(other.shape)}; got {tuple(value.shape)}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}; got {value.dtype}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")


def number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not low <= value <= high or math.isinf(value):
        span = f"in [{low}, {high}]" if high < math.inf else f"at least {low}" if low > -math.inf else "finite"
        raise ValueError(f"{name} must be {span}; got {value!r}")


def positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")


def int_pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(value, bool) or not (
        isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(v, int) for v in pair)
    ):
        raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")
    return pair[0], pair[1]


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def generator(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None; got {type(value).__name__}")
