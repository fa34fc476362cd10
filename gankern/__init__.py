"""Kernel-accelerated GAN training for PyTorch."""

from gankern import nn, ops, optim, penalties, workspace
from gankern.backends import BackendUnavailable, backend, explain, set_backend
from gankern.capture import CaptureError, capture
from gankern.info import info
from gankern.nn.fuse import fuse, fusion_report, unfuse
from gankern.ops.gradient_penalty import gradient_penalty
from gankern.ops.weight_clip import clip_weights_

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
    "set_backend",
    "unfuse",
    "workspace",
]
