"""Penalties on the norm of a critic's input gradient, with their double backward."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gankern import _compiling, backends, compiler, dispatch
from gankern.compiler.choice import plan_pays
from gankern.ops import _check
from gankern.ops.critic_layers import Chain, Declined
from gankern.ops.gradient_penalty import autograd, small
from gankern.ops.gradient_penalty.autograd import Critic
from gankern.ops.gradient_penalty.choice import choose, stands_alone
from gankern.ops.gradient_penalty.explain import PenaltyExplanation, explain_penalty

__all__ = ["PenaltyExplanation", "check_points", "explain_penalty", "gradient_penalty", "penalty_at", "penalty_points"]


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *inputs: Any,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    alpha: Tensor | None = None,
    generator: torch.Generator | None = None,
    params: Iterable[Tensor] | None = None,
    create_graph: bool = False,
    **critic_kwargs: Any,
) -> Tensor:
    r"""Gradient penalty of WGAN-GP: ``weight * mean_i (||grad_x critic(x_i)||_2 - target)^2``.

    The points are ``x_i = alpha_i * real_i + (1 - alpha_i) * fake_i`` with one uniform alpha a sample; the norm is over
    all dimensions of a sample. One ordinary ``backward()`` of the critic's whole loss works, under torch.compile,
    DistributedDataParallel, autocast and GradScaler too.

    A critic is run by a plan, where one can be made: see the notes. Of torch's own modules one after the other without
    hooks, a plain one, it is run once by gankern's layers on a GPU and where plans are off. Second derivatives are
    taken inside: the result's graph is one first-order node that holds the gradients of the critic's parameters.
    Otherwise the critic is called once, unmodified, and stock autograd makes the graph.
    ``gankern.explain(gankern.gradient_penalty, critic, real, fake)`` tells which, and why.

    Parameters
    ----------
    critic : nn.Module or callable
        Maps a batch (N, ...) to scores of any shape, summed over each sample.
    real, fake : Tensor
        Shape (N, ...) with N >= 1, float32, float64 or bfloat16, of one shape and device; of two dtypes the wider is
        used. Gradients flow to those that require them.
    *inputs, **critic_kwargs
        Handed on: the critic is called as ``critic(x, *inputs, **critic_kwargs)``. Labels, embeddings and masks, in
        nested lists, tuples and dicts too; those that require a gradient get one. A keyword of the critic that has a
        name used here (``weight``, ``alpha``, ...) needs a critic wrapped in a callable, with ``params``.
    weight : float, optional
        The paper's lambda.
    target : float, optional
        Norm that is not penalised, 1 in the paper.
    one_sided : bool, optional
        Penalise only norms above the target: ``max(0, norm - target)^2``.
    alpha : Tensor or None, optional
        One number a sample, shape (N,) or (N, 1, ..., 1); drawn uniformly from [0, 1) on real's device by default.
    generator : torch.Generator or None, optional
        Draws alpha.
    params : iterable of Tensor or None, optional
        Parameters of a critic that is not an ``nn.Module``, at least one; those of a module are found. As in stock,
        all that the critic uses gets its gradient.
    create_graph : bool, optional
        Return stock's differentiable penalty, with a graph of any order.

    Returns
    -------
    Tensor
        Scalar of that dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.
    RuntimeError
        By the backward pass of gankern's node, if it is asked for a graph and ``create_graph`` was False.

    Notes
    -----
    Where stock leaves the gradient of a parameter None, on which the penalty does not depend (a bias at the critic's
    end), so does this; zeros where a wrapper of DistributedDataParallel, which waits for all, is given. At a gradient
    of exactly zero the subgradient is 0. A critic with batch norm couples its samples, so that the norm is not one
    sample's own; it works as in stock PyTorch, and warns once.

    Of a critic in DistributedDataParallel the module inside is run, and DDP reduces the gradients with the rest of the
    loss's. Give the wrapper, not its ``module``, where the penalty is the whole loss or some parameters are unused
    (``find_unused_parameters``): DDP learns from this function that a backward is coming. With ``static_graph``, and
    under torch.compile, the wrapper's own forward must be part of the loss.

    A critic is planned when its first penalty is asked for, and again for each new kind of call: its own code runs once
    on fake tensors under ``make_fx``, and the graph of both orders of derivatives is replayed without autograd as long
    as its guards hold. That takes a second, in which nothing is drawn or written. Where the forward does what no graph
    can say or no guard can check (control flow on values, hooks, attributes that it sets, ``checkpoint``), stock
    autograd runs. ``GANKERN_PLAN=0`` switches plans off, ``gankern.explain`` tells of them.

    A graph of torch.compile holds the penalty of a plain critic as one operator. That of any other breaks the graph:
    what a critic writes and reads in its forward (spectral norm's vectors, batch norm's statistics) is then right.

    For a critic that is piecewise linear between its parameters (convolution, linear, ReLU, LeakyReLU) four passes of
    the size of a forward are made: forward, gradient to the input, tangent forward of d penalty / d gradient, weight
    gradient. See :mod:`gankern.ops.critic_layers`.

    References
    ----------
    Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, equation 3 and algorithm 1; one-sided: section 4.
    """
    points = penalty_points(real, fake, alpha, generator)
    return penalty_at(
        critic,
        points,
        inputs,
        critic_kwargs,
        weight=weight,
        target=target,
        one_sided=one_sided,
        params=params,
        create_graph=create_graph,
    )


backends.register_explainer("gradient_penalty", functools.partial(explain_penalty, gradient_penalty))


def penalty_points(real: Tensor, fake: Tensor, alpha: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Checked ``alpha * real + (1 - alpha) * fake``; see :func:`gradient_penalty`."""
    check_points("real", real)
    check_points("fake", fake)
    _check.same_shape("fake", fake, "real", real)
    _check.same_device("fake", fake, "real", real)
    _check.generator("generator", generator)
    if real.dtype != fake.dtype:
        # Under autocast the fake comes in a half type; as in stock arithmetic, the wider type wins.
        wider = torch.promote_types(real.dtype, fake.dtype)
        real, fake = real.to(wider), fake.to(wider)
    n = real.size(0)
    if alpha is None:
        dtype = torch.float64 if real.dtype == torch.float64 else torch.float32
        alpha = torch.rand(n, dtype=dtype, device=real.device, generator=generator)
    else:
        _check.floating("alpha", alpha)
        _check.same_device("alpha", alpha, "real", real)
        if generator is not None:
            raise ValueError("generator must be None where alpha is given; got a Generator")
        if tuple(alpha.shape) not in ((n,), (n, *[1] * (real.dim() - 1))):
            raise ValueError(f"alpha must have one number a sample, shape ({n},); got {tuple(alpha.shape)}")
    return autograd.interpolate(real, fake, alpha.reshape(n))


def penalty_at(
    critic: Critic,
    points: Tensor,
    inputs: tuple[Any, ...],
    critic_kwargs: dict[str, Any],
    *,
    weight: float,
    target: float = 0.0,
    one_sided: bool = False,
    squared: bool = False,
    params: Iterable[Tensor] | None = None,
    create_graph: bool = False,
) -> Tensor:
    """Penalty at given points: what the whole family is made of.

    Parameters
    ----------
    critic, weight, target, one_sided, params, create_graph
        As in :func:`gradient_penalty`.
    points : Tensor
        Shape (N, ...), where the gradient is taken.
    inputs, critic_kwargs
        Further arguments of the critic.
    squared : bool, optional
        Penalise ``norm^2``, as a sum of squares without a root; target and one_sided play no part.

    Returns
    -------
    Tensor
        Scalar of the points' dtype.
    """
    if not callable(critic):
        raise TypeError(f"critic must be an nn.Module or another callable; got {type(critic).__name__}")
    _check.number("weight", weight)
    _check.number("target", target, low=0)
    _check.boolean("one_sided", one_sided)
    _check.boolean("create_graph", create_graph)
    inner: Any = autograd.inner_module(critic)
    given = trainable(inner, params)
    options = (float(weight), float(target), one_sided, squared)
    alone = params is None and len(inputs) + len(critic_kwargs) == 0 and not create_graph
    whole = alone and isinstance(inner, nn.Module)
    if isinstance(inner, nn.Module):
        _warn_of_batch_norm(inner)
    if torch.compiler.is_compiling():
        handle, reached = autograd.capturable(inner) if whole and _compiling.TAKES_MODULES else (0, [])
        if handle:
            return autograd.penalty(handle, list(inner.parameters()), reached, points, *options)
        # Outside of the graph, which does not see what a critic reads and writes.
        return _out_of_graph(critic, inner, given, points, inputs, critic_kwargs, whole, create_graph, options)
    in_step = compiler.penalty_in_step.get()
    if in_step is not None:
        penalty: Tensor = in_step(critic, points, inputs, critic_kwargs, options)
        return penalty
    return _run(critic, inner, given, points, inputs, critic_kwargs, whole, create_graph, options)


def _run(
    wrapper: Critic,
    critic: Any,
    given: list[Tensor],
    points: Tensor,
    inputs: tuple[Any, ...],
    critic_kwargs: dict[str, Any],
    whole: bool,
    create_graph: bool,
    options: tuple[float, float, bool, bool],
) -> Tensor:
    """Penalty of a critic inside a wrapper; `whole` if nothing but the critic itself is asked for."""
    distributed = autograd.is_distributed(wrapper)
    loss = None
    # Stock's calls are C++ throughout, a plan's and those of gankern's layers Python's.
    plans = compiler.enabled() and not create_graph and backends.requested() != "reference"
    first = plans and plan_pays(points)
    chain = choose(critic, points) if whole and not first and not dispatch.is_small(points) else None
    if isinstance(chain, Chain) and not small.is_small(critic, points, given):
        reached = [True] * (len(chain.params) + 1) if distributed else chain.gets_gradients()
        with contextlib.suppress(Declined):
            loss = autograd.penalty(chain, chain.params, reached, points, *options)
    # A plan is not made while a graph is captured.
    planned = plans and not dispatch.is_small(points, captured=True)
    of_all = loss is not None
    if loss is None and planned and stands_alone(points) is None:
        with contextlib.suppress(compiler.Refused):
            loss = autograd.planned_penalty(critic, points, inputs, critic_kwargs, options)
    if loss is None:
        loss = autograd.stock_penalty(critic, points, inputs, critic_kwargs, *options)
    if distributed and not of_all:
        loss = autograd.reach(loss, given)
    if distributed:
        _expect_gradients(wrapper, loss)
    return loss


_out_of_graph = torch._compile._disable_dynamo(_run)


def _expect_gradients(critic: Critic, loss: Tensor) -> None:
    """Tell DistributedDataParallel that a backward is coming, as its own forward does.

    The penalty's node hands every parameter its gradient from outside DDP's forward, and DDP's hooks reduce it together
    with the rest of the loss's; without this a penalty that is the whole loss would not be reduced.
    """
    if _compiling.is_compiled(critic):
        critic = critic._orig_mod
    if isinstance(critic, DistributedDataParallel) and loss.requires_grad and critic.require_backward_grad_sync:
        # DDP's forward, if it comes later, may not rebuild the buckets any more.
        critic.reducer._rebuild_buckets()
        critic.reducer.prepare_for_backward([loss])


def trainable(critic: Critic, params: Iterable[Tensor] | None) -> list[Tensor]:
    if params is None:
        if not isinstance(critic, nn.Module):
            raise ValueError(
                f"params must be given for a critic that is not an nn.Module; got None for {type(critic).__name__}"
            )
        return [p for p in critic.parameters() if p.requires_grad]
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of Tensors; got {type(params).__name__}")
    params = list(params)
    if not params:
        raise ValueError(
            "params must have at least one Tensor; got none: an iterator, as critic.parameters() is, is empty after "
            "its first use, a list is not"
        )
    for p in params:
        _check.tensor("params", p)
    return [p for p in params if p.requires_grad]


def check_points(name: str, value: Any) -> None:
    """Refuse what is not a batch of at least one sample."""
    _check.floating(name, value)
    if value.dim() < 1 or value.size(0) < 1:
        raise ValueError(f"{name} must have shape (N, ...) with N >= 1; got {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must have at least one value a sample; got shape {tuple(value.shape)}")


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "the critic has batch norm in training mode, which couples the samples of a batch: the gradient penalty is "
        "then not on one sample's own gradient norm (Gulrajani et al. 2017, section 4, use layer norm instead)",
        stacklevel=5,
    )


# Dynamo looks through functools.cache, and then cannot trace a warning.
@_compiling.constant
def _warn() -> None:
    _warn_once()


def _warn_of_batch_norm(critic: nn.Module) -> None:
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in critic.modules()):
        _warn()
