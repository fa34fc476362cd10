"""Plain torch: the oracle of tests and benchmarks, the ``reference`` backend, and what runs wherever ours may not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def refuse(*tensors: Tensor) -> str | None:
    return None


def penalty_at(
    critic: Callable[[Tensor], Tensor],
    points: Tensor,
    *,
    weight: float,
    target: float = 0.0,
    one_sided: bool = False,
    squared: bool = False,
) -> Tensor:
    """Penalty on the norm of the critic's input gradient at given points, differentiable to any order."""
    x = points if points.requires_grad else points.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return penalty_of(grad, weight, target, one_sided, squared)


def penalty_of(grad: Tensor, weight: float, target: float, one_sided: bool, squared: bool) -> Tensor:
    """Penalty on the norms of input gradients (N, ...)."""
    rows = grad.reshape(grad.size(0), -1)
    if squared:
        return weight * rows.square().sum(1).mean()
    excess = torch.linalg.vector_norm(rows, dim=1) - target
    return weight * (excess.clamp_min(0) if one_sided else excess).square().mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    alpha: Tensor | None = None,
) -> Tensor:
    """Gulrajani et al. 2017, equation 3, as everyone writes it."""
    if alpha is None:
        alpha = torch.rand(real.size(0), device=real.device)
    points = interpolate(real, fake, alpha)
    return penalty_at(critic, points, weight=weight, target=target, one_sided=one_sided)


# The kernels' own functions.


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.reshape(-1, *[1] * (real.dim() - 1)).to(real.dtype)
    return alpha * real + (1 - alpha) * fake


def tail(grad: Tensor, weight: float, target: float, one_sided: bool, squared: bool) -> tuple[Tensor, Tensor]:
    """Loss and its derivative with respect to the input gradients (N, ...); subgradient 0 at a zero gradient."""
    with torch.enable_grad():
        leaf = grad.detach().requires_grad_()
        loss = penalty_of(leaf, weight, target, one_sided, squared)
        (cotangent,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), cotangent
