"""The ops, one room each."""

from gankern.ops.conv_transpose_bn_act import batch_norm_act, conv2d_bn_act, conv_transpose2d_bn_act

__all__ = ["batch_norm_act", "conv2d_bn_act", "conv_transpose2d_bn_act"]
