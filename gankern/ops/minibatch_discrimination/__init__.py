"""Minibatch discrimination: L1 distances between the samples of a batch, and features made of them."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function

from gankern._autograd import is_derived, is_plain, is_stand_in, is_traced
from gankern.ops import _check
from gankern.ops.minibatch_discrimination import autograd, reference, small

__all__ = ["l1_distance", "minibatch_discrimination"]


def minibatch_discrimination(m: Tensor, *, include_self: bool = False) -> Tensor:
    """How close each sample is to the others of its minibatch, per feature.

    Computes ``o[i, b] = sum over j != i of exp(-sum over c of |m[i, b, c] - m[j, b, c]|)``: the c_b and o of
    Salimans et al., section 3.2, without the constant 1 that a sample's distance to itself adds.

    Parameters
    ----------
    m : Tensor
        Shape (N, B, C): N samples, B features of C kernel dims each (the paper's M); float32, float64, bfloat16
        or float16 (on a CPU by the reference); any layout, any sizes, 0 included.
    include_self : bool, optional
        Whether to let j run over i too, which adds 1.

    Returns
    -------
    Tensor
        Shape (N, B), of m's dtype, contiguous.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Differentiable to any order; where ``m[i, b, c] == m[j, b, c]`` the derivative of the absolute value is taken
    as 0, as ``torch.abs`` does. Forward, backward and double backward are kernels that compute each pair's distance
    once (on a GPU, once for either sample) and need memory O(N B C); higher orders are plain torch over (N, N, B, C).
    With e the exponentials, g the gradient of o and v a cotangent on the gradient of m, over pairs i != j:

        dL/dm[i] = -sum_j (g[i] + g[j]) e[i, j] sign(m[i] - m[j])
        t[i, j]  = sum_c (v[i] - v[j]) sign(m[i] - m[j])
        d<v, dL/dm>/dg[i] = -sum_j e[i, j] t[i, j]
        d<v, dL/dm>/dm[i] = sum_j (g[i] + g[j]) e[i, j] t[i, j] sign(m[i] - m[j])

    Half types are computed in float32, the sum o in float64. Results have the same bits on every run, for any number of
    threads.

    References
    ----------
    Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen, "Improved Techniques for Training GANs", 2016,
    section 3.2.
    """
    if is_stand_in(m):
        return handle_torch_function(minibatch_discrimination, (m,), m, include_self=include_self)
    if is_traced(m):
        return reference.features(m, include_self)
    _check_m(m)
    _check.boolean("include_self", include_self)
    if not is_plain(m) and (small.is_small(m) or not is_derived()):
        return reference.features(m, include_self)
    if small.is_small(m):
        return small.Features.apply(m, include_self)
    return autograd.minibatch_discrimination(m, include_self)


def l1_distance(m: Tensor) -> Tensor:
    """L1 distances between all samples of a minibatch, per feature.

    Computes ``d[i, j, b] = sum over c of |m[i, b, c] - m[j, b, c]|``, the distances of Salimans et al., section 3.2.

    Parameters
    ----------
    m : Tensor
        Shape (N, B, C), float32, float64, bfloat16 or float16 (on a CPU by the reference); any layout, any sizes, 0
        included.

    Returns
    -------
    Tensor
        Shape (N, N, B), of m's dtype, contiguous; exactly symmetric in the first two dims, 0 where they are equal.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Differentiable to any order, all by kernels; the derivative of ``|x|`` at 0 is 0, as ``torch.abs`` has it. The
    gradient is ``dL/dm[i] = sum_j (g[i, j] + g[j, i]) sign(m[i] - m[j])``; it does not depend on m except at ties, so
    that the second derivative with respect to m is None, or zeros for few samples. On the CPU, so few samples that
    calls cost more than the arithmetic go to plain torch. Half types are computed in float32. Results have the same
    bits on every run, for any number of threads.

    References
    ----------
    Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen, "Improved Techniques for Training GANs", 2016,
    section 3.2.
    """
    if is_stand_in(m):
        return handle_torch_function(l1_distance, (m,), m)
    _check_m(m)
    if not is_plain(m) and (small.is_small(m) or not is_derived()):
        return reference.distance(m)
    return small.l1_distance(m) if small.is_small(m) else autograd.l1_distance(m)


def _check_m(m: Tensor) -> None:
    _check.floating("m", m)
    _check.ndim("m", m, 3, "(N, B, C)")
