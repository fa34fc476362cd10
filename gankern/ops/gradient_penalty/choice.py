"""Whether gankern's layers run a penalty: only where it is certain that nothing can tell them from stock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern import backends
from gankern._autograd import onlooker
from gankern.ops.critic_layers import Chain, find, reference


def watched(*tensors: Tensor) -> str | None:
    """Why functions of gankern's own may not stand in for stock's on these tensors, or at this moment; None if so."""
    with torch._C.DisableTorchFunction():
        for t in tensors:
            if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_inference() or t.is_neg():
                return "tensors of a kind of their own"
            if t.device.type not in ("cpu", "cuda"):
                return f"gankern has no kernels for {t.device.type}"
    reason = onlooker()
    return "anomaly detection" if reason is None and torch.is_anomaly_enabled() else reason


def stands_alone(points: Tensor) -> str | None:
    """Why a penalty at these points must be stock's own, whatever the critic; None where nobody looks on."""
    if points._backward_hooks or (points.retains_grad and not points.is_leaf):
        return "hooks on the points"
    return watched(points)


def choose(critic: Any, points: Tensor) -> Chain | str:
    """The chain that gankern's layers run; else the reason why they do not run the critic."""
    reason = stands_alone(points)
    if reason is not None:
        return reason
    chain = find(critic)
    if isinstance(chain, str):
        return chain
    casts = torch.is_autocast_enabled(points.device.type)
    if any(p.device != points.device or (p.dtype != points.dtype and not casts) for p in chain.params):
        return "parameters of another device or type than the points"
    if casts and not chain.casts:
        return "under autocast there are no layers for norms and poolings"
    # On a GPU, made of torch's functions, the layers still spare passes.
    adapter = backends.select("critic_layers", points)
    if points.device.type == "cpu" and backends.requested() == "auto" and adapter.__name__ == reference.__name__:
        return f"gankern has no kernels for {points.dtype}"
    return chain
