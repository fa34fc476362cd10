"""The ops, one room each; importing this registers all of them."""

from gankern.ops import critic_layers as critic_layers
from gankern.ops import gradient_penalty as gradient_penalty
from gankern.ops import weight_clip as weight_clip
from gankern.ops.conv_act import conv2d_act
from gankern.ops.conv_transpose_bn_act import batch_norm_act, conv2d_bn_act, conv_transpose2d_bn_act
from gankern.ops.minibatch_discrimination import l1_distance, minibatch_discrimination
from gankern.ops.minibatch_stddev import minibatch_stddev

__all__ = [
    "batch_norm_act",
    "conv2d_act",
    "conv2d_bn_act",
    "conv_transpose2d_bn_act",
    "l1_distance",
    "minibatch_discrimination",
    "minibatch_stddev",
]
