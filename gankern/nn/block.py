"""One block of stock modules, run as one op: shared by the modules and by fuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as calls

from gankern.ops.conv_act import conv2d_acts
from gankern.ops.conv_act.reference import ConvOptions, Layer, activate
from gankern.ops.conv_transpose_bn_act import batch_norm_act, conv2d_bn_act, conv_transpose2d_bn_act

Conv = nn.Conv2d | nn.ConvTranspose2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches the module's own calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether someone watches the calls of all modules, as ``register_module_forward_hook`` lets them."""
    return bool(
        calls._global_forward_hooks
        or calls._global_forward_pre_hooks
        or calls._global_backward_hooks
        or calls._global_backward_pre_hooks
    )


def refusal(conv: nn.Module | None, bn: nn.Module | None) -> str | None:
    """Why a convolution and a batch norm, or one of them, cannot run as one op; None if they can."""
    if bn is not None and type(bn) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return f"{type(bn).__name__} is not a plain batch norm"
    if conv is not None:
        if type(conv) not in (nn.Conv2d, nn.ConvTranspose2d):
            return f"{type(conv).__name__} is not a plain 2-d convolution"
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"padding {conv.padding!r} with padding_mode {conv.padding_mode!r} is not supported"
        if bn is None:
            if conv.groups != 1:
                return f"{conv.groups} groups have no kernel"
        elif type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or bn.num_features != conv.out_channels:
            return f"the batch norm does not fit {conv.out_channels} channels"
    if has_global_hooks():
        return "a hook on all modules"
    for module in (conv, bn):
        if module is None:
            continue
        if has_hooks(module):
            return f"a hook on {type(module).__name__}"
        if module.__dict__.get("forward") is not None:
            return f"{type(module).__name__} has a forward of its own"
    return None


def layer(conv: Conv, activation: str, negative_slope: float) -> Layer:
    """What a convolution without a batch norm, and its activation, are to the op."""
    transposed, output_padding = isinstance(conv, nn.ConvTranspose2d), (0, 0)
    if isinstance(conv, nn.ConvTranspose2d):
        output_padding = conv.output_padding  # type: ignore[assignment]
    padding: Any = conv.padding
    options = ConvOptions(conv.stride, padding, conv.dilation, transposed, output_padding, conv.groups)
    return Layer(conv.weight, conv.bias, options, activation, negative_slope)


def run_block(input: Tensor, conv: Conv | None, bn: Norm | None, activation: str, negative_slope: float) -> Tensor:
    """Run ``activation(bn(conv(input)))`` as one op; module by module where that would not mean the same."""
    if refusal(conv, bn) is not None or (conv is not None and input.dim() != 4):
        output = input if conv is None else conv(input)
        return activate(output if bn is None else bn(output), activation, negative_slope)
    if bn is None:
        assert conv is not None
        return conv2d_acts(input, [layer(conv, activation, negative_slope)])
    training = bn.training or bn.running_mean is None
    momentum = _update_count(bn)
    # Running statistics are updated only in training mode, as in torch.nn.
    updates = not training or (bn.training and bn.track_running_stats)
    mean, var = (bn.running_mean, bn.running_var) if updates else (None, None)
    options: dict[str, Any] = {
        "training": training,
        "momentum": momentum,
        "eps": bn.eps,
        "activation": activation,
        "negative_slope": negative_slope,
        "process_group": _process_group(bn),
    }
    if conv is None:
        return batch_norm_act(input, mean, var, bn.weight, bn.bias, **options)
    options |= {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups, "dilation": conv.dilation}
    tensors = (input, conv.weight, conv.bias, mean, var, bn.weight, bn.bias)
    if isinstance(conv, nn.ConvTranspose2d):
        return conv_transpose2d_bn_act(*tensors, output_padding=conv.output_padding, **options)  # type: ignore[arg-type]
    return conv2d_bn_act(*tensors, **options)


def _update_count(bn: Norm) -> float:
    """Counts the batch as torch.nn does; the weight of this batch in the running statistics."""
    if not (bn.training and bn.track_running_stats and bn.num_batches_tracked is not None):
        return 0.0 if bn.momentum is None else bn.momentum
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
    return 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum


def _process_group(bn: Norm) -> Any:
    """The ranks that share statistics: as in torch.nn, those of a SyncBatchNorm in training mode."""
    shares = type(bn) is nn.SyncBatchNorm and bn.training and dist.is_available() and dist.is_initialized()
    if not shares:
        return None
    return dist.group.WORLD if bn.process_group is None else bn.process_group
