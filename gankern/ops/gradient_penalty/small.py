"""Penalties so small that stock autograd, which is C++ throughout, outruns layers that Python calls one by one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel

from gankern import _compiling, _phases, backends
from gankern.ops.gradient_penalty.autograd import check_input_gradient, check_scores, first_order_only, torch_may_run

# Multiplications of a forward pass that pay for the calls of gankern's layers, measured: for each convolution or linear
# layer, each norm with a weight a channel, and each with a weight a pixel. Linear layers gain less of a product, and
# convolutions of one image, which torch runs by other kernels.
_PER_WEIGHT, _PER_CHANNEL_NORM, _PER_PIXEL_NORM = 2.5e6, 10e6, 38e6
_LINEAR_GAIN, _SINGLE_IMAGE_GAIN = 1 / 6, 1 / 3
# What else a parameter of a linear layer costs stock, in multiplications: passes over memory for its gradient.
_PER_LINEAR_PARAMETER = 3


def is_small(critic: Callable[..., Tensor], points: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether a critic costs less than calling gankern's layers for it, by an estimate from its trainable parameters.

    It takes images for as large in all layers as at the first. Torch's second derivative of a strided convolution costs
    more than ours at any size.
    """
    if not params or not torch.is_grad_enabled() or not torch_may_run(points):
        return False
    if not isinstance(critic, nn.Module) or isinstance(critic, DistributedDataParallel):
        return False
    if _compiling.is_compiled(critic):
        return False
    if any(isinstance(m, _ConvNd) and max(m.stride) > 1 for m in critic.modules()):
        return False
    samples, dims = points.size(0), points.dim()
    pixels = samples * points[0, 0].numel() if dims > 2 else 0
    work = 0.0
    weights = vectors = pixel_norms = 0
    for p in params:
        p_dims = p.dim()
        if p_dims == 1:
            vectors += 1
        elif p_dims == 2:
            weights += 1
            work += p.numel() * (samples * _LINEAR_GAIN + _PER_LINEAR_PARAMETER)
        elif p_dims == dims:
            weights += 1
            work += p.numel() * pixels * (1 if samples > 1 else _SINGLE_IMAGE_GAIN)
        else:
            pixel_norms += 1
    # Each weight comes with a bias, each norm with two parameters.
    channel_norms = max(vectors - weights, 0)
    return work < _PER_WEIGHT * weights + (_PER_CHANNEL_NORM * channel_norms + _PER_PIXEL_NORM * pixel_norms) / 2


class _Tail(torch.autograd.Function):
    """Penalty of the critic's input gradient; `unreached` are parameters that it does not depend on."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, options: tuple[Any, ...], *unreached: Tensor) -> Tensor:
        loss, cotangent = backends.select("gradient_penalty", grad).tail(grad, *options)
        ctx.save_for_backward(cotangent, *unreached)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only()
        cotangent, *unreached = ctx.saved_tensors
        return cotangent * grad_loss, None, *map(torch.zeros_like, unreached)


# By critic: which parameters it was asked for, and the places of those among them.
_unreached: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], list[int]]] = weakref.WeakKeyDictionary()


def _find_unreached(critic: nn.Module, params: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Parameters that are not in a gradient's graph, which is walked once for a critic."""
    ids = list(map(id, params))
    known = _unreached.get(critic)
    if known is None or known[0] != ids:
        nodes, seen, reached = [grad.grad_fn], set(), set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            nodes += [following for following, _ in node.next_functions]
        known = ids, [i for i, p in enumerate(ids) if p not in reached]
        _unreached[critic] = known
    return [params[i] for i in known[1]]


def penalty(
    critic: nn.Module,
    params: Sequence[Tensor],
    points: Tensor,
    call: Callable[[Tensor], Any],
    options: tuple[float, float, bool, bool],
) -> Tensor:
    """Penalty at points with the graph that stock autograd makes of it; ``call`` is the critic with all its inputs."""
    x = points if points.requires_grad else points.detach().requires_grad_()
    with _phases.phase("penalty/inner forward"):
        scores = call(x)
    check_scores(scores)
    with _phases.phase("penalty/inner gradient"):
        (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True, allow_unused=True)
    check_input_gradient(grad)
    with _phases.phase("penalty/tail"):
        unreached = _find_unreached(critic, params, grad) if grad.requires_grad else params
        return _Tail.apply(grad, options, *unreached)
