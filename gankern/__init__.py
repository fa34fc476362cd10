"""Kernel-accelerated GAN training for PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gankern import compiler, nn, ops, optim, penalties, profile, workspace
    from gankern import data as data
    from gankern import models as models
    from gankern import train as train
    from gankern._capture import CapturedStep, CaptureError, capture
    from gankern._info import info
    from gankern._step import Step, step
    from gankern.backends import BackendUnavailable, backend, explain, set_backend
    from gankern.nn.fuse import fuse, fusion_report, unfuse
    from gankern.ops.gradient_penalty import gradient_penalty
    from gankern.ops.weight_clip import clip_weights_

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CaptureError",
    "CapturedStep",
    "Step",
    "backend",
    "capture",
    "clip_weights_",
    "compiler",
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
    "step",
    "unfuse",
    "workspace",
]

# Imported when the first name is used: `gankern --help` needs no torch.
_MODULE_OF = {
    "BackendUnavailable": "gankern.backends",
    "CaptureError": "gankern._capture",
    "CapturedStep": "gankern._capture",
    "Step": "gankern._step",
    "backend": "gankern.backends",
    "capture": "gankern._capture",
    "clip_weights_": "gankern.ops.weight_clip",
    "explain": "gankern.backends",
    "fuse": "gankern.nn.fuse",
    "fusion_report": "gankern.nn.fuse",
    "gradient_penalty": "gankern.ops.gradient_penalty",
    "info": "gankern._info",
    "set_backend": "gankern.backends",
    "step": "gankern._step",
    "unfuse": "gankern.nn.fuse",
}
_MODULES = {"compiler", "data", "models", "nn", "ops", "optim", "penalties", "profile", "train", "workspace"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Whatever is used, torch then knows all operators, as a graph that was saved needs them.
    importlib.import_module("gankern.ops")
    value = (
        importlib.import_module(f"gankern.{name}")
        if name in _MODULES
        else getattr(importlib.import_module(_MODULE_OF[name]), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
