"""The gradient penalty's relatives: other centres and other points, the same machinery.

All return a scalar for one backward pass, or more with ``create_graph``; see :func:`gankern.gradient_penalty` for
``params``, ``create_graph`` and the arguments handed on to the critic. Zero-centred ones use sums of squares, never a
root. A lazy schedule (Karras et al. 2020, appendix B) is the caller's: every k-th step, k times the penalty.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gankern import backends
from gankern.ops import _check
from gankern.ops.gradient_penalty import Critic, check_points, explain_penalty, penalty_at, penalty_points

__all__ = ["dragan", "r1", "r2", "zero_centered"]


def r1(
    critic: Critic,
    real: Tensor,
    *inputs: Any,
    weight: float = 10.0,
    params: Iterable[Tensor] | None = None,
    create_graph: bool = False,
    **critic_kwargs: Any,
) -> Tensor:
    """``weight / 2 * mean ||grad critic(real)||^2`` (Mescheder et al. 2018, equation 9).

    Parameters
    ----------
    critic : nn.Module or callable
    real : Tensor
        Shape (N, ...) with N >= 1.
    weight : float, optional
        The paper's gamma.

    Returns
    -------
    Tensor
        Scalar.
    """
    return _squared("real", critic, real, inputs, critic_kwargs, weight, params, create_graph)


def r2(
    critic: Critic,
    fake: Tensor,
    *inputs: Any,
    weight: float = 10.0,
    params: Iterable[Tensor] | None = None,
    create_graph: bool = False,
    **critic_kwargs: Any,
) -> Tensor:
    """``weight / 2 * mean ||grad critic(fake)||^2`` (Mescheder et al. 2018, equation 10).

    Parameters
    ----------
    critic : nn.Module or callable
    fake : Tensor
        Shape (N, ...) with N >= 1.
    weight : float, optional
        The paper's gamma.

    Returns
    -------
    Tensor
        Scalar.
    """
    return _squared("fake", critic, fake, inputs, critic_kwargs, weight, params, create_graph)


def _squared(
    name: str,
    critic: Critic,
    points: Tensor,
    inputs: tuple[Any, ...],
    critic_kwargs: dict[str, Any],
    weight: float,
    params: Iterable[Tensor] | None,
    create_graph: bool,
) -> Tensor:
    check_points(name, points)
    _check.number("weight", weight)
    return penalty_at(
        critic,
        points,
        inputs,
        critic_kwargs,
        weight=weight / 2,
        squared=True,
        params=params,
        create_graph=create_graph,
    )


def dragan(
    critic: Critic,
    real: Tensor,
    *inputs: Any,
    weight: float = 10.0,
    target: float = 1.0,
    scale: float = 0.5,
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    create_graph: bool = False,
    **critic_kwargs: Any,
) -> Tensor:
    """``weight * mean (||grad critic(real + delta)|| - target)^2`` near real samples (Kodali et al. 2017, equation 5).

    Parameters
    ----------
    critic : nn.Module or callable
    real : Tensor
        Shape (N, ...) with N >= 1.
    weight, target : float, optional
        The paper's lambda and k.
    scale : float, optional
        The noise is ``scale * std(real)`` times uniform numbers from [0, 1), as in the authors' implementation.
    generator : torch.Generator or None, optional
        Draws the noise.

    Returns
    -------
    Tensor
        Scalar.
    """
    check_points("real", real)
    _check.number("scale", scale, low=0)
    _check.generator("generator", generator)
    noise = torch.rand(real.shape, dtype=real.dtype, device=real.device, generator=generator)
    points = real + scale * real.detach().std(correction=0) * noise
    return penalty_at(
        critic,
        points,
        inputs,
        critic_kwargs,
        weight=weight,
        target=target,
        params=params,
        create_graph=create_graph,
    )


def zero_centered(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *inputs: Any,
    weight: float = 10.0,
    alpha: Tensor | None = None,
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    create_graph: bool = False,
    **critic_kwargs: Any,
) -> Tensor:
    """``weight * mean ||grad critic(x)||^2`` at points between real and fake (Thanh-Tung et al. 2019, section 5).

    Parameters
    ----------
    critic : nn.Module or callable
    real, fake : Tensor
        Shape (N, ...) with N >= 1, of one shape and device.
    weight : float, optional
        The paper's lambda.
    alpha, generator
        As in :func:`gankern.gradient_penalty`.

    Returns
    -------
    Tensor
        Scalar.
    """
    points = penalty_points(real, fake, alpha, generator)
    return penalty_at(
        critic, points, inputs, critic_kwargs, weight=weight, squared=True, params=params, create_graph=create_graph
    )


for _function in (r1, r2, dragan, zero_centered):
    backends.register_explainer(
        _function.__name__, functools.partial(explain_penalty, _function), kernels="gradient_penalty"
    )
