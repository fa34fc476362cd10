"""Batch norm + activation with the statistics of all ranks of a process group, as ``torch.nn.SyncBatchNorm`` has them.

Each pass is the local kernel and one collective of 2 * C + 1 (forward) or 2 * C (backward) values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gankern import _autograd, _native, backends
from gankern._layout import dense
from gankern.ops.conv_transpose_bn_act import autograd, reference


class _AllReduce(torch.autograd.Function):
    """Sum over the ranks. The gradient of a sum that every rank reads is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad_output, ctx.group), None


def _statistics(input: Tensor, group: Any) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel over all ranks, in float64, and the number of values a channel.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979: sums of
    squares around each rank's own mean, moved to the common one.
    """
    channels = input.size(1)
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64, device=input.device)
    if input.numel():
        mean, _, var = backends.select("batch_norm_act", input).statistics(input, 0.0)
        mine[:channels], mine[channels:-1], mine[-1] = mean, var, input.numel() // channels
    ranks = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(ranks, mine, group=group)

    # Every rank adds up in the same order: the same bits everywhere.
    table = torch.stack(ranks)
    means, variances, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, var, int(counts.sum())


def _shared_statistics(input: Tensor, mean: Tensor, eps: float, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) over all ranks as functions of the input, for second derivatives."""
    wide, dims = input.to(mean.dtype), reference._reduced(input)
    # Around the known mean, so that large ones lose no digits.
    offset = (wide - reference._channels(mean, input)).sum(dims)
    mean = mean + _AllReduce.apply(offset, group) / count
    squares = (wide - reference._channels(mean, input)).square().sum(dims)
    return mean, (_AllReduce.apply(squares, group) / count + eps).rsqrt()


class _Normalise(torch.autograd.Function):
    """Normalisation with given statistics of all ranks, differentiated as what they are: functions of the input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        count: int,
        group: Any,
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        output: Tensor = autograd._eval_op(
            dense(input), autograd._acc(weight, input), bias, mean, invstd, activation, negative_slope
        )
        kept = [output] if activation in _autograd.BY_OUTPUT else []
        ctx.save_for_backward(input, weight, bias, mean, invstd, *kept)
        ctx.args = eps, count, group, activation, negative_slope
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, invstd, *output = ctx.saved_tensors
        eps, count, group, *act = ctx.args
        grad_output, activation, negative_slope = autograd.by_output(grad_output, output, *act)
        input, weight = dense(input), autograd._acc(weight, input)
        again = torch.is_grad_enabled()
        if again and ctx.needs_input_grad[0]:
            mean, invstd = _shared_statistics(input, mean, eps, count, group)
        run = reference.backward if again else autograd._backward_op
        # With constant statistics: scale * dz, and this rank's sums of dz * xhat and dz.
        grad_input, grad_weight, grad_bias = run(
            grad_output, input, weight, bias, mean, invstd, False, activation, negative_slope
        )
        if ctx.needs_input_grad[0]:
            scale = invstd if weight is None else invstd * weight
            # An empty rank takes part as well: the others wait for it.
            sums = _AllReduce.apply(torch.cat([grad_weight, grad_bias]), group) / max(count, 1)
            mean_dz_xhat, mean_dz = sums.chunk(2)
            centred = input.to(mean.dtype) - reference._channels(mean, input)
            # scale * (dz - mean(dz) - xhat * mean(dz * xhat)): Ioffe and Szegedy 2015, section 3.
            grad_input = (
                grad_input.to(mean.dtype)
                .sub_(reference._channels(scale * mean_dz, input))
                .addcmul_(centred, reference._channels(scale * invstd * mean_dz_xhat, input), value=-1)
                .to(input.dtype)
            )
        grads = autograd._wanted((grad_input, grad_weight, grad_bias), weight, bias)
        return (*grads, None, None, None, None, None, None, None)


@torch.compiler.disable(reason="gankern's batch norm with a process_group communicates outside the graph")
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    group: Any,
) -> Tensor:
    """Training mode of ``batch_norm_act`` over all ranks of a group, each of which has to call it.

    Parameters
    ----------
    input : Tensor
        Shape (N, C, *) on this rank; N may differ between ranks and be 0.
    running_mean, running_var, weight, bias : Tensor or None
        Shape (C,).
    momentum, eps, activation, negative_slope
        As in the public op.
    group : torch.distributed.ProcessGroup
        Of more than one rank.

    Returns
    -------
    Tensor
        Of the input's shape, dtype and memory format.

    Raises
    ------
    ValueError
        On every rank, if there is one value a channel over all of them.

    References
    ----------
    Ioffe and Szegedy 2015, algorithms 1 and 2; ``torch.nn.SyncBatchNorm``.
    """
    acc = _native.acc_dtype(input.dtype)
    bias = autograd._acc(bias, input, copy=True)
    with torch.no_grad():
        mean, var, count = _statistics(dense(input), group)
        if count == 1:
            raise ValueError(
                "input must have more than 1 value per channel over all ranks when training; "
                f"got {tuple(input.shape)} on this rank"
            )
        if running_mean is not None and running_var is not None and count:
            reference.update(running_mean, mean, momentum)
            reference.update(running_var, var * (count / (count - 1)), momentum)
        invstd = (var + eps).rsqrt().to(acc)
        mean = mean.to(acc)
    return _Normalise.apply(input, weight, bias, mean, invstd, eps, count, group, activation, negative_slope)
