"""One block of stock modules, run as one op: shared by the modules and by fuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gankern import dispatch
from gankern.nn import guard
from gankern.ops.conv_act.reference import ConvOptions, Layer, activate
from gankern.ops.conv_transpose_bn_act import batch_norm_act, conv2d_bn_act, conv_transpose2d_bn_act

Conv = nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches the module's own calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def options(conv: Conv) -> ConvOptions:
    """A convolution's geometry."""
    transposed, output_padding = isinstance(conv, nn.ConvTranspose2d), (0, 0)
    if isinstance(conv, nn.ConvTranspose2d):
        output_padding = conv.output_padding  # type: ignore[assignment]
    padding: Any = conv.padding
    return ConvOptions(conv.stride, padding, conv.dilation, transposed, output_padding, conv.groups)


def layer(conv: Conv, activation: str, negative_slope: float) -> Layer:
    """What a convolution without a batch norm, and its activation, are to the op."""
    return Layer(conv.weight, conv.bias, options(conv), activation, negative_slope)


def refusal(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why a block runs module by module."""
    return guard.state_refusal() or guard.refusal(conv) or guard.refusal(bn)


def run_block(input: Tensor, conv: Conv, bn: Norm, activation: str, negative_slope: float) -> Tensor:
    """Run ``activation(bn(conv(input)))`` as one op; module by module where that would not mean the same."""
    as_stock = torch.compiler.is_compiling() or (isinstance(input, Tensor) and dispatch.is_small(input))
    if as_stock or refusal(conv, bn) is not None or input.dim() != 4:
        return activate(bn(conv(input)), activation, negative_slope)
    return run_fused(input, conv, bn, activation, negative_slope)


def run_fused(input: Tensor, conv: Conv | None, bn: Norm, activation: str, negative_slope: float) -> Tensor:
    """Run a batch norm and what stands around it as one op."""
    training = bn.training or bn.running_mean is None
    momentum = _update_count(bn)
    # Running statistics are updated only in training mode, as in torch.nn.
    updates = not training or (bn.training and bn.track_running_stats)
    mean, var = (bn.running_mean, bn.running_var) if updates else (None, None)
    arguments: dict[str, Any] = {
        "training": training,
        "momentum": momentum,
        "eps": bn.eps,
        "activation": activation,
        "negative_slope": negative_slope,
        "process_group": group_of(bn),
    }
    if conv is None:
        return batch_norm_act(input, mean, var, bn.weight, bn.bias, **arguments)
    arguments |= {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups, "dilation": conv.dilation}
    tensors = (input, conv.weight, conv.bias, mean, var, bn.weight, bn.bias)
    if isinstance(conv, nn.ConvTranspose2d):
        return conv_transpose2d_bn_act(*tensors, output_padding=conv.output_padding, **arguments)  # type: ignore[arg-type]
    return conv2d_bn_act(*tensors, **arguments)


def _update_count(bn: Norm) -> float:
    """Counts the batch as torch.nn does; the weight of this batch in the running statistics."""
    if not (bn.training and bn.track_running_stats and bn.num_batches_tracked is not None):
        return 0.0 if bn.momentum is None else bn.momentum
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
    return 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum


def group_of(bn: Norm) -> Any:
    """The ranks that share statistics: as in torch.nn, those of a SyncBatchNorm in training mode."""
    shares = isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()
    if not shares:
        return None
    return dist.group.WORLD if bn.process_group is None else bn.process_group
