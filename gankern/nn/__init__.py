"""Modules made of the ops."""

from gankern.nn.conv_bn_act import ConvBnAct2d, ConvTransposeBnAct2d
from gankern.nn.minibatch_discrimination import MinibatchDiscrimination
from gankern.nn.minibatch_stddev import MinibatchStdDev

__all__ = ["ConvBnAct2d", "ConvTransposeBnAct2d", "MinibatchDiscrimination", "MinibatchStdDev"]
