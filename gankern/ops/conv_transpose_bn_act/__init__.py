"""Transposed convolution (or convolution) + batch norm + activation: the DCGAN blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gankern import _native, backends, dispatch
from gankern._autograd import casts, is_plain, is_recorded, is_traced
from gankern.ops import _check
from gankern.ops.conv_act import padded
from gankern.ops.conv_transpose_bn_act import autograd, reference
from gankern.ops.conv_transpose_bn_act.convolution import Convolution, affine, explain_block, folds, normalised

__all__ = ["batch_norm_act", "conv2d_bn_act", "conv_transpose2d_bn_act"]

for _op, _transposed in (("conv_transpose2d_bn_act", True), ("conv2d_bn_act", False)):
    backends.register_explainer(_op, partial(explain_block, _transposed))

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Size2 = int | tuple[int, int]


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Batch normalisation followed by an activation, in one op.

    Computes ``act((x - mean) / sqrt(var + eps) * weight + bias)`` per channel: two passes over memory forward
    (statistics; normalise and activate), two backward, with the activation's derivative recomputed from the input.

    Parameters
    ----------
    input : Tensor
        Shape (N, C, *), float32, float64, bfloat16 or float16 (on the CPU by the reference); any layout. channels_last
        stays so.
    running_mean, running_var : Tensor or None
        Shape (C,). Updated in place when training as ``torch.nn.functional.batch_norm`` does (unbiased variance); used
        instead of the batch's statistics otherwise. With None the batch's statistics are used in either mode.
    weight, bias : Tensor or None, optional
        Shape (C,), of the input's dtype or float32.
    training : bool
        Whether to normalise with the statistics of this batch.
    momentum : float, optional
        Weight of this batch in the running statistics: any number, as in stock.
    eps : float, optional
        Added to the variance.
    activation : {"relu", "leaky_relu", "tanh", "none"}, optional
    negative_slope : float, optional
        Slope of leaky_relu below zero.
    process_group : torch.distributed.ProcessGroup, optional
        Train with the statistics of all its ranks, as ``torch.nn.SyncBatchNorm`` does: each rank calls with its part of
        the batch, whose size may differ and be 0. Running statistics come out equal on all ranks; gradients of weight
        and bias are this rank's, for DistributedDataParallel to average. None: this rank's statistics.

    Returns
    -------
    Tensor
        Of the input's shape, dtype and memory format.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received. As in stock, training with one value a channel is refused
        (one over all ranks, where there is a process group).

    Notes
    -----
    Differentiable to any order: first derivatives are kernels, higher ones plain torch; the third ones too are those of
    statistics that depend on the input, which stock's take for constants. Statistics and reductions of
    bfloat16 and float16 inputs are in float32; sums are shifted by a mean of the channel and carried in float64, on
    GPUs from block to block. Results have the same bits on every run, for any number of threads. With a process group
    every derivative communicates, so all ranks have to take the same ones; torch.compile leaves the graph for it.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2 and the gradients of section 3.
    """
    if is_traced(input) and process_group is None:
        uses_batch = training or running_mean is None
        statistics: dict[str, Any] = {"training": uses_batch, "momentum": momentum, "eps": eps}
        act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
        return reference.batch_norm_act(input, running_mean, running_var, weight, bias, **statistics, **act)
    _check.floating("input", input)
    if input.dim() < 2:
        raise ValueError(f"input must have shape (N, C, ...); got {tuple(input.shape)}")
    _check_norm(input.size(1), input, running_mean, running_var, weight, bias, "weight", "bias")
    options = _check_options(training, momentum, eps, activation, negative_slope)
    group = _group_of(process_group, training)
    if group is None:
        _check_statistics(input.shape, training, running_mean, running_var)
    return _norm(input, running_mean, running_var, weight, bias, training, *options, group)


def conv_transpose2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Transposed convolution, batch normalisation and activation: the DCGAN generator block.

    Parameters
    ----------
    input : Tensor
        Shape (N, C_in, H, W), float32, float64 or bfloat16; contiguous or channels_last is kept, other layouts work.
    weight : Tensor
        Shape (C_in, C_out // groups, kH, kW), of the input's dtype.
    bias : Tensor or None
        Shape (C_out,): the convolution's own.
    running_mean, running_var, bn_weight, bn_bias : Tensor or None
        Shape (C_out,): as in :func:`batch_norm_act`.
    stride, padding, output_padding, groups, dilation
        As in :func:`torch.nn.functional.conv_transpose2d`.
    training, momentum, eps, activation, negative_slope, process_group
        As in :func:`batch_norm_act`.

    Returns
    -------
    Tensor
        Shape (N, C_out, H_out, W_out).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Differentiable to any order. In eval mode without gradients the normalisation is folded into the convolution's
    weight and bias.

    References
    ----------
    Radford, Metz and Chintala, "Unsupervised Representation Learning with DCGANs", 2016, section 3.
    """
    if is_traced(input) and process_group is None:
        output = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
        statistics: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps}
        act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
        return batch_norm_act(output, running_mean, running_var, bn_weight, bn_bias, **statistics, **act)
    _check_conv(input, weight, bias, groups, transposed=True)
    _check_norm(weight.size(1) * groups, input, running_mean, running_var, bn_weight, bn_bias, "bn_weight", "bn_bias")
    options = _check_options(training, momentum, eps, activation, negative_slope)
    stride, padding, dilation = _pair("stride", stride, 1), _pair("padding", padding), _pair("dilation", dilation, 1)
    output_padding = _pair("output_padding", output_padding)
    size = [
        (i - 1) * s - 2 * p + d * (k - 1) + o + 1
        for i, k, s, p, d, o in zip(
            input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
        )
    ]
    rule = None
    if any(o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        rule = f"output_padding must be smaller than stride or dilation; got {output_padding} with stride {stride} and "
        rule += f"dilation {dilation}"
    elif min(size) < 1:
        rule = f"input must be large enough for the convolution; got an output of {size[0]} x {size[1]}"
    group = _group_of(process_group, training)
    if group is None and min(size) > 0:
        _check_statistics((input.size(0), weight.size(1) * groups, *size), training, running_mean, running_var)

    conv = Convolution(True, stride, padding, output_padding, dilation, groups)
    if rule is not None:
        # There are such calls that stock runs: torch's kernels differ in it.
        try:
            output = conv.by_torch(input, weight, bias)
        except RuntimeError as error:
            raise ValueError(rule) from error
        return _norm(output, running_mean, running_var, bn_weight, bn_bias, training, *options, group)
    return _block(
        conv,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        *options,
        group,
    )


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.2,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Convolution, batch normalisation and activation: the DCGAN discriminator block.

    Parameters
    ----------
    input : Tensor
        Shape (N, C_in, H, W), float32, float64 or bfloat16.
    weight : Tensor
        Shape (C_out, C_in // groups, kH, kW), of the input's dtype.
    bias : Tensor or None
        Shape (C_out,): the convolution's own.
    running_mean, running_var, bn_weight, bn_bias : Tensor or None
        Shape (C_out,): as in :func:`batch_norm_act`.
    stride, padding, groups, dilation
        As in :func:`torch.nn.functional.conv2d`; padding "same" and "valid" too.
    training, momentum, eps, activation, negative_slope, process_group
        As in :func:`batch_norm_act`.

    Returns
    -------
    Tensor
        Shape (N, C_out, H_out, W_out).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Differentiable to any order. In eval mode without gradients the normalisation is folded into the convolution's
    weight and bias.

    References
    ----------
    Radford, Metz and Chintala, "Unsupervised Representation Learning with DCGANs", 2016, section 3.
    """
    if is_traced(input) and process_group is None:
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        statistics: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps}
        act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
        return batch_norm_act(output, running_mean, running_var, bn_weight, bn_bias, **statistics, **act)
    _check_conv(input, weight, bias, groups, transposed=False)
    _check_norm(weight.size(0), input, running_mean, running_var, bn_weight, bn_bias, "bn_weight", "bn_bias")
    options = _check_options(training, momentum, eps, activation, negative_slope)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    input, padding = padded(input, padding, weight, stride, dilation)
    size = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, k, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    _check_output_size(size)
    group = _group_of(process_group, training)
    if group is None:
        _check_statistics((input.size(0), weight.size(0), *size), training, running_mean, running_var)

    conv = Convolution(False, stride, padding, (0, 0), dilation, groups)
    return _block(
        conv,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        *options,
        group,
    )


def _block(
    conv: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    group: Any,
) -> Tensor:
    if group is None and dispatch.is_small(input, weight):
        output = conv.by_torch(input, weight, bias)
        tensors = (output, running_mean, running_var, bn_weight, bn_bias)
        if output.nbytes >= dispatch.FEW_BYTES:
            return _norm(*tensors, training, momentum, eps, activation, negative_slope, group)
        statistics: dict[str, Any] = {"training": training or running_mean is None, "momentum": momentum, "eps": eps}
        return reference.batch_norm_act(*tensors, **statistics, activation=activation, negative_slope=negative_slope)
    given = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
    constant = not (training or is_recorded(*given) or running_mean is None or running_var is None)
    if constant and is_plain(*given) and folds(input) and not conv.is_product(input):
        assert running_mean is not None and running_var is not None
        scale, shift = affine(bias, running_mean, running_var, bn_weight, bn_bias, eps)
        return normalised(conv, input, weight, scale, shift, activation, negative_slope)
    vectors, sums = (running_mean, running_var, bn_weight, bn_bias), None
    if group is None and (training or running_mean is None):
        output, sums = conv.with_statistics(input, weight, bias)
    else:
        output = conv(input, weight, bias)
    return _norm(output, *vectors, training, momentum, eps, activation, negative_slope, group, sums)


def _norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    group: Any,
    sums: Tensor | None = None,
) -> Tensor:
    tensors = (input, running_mean, running_var, weight, bias)
    if group is None:
        return autograd.batch_norm_act(*tensors, training, momentum, eps, activation, negative_slope, sums)
    # Its import is torch.compile's, which takes longer than torch's own.
    from gankern.ops.conv_transpose_bn_act import distributed

    return distributed.batch_norm_act(*tensors, momentum, eps, activation, negative_slope, group)


def _group_of(process_group: Any, training: bool) -> Any:
    """The group to share statistics with; None where this rank's are all there is."""
    if process_group is None:
        return None
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None; got {type(process_group).__name__}"
        )
    return process_group if training and process_group.size() > 1 else None


def _pair(name: str, value: Size2, least: int = 0) -> tuple[int, int]:
    return _check.int_pair(name, value, least)


def _check_conv(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, *, transposed: bool) -> None:
    _check.floating("input", input)
    _check.ndim("input", input, 4, "(N, C_in, H, W)")
    if 0 in input.shape[1:]:
        raise ValueError(f"input must have at least one channel and pixel; got {tuple(input.shape)}")
    _check.floating("weight", weight)
    form = "(C_in, C_out // groups, kH, kW)" if transposed else "(C_out, C_in // groups, kH, kW)"
    _check.ndim("weight", weight, 4, form)
    _check.positive_int("groups", groups)
    # Under autocast the convolution casts both.
    if weight.dtype != input.dtype and not casts(input):
        raise TypeError(f"weight must have input's dtype {input.dtype}; got {weight.dtype}")
    _check.same_device("weight", weight, "input", input)
    channels_in = weight.size(0) if transposed else weight.size(1) * groups
    if input.size(1) != channels_in or weight.size(0) % groups:
        raise ValueError(
            f"weight must have shape {form} for an input with C_in = {input.size(1)} and groups = {groups}; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check.vector("bias", bias, weight.size(1) * groups if transposed else weight.size(0))
        _check.same_device("bias", bias, "input", input)


def _check_norm(
    channels: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_name: str,
    bias_name: str,
) -> None:
    named = {"running_mean": running_mean, "running_var": running_var, weight_name: weight, bias_name: bias}
    for name, tensor in named.items():
        if tensor is not None:
            _check.vector(name, tensor, channels)
            _check.same_device(name, tensor, "input", input)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} must be given where the other running statistic is; got None")


def _check_options(
    training: bool, momentum: float, eps: float, activation: str, negative_slope: float
) -> tuple[float, float, str, float]:
    """All but the first, the numbers as such."""
    _check.boolean("training", training)
    momentum = _check.number("momentum", momentum, finite=False)
    eps = _check.number("eps", eps, low=0, finite=False)
    _check.one_of("activation", activation, tuple(_native.ACTIVATIONS))
    return momentum, eps, activation, _check.number("negative_slope", negative_slope, finite=False)


def _check_output_size(size: list[int]) -> None:
    if min(size) < 1:
        raise ValueError(f"input must be large enough for the convolution; got an output of {size[0]} x {size[1]}")


def _check_statistics(
    shape: tuple[int, ...] | torch.Size, training: bool, running_mean: Tensor | None, running_var: Tensor | None
) -> None:
    """Batch statistics need two values a channel, as in stock."""
    values = shape[0]
    for size in shape[2:]:
        values *= size
    uses_batch = training or running_mean is None or running_var is None
    if uses_batch and values == 1:
        raise ValueError(f"input must have more than 1 value per channel when training; got {tuple(shape)}")
