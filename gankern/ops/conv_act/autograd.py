"""Operators and derivatives of convolutions + activations, one after the other.

In a row they are one node of the graph: each input's gradient is multiplied by the derivative of the activation before
it on its way to memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gankern import _autograd, _cuda, _library, _triton, backends
from gankern._layout import autocast, like_layout, memory_format
from gankern.ops.conv_act import cpu, reference
from gankern.ops.conv_act.reference import ConvOptions, Layer

backends.register(
    "conv2d_act",
    cpu=cpu,
    reference=reference,
    triton=_triton.adapter("gankern.ops.conv_act.triton"),
    cuda=_cuda.adapter("gankern.ops.conv_act.cuda"),
)


def _kernels(input: Tensor) -> Any:
    """The adapter that runs a call; usually found without asking each."""
    usual = input.device.type == "cpu" and backends.requested() in ("auto", "cpu")
    return cpu if usual else backends.select("conv2d_act", input)


def _geometry(layers: Sequence[Layer]) -> list[int]:
    """Nine numbers of each layer: stride, padding, dilation, output padding, and whether it is transposed."""
    return [
        size
        for _, _, (stride, padding, dilation, transposed, output_padding, _), *_ in layers
        for size in (*stride, *padding, *dilation, *output_padding, transposed)
    ]


def _options(geometry: Sequence[int]) -> list[ConvOptions]:
    rows = [geometry[i : i + 9] for i in range(0, len(geometry), 9)]
    return [ConvOptions((r[0], r[1]), (r[2], r[3]), (r[4], r[5]), bool(r[8]), (r[6], r[7]), 1) for r in rows]


def _forward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    geometry: Sequence[int],
    activations: Sequence[str],
    negative_slopes: Sequence[float],
) -> list[Tensor]:
    outputs = []
    kernels = _kernels(input)
    layers = map(Layer, weights, biases, _options(geometry), activations, negative_slopes)
    for layer in layers:
        # There are no bits of stock's to keep in channels_last, where it sums up in an order of its own.
        stock = memory_format(layer.weight) == torch.contiguous_format and not layer.options.transposed
        conv = kernels.conv_as_stock if stock else kernels.conv
        input = kernels.channels_last(conv(input, *layer))
        outputs.append(input)
    return outputs


def _forward_fake(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    geometry: Sequence[int],
    activations: Sequence[str],
    negative_slopes: Sequence[float],
) -> list[Tensor]:
    outputs = []
    for weight, options in zip(weights, _options(geometry), strict=True):
        shape = reference.conv_shape(input.shape, weight.shape, options)
        input = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        outputs.append(input)
    return outputs


def _backward(
    grad_output: Tensor,
    input: Tensor,
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    geometry: Sequence[int],
    activations: Sequence[str],
    negative_slopes: Sequence[float],
    want_input: bool,
    want_weights: Sequence[bool],
    want_biases: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_weights, grad_biases = [], []
    inputs = [input, *outputs[:-1]]
    kernels = _kernels(input)
    last = activations[-1], negative_slopes[-1]
    grad = kernels.activate_backward(kernels.channels_last(grad_output), outputs[-1], *last)
    options = _options(geometry)
    for i in reversed(range(len(weights))):
        if want_weights[i]:
            grad_weights.append(kernels.conv_weight_grad(grad, inputs[i], weights[i], options[i]))
        if want_biases[i]:
            grad_biases.append(grad.sum((0, 2, 3), dtype=weights[i].dtype))
        if not (want_input or any(want_weights[:i]) or any(want_biases[:i])):
            break
        before = (activations[i - 1], negative_slopes[i - 1]) if i > 0 else ()
        grad = kernels.channels_last(kernels.conv_input_grad(grad, weights[i], inputs[i], options[i], *before))
    return grad if want_input else input.new_empty(0), grad_weights[::-1], grad_biases[::-1]


def _backward_fake(
    grad_output: Tensor, input: Tensor, outputs: Sequence[Tensor], weights: Sequence[Tensor], *args: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    want_input, want_weights, want_biases = args[-3:]
    return (
        torch.empty_like(input, memory_format=torch.channels_last) if want_input else input.new_empty(0),
        [torch.empty_like(w) for w, want in zip(weights, want_weights, strict=True) if want],
        [w.new_empty(y.size(1)) for y, w, want in zip(outputs, weights, want_biases, strict=True) if want],
    )


def _statistics(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> tuple[Tensor, Tensor]:
    output, sums = _kernels(input).conv_statistics(input, weight, bias, _options(geometry)[0])
    return output, sums


def _statistics_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor]:
    (output,) = _forward_fake(input, [weight], [bias], geometry, ["none"], [0.0])
    parts = torch.library.get_ctx().new_dynamic_size()
    return output, torch.empty(parts, 2, output.size(1), dtype=torch.float64, device=input.device)


_forward_op = _library.define(
    "conv2d_acts(Tensor input, Tensor[] weights, Tensor?[] biases, int[] geometry, str[] activations,"
    " float[] negative_slopes) -> Tensor[]",
    _forward,
    _forward_fake,
)
_backward_op = _library.define(
    "conv2d_acts_backward(Tensor grad_output, Tensor input, Tensor[] outputs, Tensor[] weights, int[] geometry,"
    " str[] activations, float[] negative_slopes, bool want_input, bool[] want_weights, bool[] want_biases)"
    " -> (Tensor grad_input, Tensor[] grad_weights, Tensor[] grad_biases)",
    _backward,
    _backward_fake,
)


_statistics_op = _library.define(
    "conv2d_statistics(Tensor input, Tensor weight, Tensor? bias, int[] geometry) -> (Tensor output, Tensor sums)",
    _statistics,
    _statistics_fake,
)


class _ConvActs(torch.autograd.Function):
    """`tensors` are the weight and bias of each layer, `arguments` the rest of the operator's."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, arguments: tuple[list[int], list[str], list[float]], *tensors: Tensor | None
    ) -> Tensor:
        *before, output = _forward_op(input, tensors[::2], tensors[1::2], *arguments)
        # People may change in place what stock lets them: not the output of ReLU and tanh, which it needs itself.
        last = {"none": [], "leaky_relu": [output > 0]}.get(arguments[1][-1], [output])
        ctx.save_for_backward(input, *tensors, *before, *last)
        ctx.arguments = arguments
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        geometry, activations, negative_slopes = ctx.arguments
        count = 2 * len(activations)
        input, *saved = ctx.saved_tensors
        tensors, outputs = saved[:count], saved[count:]
        want_input, _, *want = ctx.needs_input_grad
        if torch.is_grad_enabled() or _autograd.is_transformed():
            if activations[-1] in _autograd.BY_OUTPUT:
                grad_output = _autograd.BY_OUTPUT[activations[-1]](grad_output, outputs[-1])
                activations = [*activations[:-1], "none"]

            def again(input: Tensor, *tensors: Any) -> Tensor:
                # Under autocast the parameters are wider than the images.
                cast: list[Any] = [None if t is None else t.to(input.dtype) for t in tensors]
                layers = map(Layer, cast[::2], cast[1::2], _options(geometry), activations, negative_slopes)
                return reference.conv2d_acts(input, list(layers))

            wanted = want_input, *want
            first, *others = _autograd.gradients(again, (input, *tensors), [grad_output], wanted)
            # In the weights' order of memory, as in stock: people take views of them.
            return first, None, *(g if g is None else like_layout(g, t) for g, t in zip(others, tensors, strict=True))
        if activations[-1] == "leaky_relu":
            grad_output = torch.where(outputs.pop(), grad_output, grad_output * negative_slopes[-1])
            activations = [*activations[:-1], "none"]
        if activations[-1] == "none":
            outputs.append(grad_output)  # only its shape counts
        arguments = geometry, activations, negative_slopes
        grad_input, *grads = _backward_op(
            grad_output, input, outputs, tensors[::2], *arguments, want_input, want[::2], want[1::2]
        )
        rest = [iter(g) for g in grads]
        return grad_input if want_input else None, None, *(next(rest[i % 2]) if w else None for i, w in enumerate(want))


class _ConvStatistics(torch.autograd.Function):
    """A convolution and the sums of its values and squares, which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, geometry: list[int], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output, sums = _statistics_op(input, weight, bias, geometry)
        ctx.save_for_backward(input, weight, bias)
        ctx.mark_non_differentiable(sums)
        ctx.arguments = geometry, ["none"], [0.0]
        return output, sums

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _ConvActs.backward(ctx, grad_output)


def _refusal(layers: Sequence[Layer], chosen: Any) -> str | None:
    for layer in layers:
        if layer.options.groups != 1:
            return f"needs one group; got {layer.options.groups}"
        if not 0 <= layer.negative_slope < math.inf:
            return f"needs a negative_slope of 0 or more; got {layer.negative_slope}"
    if chosen is not cpu or not torch.is_autocast_enabled("cpu") or cpu.takes_autocast():
        return None
    return "needs autocast to be off, or to bfloat16 on a processor with matrix units (AMX)"


def conv2d_acts(input: Tensor, layers: Sequence[Layer]) -> Tensor:
    """By the kernels, where they are chosen and take it; else by torch's autograd."""
    tensors: list[Any] = [t for layer in layers for t in layer[:2]]
    # In a compiled graph the operators below would hide the convolutions from the compiler.
    plain = not torch.compiler.is_compiling() and _autograd.is_plain(input, *tensors)
    chosen = backends.select("conv2d_act", input, *tensors[::2]) if plain else reference
    if chosen is reference:
        return reference.conv2d_acts(input, layers)
    reason = _refusal(layers, chosen)
    if reason is not None or input.numel() == 0:
        if reason is not None and backends.requested() != "auto":
            raise backends.BackendUnavailable(f"conv2d_act cannot run on the {backends.requested()} backend: {reason}")
        return reference.conv2d_acts(input, layers)
    arguments = _geometry(layers), [layer.activation for layer in layers], [layer.negative_slope for layer in layers]
    is_cast = chosen is cpu and torch.is_autocast_enabled("cpu")
    if is_cast:
        input = input.to(torch.bfloat16)
    elif chosen is not cpu:
        input, *tensors = autocast(input, *tensors)
    if not _autograd.is_recorded(input, *tensors):
        return _forward_op(input, tensors[::2], tensors[1::2], *arguments)[-1]
    return _ConvActs.apply(input, arguments, *_own(tensors, weights=is_cast))


def _own(tensors: Sequence[Tensor | None], weights: bool) -> list[Tensor | None]:
    """Weights and biases in turns; copied where torch does not need them for derivatives, which lets them change.

    Those are the biases, and weights that autocast would copy.
    """
    return [t if t is None or (i % 2 == 0 and not weights) else t.clone() for i, t in enumerate(tensors)]


def conv2d_statistics(input: Tensor, layer: Layer) -> tuple[Tensor, Tensor] | None:
    """A layer's convolution, and the sums of its values and squares; None where what runs it makes no sums."""
    plain = not torch.compiler.is_compiling() and _autograd.is_plain(input, *layer[:2])
    if not plain or input.numel() == 0:
        return None
    chosen = backends.select("conv2d_act", input, layer.weight)
    if not hasattr(chosen, "conv_statistics") or _refusal([layer], chosen) is not None:
        return None
    input, *tensors = autocast(input, layer.weight, layer.bias)
    if _autograd.is_recorded(input, *tensors):
        tensors = _own(tensors, weights=False)
    output, sums = _ConvStatistics.apply(input, _geometry([layer]), *tensors)
    return output, sums
