"""When plans and their kernels pay, as measured; tests have them everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from gankern import dispatch

_everywhere: ContextVar[bool] = ContextVar("gankern_everywhere", default=False)

# Calls of one kind that stock runs before a fused module is planned: what comes once or twice is not worth the time.
_CALLS_FIRST = 2
# Elements from which on batch norm's kernels are faster on a CPU (AMD Zen 5, 2 cores).
_MANY = 1 << 17

# Bytes from which on malloc may give memory back to the system, which then maps it page by page.
_LARGE = 1 << 17

# Elements of all images that convolutions leave, from which on kernels win more than a plan's guards cost (AMD Zen 5, 2
# cores).
_MANY_IMAGES = 1 << 17

# Channels from which on convolutions' kernels are faster on a CPU (AMD Zen 5, 2 cores).
_CHANNELS = 16

# Scores from which on blocks of attention are faster than the plain products on a CPU (AMD EPYC, 1 thread).
_SCORES = 1 << 15


@contextmanager
def everywhere() -> Iterator[None]:
    """Plan each call at once, with kernels whatever the size and type, inside a ``with`` block; for tests."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


def is_everywhere() -> bool:
    return _everywhere.get()


def calls_first() -> int:
    """How many calls of a kind stock runs before a plan is made for them."""
    return 0 if _everywhere.get() else _CALLS_FIRST


def plan_pays(points: Tensor) -> bool:
    """Whether a plan runs the penalty of a plain critic faster than gankern's layers, one by one.

    On a GPU plans have no kernels for convolutions.
    """
    return points.device.type == "cpu"


def step_pays(device: torch.device, faster: int, values: int) -> bool:
    """Whether a whole step is faster as a plan, by how much in it is `faster` and the values of its largest tensor.

    On a CPU autograd's own calls, of the first order, take no longer than a plan's: there it needs a penalty, kernels
    or optimizers that go from parameter to parameter (AMD EPYC, 2 cores). On a GPU a plan is a graph.
    """
    if _everywhere.get():
        return True
    return faster > 0 if device.type == "cpu" else values < dispatch.FEW_BYTES // 4


def norm_pays(x: Tensor) -> bool:
    """Whether a batch norm's kernel is faster than stock's."""
    if _everywhere.get():
        return True
    return x.numel() >= _MANY if x.device.type == "cpu" else not dispatch.is_small(x)


def images_pay(elements: int, weights: int) -> bool:
    """Whether convolutions that leave so many elements are worth a plan; a graph without any may be for its norms.

    `weights`, those that a pass without derivatives reorders for its kernels, which stock in channels_last need not.
    """
    return elements == 0 or elements >= max(_MANY_IMAGES, weights) or _everywhere.get()


def order_pays(images: Tensor) -> bool:
    """Whether torch's convolutions are faster in channels_last."""
    return images.device.type == "cpu" and (images.dtype in (torch.float32, torch.bfloat16) or _everywhere.get())


def convolution_pays(which: str, images: Tensor, weight: Tensor, transposed: bool) -> bool:
    """Whether the kernel of a convolution's pass is faster than torch's in channels_last.

    As measured on an AMD Zen 5 with 2 cores: torch's are where a pixel is one vector or less, or sees only itself.
    """
    if _everywhere.get():
        return True
    given, made = (weight.size(0), weight.size(1)) if transposed else (weight.size(1), weight.size(0))
    read = {"forward": given, "input": made, "weight": min(given, made)}[which]
    return read >= _CHANNELS and weight[0, 0].numel() > 1 and images.dtype == torch.float32


def workspace_pays(size: int) -> bool:
    """Whether memory of so many bytes is found sooner in the workspace than by malloc."""
    return size >= _LARGE or (size > 0 and _everywhere.get())


def outweighs(images: int, weight: int) -> bool:
    """Whether so many elements of images outweigh a convolution's weight, which torch turns at each call."""
    return 2 * images >= weight or _everywhere.get()


def attention_pays(scores: int) -> bool:
    """Whether attention by blocks is faster than the plain products."""
    return scores > _SCORES or _everywhere.get()
