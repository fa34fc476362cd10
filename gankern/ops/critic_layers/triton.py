"""Triton kernels of the critic layers; convolutions and what is elementwise are torch's."""

from __future__ import annotations

from gankern._triton import refuse
from gankern.ops.critic_layers.norms import functions
from gankern.ops.critic_layers.reference import (
    add,
    avg_pool2d,
    avg_pool2d_backward,
    channels_last,
    conv,
    conv_as_stock,
    conv_input_grad,
    conv_weight_grad,
    leaky_relu,
    leaky_relu_backward,
    like_layout,
    room,
)
from gankern.ops.critic_layers.triton_norms import COMPILED, TritonNorms

__all__ = [
    "COMPILED",
    "add",
    "avg_pool2d",
    "avg_pool2d_backward",
    "channels_last",
    "conv",
    "conv_as_stock",
    "conv_input_grad",
    "conv_weight_grad",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_forward",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "layer_norm_forward",
    "leaky_relu",
    "leaky_relu_backward",
    "like_layout",
    "refuse",
    "room",
]

(
    layer_norm_forward,
    layer_norm_backward,
    layer_norm_double_backward,
    group_norm_forward,
    group_norm_backward,
    group_norm_double_backward,
) = functions(TritonNorms())
