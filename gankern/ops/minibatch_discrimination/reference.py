"""Plain torch: the oracle of tests and benchmarks, and the ``reference`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern._native import acc_dtype


def _differences(m: Tensor) -> Tensor:
    """m_i - m_j, shape (N, N, B, C)."""
    return m.unsqueeze(1) - m.unsqueeze(0)


def l1_distance(m: Tensor) -> Tensor:
    return _differences(m).abs().sum(3)


def minibatch_discrimination(m: Tensor, *, include_self: bool = False) -> Tensor:
    output = _similarity(l1_distance(m)).sum(1)
    return output + 1 if include_self else output


def _similarity(distance: Tensor) -> Tensor:
    """exp(-distance) between different samples, 0 between a sample and itself."""
    diagonal = torch.eye(distance.size(0), dtype=torch.bool, device=distance.device)
    return torch.exp(-distance).masked_fill(diagonal.unsqueeze(2), 0)


# The kernels' own functions; differentiable to any order.


def refuse(*tensors: Tensor) -> str | None:
    return None


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(acc_dtype(t.dtype)) for t in tensors]


def features(m: Tensor, include_self: bool) -> Tensor:
    (wide,) = _wide(m)
    return minibatch_discrimination(wide, include_self=include_self).to(m.dtype)


def features_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    g, wide = _wide(grad_output, m)
    d = _differences(wide)
    weight = (g.unsqueeze(1) + g.unsqueeze(0)) * _similarity(d.abs().sum(3))
    return -(weight.unsqueeze(3) * d.sign()).sum(1).to(m.dtype)


def features_double_backward(cotangent: Tensor, grad_output: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``(cotangent * features_backward(grad_output, m)).sum()`` with respect to grad_output and m."""
    v, g, wide = _wide(cotangent, grad_output, m)
    d = _differences(wide)
    change = _similarity(d.abs().sum(3)) * (_differences(v) * d.sign()).sum(3)
    weight = (g.unsqueeze(1) + g.unsqueeze(0)) * change
    grad_m = (weight.unsqueeze(3) * d.sign()).sum(1)
    return -change.sum(1).to(grad_output.dtype), grad_m.to(m.dtype)


def distance(m: Tensor) -> Tensor:
    (wide,) = _wide(m)
    return l1_distance(wide).to(m.dtype)


def distance_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    g, wide = _wide(grad_output, m)
    return ((g + g.transpose(0, 1)).unsqueeze(3) * _differences(wide).sign()).sum(1).to(m.dtype)


def distance_tangent(tangent: Tensor, m: Tensor) -> Tensor:
    """Derivative of the distances along tangent; as a function of it, the transpose of distance_backward."""
    v, wide = _wide(tangent, m)
    return (_differences(v) * _differences(wide).sign()).sum(3).to(m.dtype)
