"""Operations of gankern's operators and kernels, as torch counts those of its own: products and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

import gankern.ops  # noqa: F401  registers the operators

Shape = Sequence[int]


def _convolutions(
    inputs: Sequence[Shape], outputs: Sequence[Shape], weights: Sequence[Shape], geometry: Sequence[int]
) -> list[int]:
    transposed = geometry[8::9]
    return [
        conv_flop_count(list(x), list(w), list(y), bool(t))
        for x, y, w, t in zip(inputs, outputs, weights, transposed, strict=True)
    ]


@register_flop_formula(torch.ops.gankern.conv2d_acts)
def conv2d_acts_flops(
    input: Shape, weights: Sequence[Shape], biases: Any, geometry: Sequence[int], *args: Any, out_shape: Sequence[Shape]
) -> int:
    return sum(_convolutions([input, *out_shape[:-1]], out_shape, weights, geometry))


@register_flop_formula(torch.ops.gankern.conv2d_acts_backward)
def conv2d_acts_backward_flops(
    grad_output: Shape,
    input: Shape,
    outputs: Sequence[Shape],
    weights: Sequence[Shape],
    geometry: Sequence[int],
    activations: Any,
    negative_slopes: Any,
    want_input: bool,
    want_weights: Sequence[bool],
    want_biases: Sequence[bool],
    out_shape: Any = None,
) -> int:
    flops = _convolutions([input, *outputs[:-1]], outputs, weights, geometry)
    wanted = [weight or bias for weight, bias in zip(want_weights, want_biases, strict=True)]
    # The gradient goes down as far as something below asks for it.
    passes = [want + (want_input or any(wanted[:i])) for i, want in enumerate(want_weights)]
    return sum(count * each for count, each in zip(passes, flops, strict=True))


def _forward(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, options: Any, *_: Any) -> int:
    return conv_flop_count(list(input.shape), list(weight.shape), list(output.shape), options.transposed)


def _input_grad(grad_input: Tensor, grad_output: Tensor, weight: Tensor, input: Tensor, options: Any, *_: Any) -> int:
    return _forward(grad_output, input, weight, None, options)


def _weight_grad(grad_weight: Tensor, grad_output: Tensor, input: Tensor, weight: Tensor, options: Any) -> int:
    return _forward(grad_output, input, weight, None, options)


#: By name of an adapter's function in the critic layers: operations by its output and arguments.
KERNEL_FLOPS: dict[str, Callable[..., int]] = {
    "conv": _forward,
    "conv_as_stock": _forward,
    "conv_input_grad": _input_grad,
    "conv_weight_grad": _weight_grad,
}
