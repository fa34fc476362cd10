"""Kernel-accelerated GAN training for PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from gankern import nn, ops, optim, penalties, workspace
from gankern.backends import BackendUnavailable, backend, explain, set_backend
from gankern.capture import CaptureError, capture
from gankern.info import info
from gankern.nn.fuse import fuse, fusion_report, unfuse
from gankern.ops.gradient_penalty import gradient_penalty
from gankern.ops.weight_clip import clip_weights_

if TYPE_CHECKING:
    from gankern import profile

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CaptureError",
    "backend",
    "capture",
    "clip_weights_",
    "explain",
    "fuse",
    "fusion_report",
    "gradient_penalty",
    "info",
    "nn",
    "ops",
    "optim",
    "penalties",
    "profile",
    "set_backend",
    "unfuse",
    "workspace",
]


def __getattr__(name: str) -> Any:
    # The profiler's imports take longer than all others together.
    if name == "profile":
        return importlib.import_module("gankern.profile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
