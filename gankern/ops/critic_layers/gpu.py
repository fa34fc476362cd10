"""What the adapters of the GPU leave to torch: convolutions, and what is elementwise, in place where nobody sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.ops.conv_act import reference
from gankern.ops.conv_act.reference import ConvOptions

#: In place, ReLU or LeakyReLU by its slope of (N, C, ...), contiguous or with the channels last, with a bias (C,).
BiasAct = Callable[[Tensor, Tensor, float], None]


def is_last(tensor: Tensor) -> bool:
    """Whether the channels of (N, C, ...) are dense and last in memory; false where that is contiguous as well."""
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def convolution(bias_act: BiasAct) -> Callable[..., Tensor]:
    """The convolution of an adapter: cuDNN adds a bias in a pass of its own, which the activation is part of here."""

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions,
        activation: str = "none",
        negative_slope: float = 0.0,
    ) -> Tensor:
        if activation not in ("relu", "leaky_relu"):
            return reference.conv(input, weight, bias, options, activation, negative_slope)
        slope = negative_slope if activation == "leaky_relu" else 0.0
        # Kernels for groups may add the bias first, and then do not round in between.
        later = bias is not None and options.groups == 1 and bias.dtype == weight.dtype
        output = reference.conv(input, weight, None if later else bias, options)
        if bias is not None and later and (output.is_contiguous() or is_last(output)):
            bias_act(output, bias.contiguous(), slope)
            return output
        if bias is not None and later:
            output += bias.view(-1, *[1] * (output.dim() - 2))
        return F.leaky_relu_(output, slope) if slope else F.relu_(output)

    return conv


def conv_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """Gradient of what an activation made the input of; without one, of the input, only whose shape and dtype count."""
    grad = reference.conv_input_grad(grad_output, weight, input, options)
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, input, 0, grad_input=grad)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward.grad_input(grad, input, negative_slope, True, grad_input=grad)
    return reference.activate_backward(grad, input, activation, negative_slope)
