"""Few samples on the CPU, where a kernel's call takes longer than the arithmetic: plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import backends
from gankern._autograd import is_transformed
from gankern.ops.minibatch_discrimination import autograd, reference

# Differences of all pairs below which this is faster, as measured.
_FEW_DIFFERENCES = 120_000


def is_small(m: Tensor) -> bool:
    if torch.compiler.is_compiling() or m.device.type != "cpu" or backends.requested() != "auto":
        return False
    return m.dtype in (torch.float32, torch.float64) and 0 < m.numel() * m.size(0) < _FEW_DIFFERENCES


class Features(torch.autograd.Function):
    """In fewer calls than autograd would make."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, include_self: bool) -> Tensor:
        differences = m.unsqueeze(1) - m.unsqueeze(0)
        similarity = differences.abs().sum(3).neg_().exp_()
        similarity.diagonal().zero_()
        ctx.save_for_backward(m, differences, similarity)
        output = similarity.sum(1)
        return output.add_(1) if include_self else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        m, differences, similarity = ctx.saved_tensors
        if is_transformed():
            return reference.features_backward(grad_output, m), None
        if torch.is_grad_enabled():
            return autograd.FeaturesBackward.apply(grad_output, m), None
        weight = (grad_output.unsqueeze(1) + grad_output.unsqueeze(0)).mul_(similarity)
        return differences.sign().mul_(weight.unsqueeze(3)).sum(1).neg_(), None


def l1_distance(m: Tensor) -> Tensor:
    # In other layouts torch adds the terms up in an order that differs between an element and its mirror.
    m = m.contiguous()
    return (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)
