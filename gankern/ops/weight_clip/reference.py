"""Plain torch: the oracle of tests and benchmarks, and the ``reference`` backend."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse(*tensors: Tensor) -> str | None:
    return None


def clamp_(params: list[Tensor], c: float | Tensor) -> None:
    """The clamp as autograd records it, where it does."""
    for param in params:
        # Of other dtypes than the parameter's, tensors cannot be bounds.
        bound = c.to(param.dtype) if isinstance(c, Tensor) else c
        param.clamp_(-bound, bound)  # type: ignore[arg-type]


@torch.no_grad()
def clip_weights(params: list[Tensor], c: float | Tensor) -> None:
    clamp_(params, c)


@torch.no_grad()
def rmsprop_clip(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | Tensor | None,
) -> None:
    """``torch.optim.RMSprop``'s step, then the clamp; centered and with momentum where their states are given."""
    if not params:
        return
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_mul_(square_avgs, alpha)
    torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - alpha)
    variances = square_avgs
    if grad_avgs:
        torch._foreach_lerp_(grad_avgs, grads, 1 - alpha)
        variances = list(torch._foreach_addcmul(square_avgs, grad_avgs, grad_avgs, value=-1))
    deviations = torch._foreach_sqrt(variances)
    torch._foreach_add_(deviations, eps)
    if momentum_buffers:
        torch._foreach_mul_(momentum_buffers, momentum)
        torch._foreach_addcdiv_(momentum_buffers, grads, deviations)
    if isinstance(lr, Tensor):
        updates = momentum_buffers or list(torch._foreach_div(grads, deviations))
        torch._foreach_sub_(params, list(torch._foreach_mul(updates, lr)))
    elif momentum_buffers:
        torch._foreach_add_(params, momentum_buffers, alpha=-lr)
    else:
        torch._foreach_addcdiv_(params, grads, deviations, value=-lr)
    if clip is not None:
        clip_weights(params, clip)
