"""Argument checks: each error names the argument, the rule and what was received."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


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


def number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, finite: bool = True) -> float:
    """The value; as a float where it is a NumPy number or a tensor of no dims, which torch takes as well."""
    if not isinstance(value, (int, float)):
        scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
        if not scalar and not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number; got {value!r}")
        value = float(value.detach() if scalar else value)
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if value < low or value > high or (finite and not math.isfinite(value)):
        span = f"in [{low}, {high}]" if high < math.inf else f"at least {low}" if low > -math.inf else "finite"
        raise ValueError(f"{name} must be {span}; got {value!r}")
    return value


def _int(value: Any) -> int | None:
    """An int, or what torch takes for one, as an int; None if it is neither."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        return None


def positive_int(name: str, value: Any) -> int:
    number = _int(value)
    if number is None:
        raise TypeError(f"{name} must be an int; got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")
    return number


def int_pair(name: str, value: Any, least: int) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return value, value
    given = value if isinstance(value, (tuple, list)) else (value,)
    pair = [_int(v) for v in (given if len(given) == 2 else [*given, *given])]
    if len(pair) != 2 or pair[0] is None or pair[1] is None:
        raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")
    if min(pair[0], pair[1]) < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")
    return pair[0], pair[1]


def padding(value: Any, kernel: Sequence[int], stride: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """The padding of a convolution on both sides, and what "same" has more of at the end."""
    if not isinstance(value, str):
        return int_pair("padding", value, 0), (0, 0)
    if value not in ("valid", "same"):
        raise ValueError(f"padding must be numbers, 'valid' or 'same'; got {value!r}")
    if value == "valid":
        return (0, 0), (0, 0)
    if stride != (1, 1):
        raise ValueError(f"padding must not be 'same' with a stride; got stride {stride}")
    height, width = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    return (height // 2, width // 2), (height % 2, width % 2)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def generator(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None; got {type(value).__name__}")
