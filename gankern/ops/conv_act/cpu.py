"""Adapter of csrc/cpu/conv*.cpp and stem_input_grad.cpp; torch's convolutions where those do not apply.

Images and their gradients are channels_last; results are, too, and lie in the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import _native, workspace
from gankern._layout import dense, like_layout, memory_format
from gankern._native import ACTIVATIONS, DTYPES, address, kernels, span
from gankern.ops.conv_act import reference
from gankern.ops.conv_act.reference import ConvOptions

# Up to so many input channels the vectors of the input's gradient run along the taps.
_STEM = 4
# In bfloat16: pixels of the result, or of the side without the stride for a weight, beyond which torch's convolutions
# are faster where they have a stride of one, or where neither a tap's channels nor the result's are more than one step
# of the matrix units; results of a few channels have a kernel of their own.
_MANY_PIXELS = 1 << 12
_STEP, _FEW = 32, 8
# In float32 torch's are faster where channels do not fill the vectors that run along them, of so many values.
_VECTOR = 16
_LEAVES_THIN = True
# Channels that oneDNN sums up at a time with AVX-512.
_SUM_BLOCK = 16


def refuse(*tensors: Tensor) -> str | None:
    known = (torch.float32, torch.bfloat16) if has_matrix_units() else (torch.float32,)
    for tensor in tensors:
        if tensor.dtype not in known:
            names = "float32, or bfloat16 on a processor with matrix units (AMX)"
            return f"needs {names}; got {tensor.dtype}"
    return _native.refuse(*tensors)


def has_matrix_units() -> bool:
    """Whether there are kernels for bfloat16."""
    return kernels is not None and kernels.has_matrix_units()


def takes_autocast() -> bool:
    """Whether there are kernels for what autocast casts to."""
    return has_matrix_units() and torch.get_autocast_dtype("cpu") == torch.bfloat16


def activate_(output: Tensor, activation: str, negative_slope: float) -> Tensor:
    """In place, in memory that nobody else has seen."""
    if activation == "leaky_relu":
        return F.leaky_relu_(output, negative_slope)
    return output.relu_() if activation == "relu" else output.tanh_() if activation == "tanh" else output


def activate_backward(grad_output: Tensor, output: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Gradient of an activation's input, by its output; the slope is 0 or more."""
    if activation == "none":
        return grad_output
    grad_input = workspace.empty_like(grad_output, memory_format(grad_output))
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad_output, output, 0, grad_input=grad_input)
    if activation == "tanh":
        return torch.ops.aten.tanh_backward.grad_input(grad_output, output, grad_input=grad_input)
    backward = torch.ops.aten.leaky_relu_backward.grad_input
    return backward(grad_output, output, negative_slope, True, grad_input=grad_input)


class _Geometry(NamedTuple):
    """Sizes of a convolution or a transposed one as the kernels see both."""

    wide: tuple[int, ...]  # what has the stride: the input, or a transposed convolution's output
    narrow: tuple[int, ...]
    options: ConvOptions  # of the convolution that makes the one out of the other


def _geometry(input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> _Geometry | None:
    """None where the kernels do not take it. What torch would refuse is left to it, too."""
    if input.dtype == torch.bfloat16:
        if not has_matrix_units() or weight.dtype not in (torch.float32, torch.bfloat16):
            return None
    elif not input.dtype == weight.dtype == torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return None
    return _fit(input.shape, weight.shape, None if bias is None else bias.shape, options)


def takes_conv(input: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    """Whether a kernel computes a convolution and its gradients; of the tensors, only sizes and dtypes are used."""
    return _geometry(input, weight, None, options) is not None


@lru_cache(maxsize=1024)
def _fit(input: torch.Size, weight: torch.Size, bias: torch.Size | None, options: ConvOptions) -> _Geometry | None:
    transposed = options.transposed
    if not len(input) == len(weight) == 4 or options.groups != 1 or min(*options.stride, *options.dilation) < 1:
        return None
    if min(options.padding) < 0 or input[1] != weight[0 if transposed else 1] or min(*input, *weight) < 1:
        return None
    output = torch.Size(reference.conv_shape(input, weight, options))
    if min(output) < 1 or (bias is not None and bias != output[1:2]):
        return None
    plain = options._replace(transposed=False, output_padding=(0, 0))
    if not transposed:
        return _Geometry(input, output, plain)
    # Not with so much output padding that the convolution would see another pixel.
    return _Geometry(output, input, plain) if list(input) == reference.conv_shape(output, weight, plain) else None


@lru_cache(maxsize=1024)
def _shape(
    geometry: _Geometry, weight: torch.Size, weight_strides: tuple[int, ...], sum_block: int, threads: int
) -> Any:
    (n, c, h, w), (_, k, *out) = geometry.wide, geometry.narrow
    sizes = (n, h, w, c), (*out, k), weight[2:]
    return kernels.ConvShape(*sizes, *geometry.options[:3], weight_strides, sum_block, threads)


def _shape_of(geometry: _Geometry, weight: Tensor, sum_block: int = 0) -> Any:
    n, _, *size = geometry.narrow
    # A vector of products in the time of an element.
    work = n * math.prod(size) * weight.numel() >> 4
    return _shape(geometry, weight.shape, weight.stride(), sum_block, _native.threads(work))


class Finish(NamedTuple):
    """What becomes of a result on its way to memory: ``* scale + shift``, then an activation.

    With `activated`, an activation's output, it is multiplied by the activation's derivative there instead.
    """

    activation: str = "none"
    negative_slope: float = 0.0
    activated: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def apply(self, result: Tensor) -> Tensor:
        """By torch, in place where nobody else has seen the result's memory."""
        if self.scale is not None and self.shift is not None:
            result.mul_(self.scale[:, None, None]).add_(self.shift[:, None, None])
        if self.activated is None:
            return activate_(result, self.activation, self.negative_slope)
        output = like_layout(self.activated, result)
        return activate_backward(result, output, self.activation, self.negative_slope)

    def arguments(self) -> tuple[int, int, float, int, int]:
        affine = address(self.scale), address(self.shift)
        return address(self.activated), ACTIVATIONS[self.activation], self.negative_slope, *affine


def _narrow(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, sum_block: int, finish: Finish, name: str
) -> Tensor:
    """From the wide side to the narrow one: a convolution, or the gradient of a transposed one's input."""
    input, weight = channels_last(input), weight.float()
    result = workspace.empty(geometry.narrow, input.dtype, torch.channels_last)
    shape = _shape_of(geometry, weight, sum_block)
    addresses = input.data_ptr(), weight.data_ptr(), address(bias), result.data_ptr()
    run = kernels.conv_bfloat16_forward if input.dtype == torch.bfloat16 else kernels.conv_forward
    with span(name):
        run(shape, *addresses, *finish.arguments())
    return result


def _widen(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, finish: Finish, name: str
) -> Tensor:
    """From the narrow side to the wide one: a transposed convolution, or the gradient of a convolution's input."""
    input, weight = channels_last(input), weight.float()
    result = workspace.empty(geometry.wide, input.dtype, torch.channels_last)
    half = input.dtype == torch.bfloat16
    if geometry.wide[1] <= _STEM and not half:
        with span(name):
            _stem(input, channels_last(weight), result, geometry.options)
        if bias is not None:
            result.add_(bias[:, None, None])
        return finish.apply(result)
    shape = _shape_of(geometry, weight)
    addresses = input.data_ptr(), weight.data_ptr(), address(bias), result.data_ptr()
    run = kernels.conv_bfloat16_input_grad if half else kernels.conv_input_grad
    with span(name):
        run(shape, *addresses, *finish.arguments())
    return result


def _stem(input: Tensor, weight: Tensor, result: Tensor, options: ConvOptions) -> None:
    (n, c, h, w), (k, _, *kernel) = result.shape, weight.shape
    scratch = torch.empty(kernels.stem_input_grad_scratch(weight[0].numel(), k), dtype=input.dtype)
    kernels.stem_input_grad(
        DTYPES[input.dtype],
        (n, h, w, c),
        (*input.shape[2:], k),
        kernel,
        *options[:3],
        input.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )


def _is_slower(dtype: torch.dtype, geometry: _Geometry, kernel: Sequence[int], widens: bool) -> bool:
    """Whether torch's convolution is faster than ours, for an image."""
    source, result = (geometry.narrow, geometry.wide) if widens else (geometry.wide, geometry.narrow)
    if dtype == torch.float32:
        return _LEAVES_THIN and (_STEM < result[1] < _VECTOR if widens else 1 < source[1] <= _STEM)
    if result[0] * result[2] * result[3] <= _MANY_PIXELS or (widens and result[1] <= _FEW):
        return False
    small = source[1] < _STEP and result[1] <= _STEP
    return small or (geometry.options.stride == (1, 1) and max(kernel) > 1)


def _is_slower_weight(dtype: torch.dtype, geometry: _Geometry, kernel: Sequence[int]) -> bool:
    """The same for the gradient of a weight."""
    n, channels, h, w = geometry.narrow
    if dtype == torch.float32:
        return _LEAVES_THIN and 1 < geometry.wide[1] < 2 * _VECTOR
    if n * h * w <= _MANY_PIXELS:
        return False
    small = geometry.wide[1] < _STEP and channels <= _STEP
    return small or (geometry.options.stride == (1, 1) and max(kernel) > 1)


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels_last, in which all passes of a 2-d convolution are nearer the peak."""
    if tensor.dim() != 4 or tensor.dtype not in (torch.float32, torch.bfloat16):
        return tensor
    # Not contiguous(), which leaves images of one pixel as they are: convolutions go by the strides.
    if memory_format(tensor) == torch.channels_last:
        return tensor
    return workspace.empty_like(tensor, torch.channels_last).copy_(tensor)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Convolution, transposed or not, and what :class:`Finish` does."""
    return _conv(input, weight, bias, options, 0, Finish(activation, negative_slope, None, scale, shift))


def conv_as_stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """The convolution with the bits of torch's of contiguous images; in bfloat16, as :func:`conv`."""
    if input.dtype == torch.bfloat16:
        return conv(input, weight, bias, options, activation, negative_slope)
    if not options.transposed and _sums_in_blocks(input, weight, bias, options):
        return _conv(input, weight, bias, options, _SUM_BLOCK, Finish(activation, negative_slope))
    output = reference.conv(input.contiguous() if weight.is_contiguous() else input, weight, bias, options)
    return activate_(output, activation, negative_slope)


def _sums_in_blocks(input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> bool:
    """Whether torch leaves it to oneDNN's kernels for AVX-512, which sum up 16 channels at a time."""
    if _geometry(input, weight, bias, options) is None:
        return False
    if kernels.cpu_isa() != "avx512" or not weight.is_contiguous() or weight.shape[2:] == (1, 1):
        return False
    # Where pixels of the output see nothing but padding, it takes a matrix product instead.
    reach = ((k - 1) * d for k, d in zip(weight.shape[2:], options.dilation, strict=True))
    if any(p > most for p, most in zip(options.padding, reach, strict=True)):
        return False
    bias_size = None if bias is None else weight.size(0)
    return _is_mkldnn(
        input.shape, weight.shape, bias_size, options, torch.get_num_threads(), torch.backends.mkldnn.enabled
    )


@lru_cache(maxsize=1024)
def _is_mkldnn(
    input: torch.Size, weight: torch.Size, bias_size: int | None, options: ConvOptions, threads: int, enabled: bool
) -> bool:
    given = torch.empty(input), torch.empty(weight), None if bias_size is None else torch.empty(bias_size)
    chosen = torch._C._select_conv_backend(*given, *options, None if bias_size is None else [bias_size])
    return chosen == torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, sum_block: int, finish: Finish
) -> Tensor:
    geometry = _geometry(input, weight, bias, options)
    # Sums in torch's order are asked for where its bits are.
    if geometry and not sum_block and _is_slower(input.dtype, geometry, weight.shape[2:], options.transposed):
        geometry = None
    if geometry is None:
        weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        return finish.apply(reference.conv(channels_last(input), channels_last(weight), bias, options))
    bias = None if bias is None else bias.float().contiguous()
    # torch's tanh, since that is what its users compare with; in bfloat16 rounding hides which it was.
    apart = finish.activation == "tanh" and input.dtype == torch.float32
    last, finish = (finish, finish._replace(activation="none")) if apart else (None, finish)
    if options.transposed:
        output = _widen(input, weight, bias, geometry, finish, "gankern::conv")
    else:
        output = _narrow(input, weight, bias, geometry, sum_block, finish, "gankern::conv")
    return output if last is None else output.tanh_()


def conv_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """Gradient of what an activation made the input of; without one, of the input, only whose shape and dtype count."""
    geometry = _geometry(input, weight, None, options)
    activated = None if activation == "none" else channels_last(input)
    finish = Finish(activation, negative_slope, activated)
    if geometry and _is_slower(input.dtype, geometry, weight.shape[2:], not options.transposed):
        geometry = None
    if geometry is None:
        weight = channels_last(weight.to(grad_output.dtype))
        return finish.apply(reference.conv_input_grad(grad_output, weight, input, options))
    if options.transposed:
        return _narrow(grad_output, weight, None, geometry, 0, finish, "gankern::conv_input_grad")
    return _widen(grad_output, weight, None, geometry, finish, "gankern::conv_input_grad")


def conv_weight_grad(grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    """Gradient of the weight, of which only the shape, dtype and layout are used."""
    geometry = _geometry(input, weight, None, options)
    if geometry and _is_slower_weight(input.dtype, geometry, weight.shape[2:]):
        geometry = None
    if geometry is None:
        return _torchs_weight_grad(grad_output, input, weight, options)
    wide, narrow = (grad_output, input) if options.transposed else (input, grad_output)
    wide, narrow, weight = channels_last(wide), channels_last(narrow), dense(weight)
    # Sums are in float32, and stay so where the weight is.
    grad_weight = workspace.like(weight.float())
    addresses = narrow.data_ptr(), wide.data_ptr(), grad_weight.data_ptr()
    run = kernels.conv_bfloat16_weight_grad if input.dtype == torch.bfloat16 else kernels.conv_weight_grad
    with span("gankern::conv_weight_grad"):
        run(_shape_of(geometry, weight), *addresses)
    if input.dtype == torch.bfloat16 and not grad_weight.sum().isfinite():
        # The matrix units' zeros beside an image meet what is not finite.
        return _torchs_weight_grad(grad_output, input, weight, options)
    return grad_weight.to(weight.dtype)


def _torchs_weight_grad(grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    like = channels_last(weight.to(input.dtype))
    return like_layout(reference.conv_weight_grad(grad_output, input, like, options).to(weight.dtype), weight)
