"""Argument checks that the models and the training loop share."""

from __future__ import annotations


def check_positive_int(**values: object) -> None:
    """Raise ValueError, naming the argument, unless every value is a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_positive(**values: object) -> None:
    """Raise ValueError, naming the argument, unless every value is a positive finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_image_size(image_size: object) -> None:
    """Raise ValueError unless `image_size` is a power of two that stride-2 layers can reach from 4x4."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8 or image_size.bit_count() != 1:
        raise ValueError(f"image_size: expected a power of two of at least 8, got {image_size!r}")
