"""Types and errors of the command line's arguments."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class UsageError(ValueError):
    """An argument that argparse itself cannot judge; the message is one line and names it."""


def positive_int(text: str) -> int:
    """Type of arguments that are integers of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Type of arguments that are positive finite numbers."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def seed_int(text: str) -> int:
    """Type of arguments that are seeds."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def image_size(text: str) -> int:
    """Type of arguments that are sides of images that models make."""
    size = positive_int(text)
    if size < 8 or size.bit_count() != 1:
        raise argparse.ArgumentTypeError(f"expected a power of two of at least 8, got {text!r}")
    return size


def file_path(text: str) -> Path:
    """Type of arguments that are paths."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text)


def data_spec(text: str) -> str:
    """Type of arguments that name a data set: a path is made absolute, so that a run can be resumed from anywhere."""
    return text if text == "digits" else str(file_path(text).resolve())


def shape(text: str) -> tuple[int, ...]:
    """Type of arguments that are shapes, such as ``3,64,64``."""
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected positive integers such as 3,64,64, got {text!r}")
    return tuple(map(int, sizes))


def closest(word: str, known: Iterable[str]) -> str:
    """Ask whether the one of some words that is nearest to a wrong one was meant, in brackets; empty if none is near.

    Case, and a dash or an underscore, do not count.
    """
    plain = {name.lower().replace("_", "-"): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("_", "-"), plain, 1)
    return f" (did you mean {plain[found[0]]!r}?)" if found else ""


def install_hint(extra: str) -> str:
    """How to install what an optional part of gankern needs."""
    return f"pip install '.[{extra}]' in a clone of gankern"


def find_device(name: str) -> torch.device:
    """Check a torch device.

    Raises
    ------
    UsageError
        If this machine does not have it.
    """
    import torch

    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"argument --device: expected a device of this machine, got {name!r}") from error
    return found


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def make_folder(argument: str, path: Path) -> None:
    """Make a folder to write to, if it is not there.

    Raises
    ------
    UsageError
        If something else is, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"argument {argument}: cannot make the folder {path}: {error.strerror}") from error
