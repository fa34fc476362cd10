"""The convolution in front of a block, with the normalisation in it where no gradient is wanted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import _native, backends
from gankern._autograd import casts, is_plain, is_recorded
from gankern._layout import autocast, like_layout, memory_format
from gankern.backends import Explanation
from gankern.ops.conv_act import conv2d_acts, conv2d_statistics, cpu, reference
from gankern.ops.conv_act.reference import ConvOptions, Layer, conv_shape

Pair = tuple[int, int]
_GPU = ("cuda", "triton")


class Convolution(NamedTuple):
    """Options of a 2-d convolution; calling it convolves."""

    transposed: bool
    stride: Pair
    padding: Pair
    output_padding: Pair
    dilation: Pair
    groups: int

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_plain(input, weight, bias):
            return self.by_torch(input, weight, bias)
        is_product = self.is_product(input)
        if self.is_plain(input, weight) and not is_product:
            return conv2d_acts(input, [Layer(weight, bias, self.options, "none", 0.0)])
        if input.device.type == "cpu" or memory_format(input) == torch.channels_last:
            # Once here, instead of inside the convolution and again in each of its gradients. On GPUs contiguous images
            # with a weight in channels_last come out in channels_last, as in stock.
            weight = _turned(weight, memory_format(input))
        if is_product:
            return _product(input, weight, bias)
        return self.by_torch(input, weight, bias)

    def by_torch(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(
                input, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def with_statistics(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The convolution, and the sums that its output's statistics are made of where a kernel leaves them."""
        compiling = torch.compiler.is_compiling()
        on_gpu = not compiling and (input.device.type != "cpu" or backends.requested() in _GPU)
        ours = on_gpu and is_plain(input, weight, bias) and self.is_plain(input, weight)
        if ours and not self.is_product(input):
            found = conv2d_statistics(input, Layer(weight, bias, self.options, "none", 0.0))
            if found is not None:
                return found
        return self(input, weight, bias), None

    @property
    def options(self) -> ConvOptions:
        return ConvOptions(self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)

    def is_plain(self, input: Tensor, weight: Tensor) -> bool:
        """Whether gankern's kernels may take it."""
        if self.groups != 1:
            return False
        if not torch.compiler.is_compiling():
            name = backends.requested()
            if name in _GPU:
                # By name, what follows the convolution may have a kernel where it has none.
                return backends.refusal("conv2d_act", name, input, weight) is None
            if input.device.type != "cpu":
                return backends.select("conv2d_act", input, weight) is not reference
        dtypes = {input.dtype, weight.dtype}
        if casts(input):
            return input.device.type == "cpu" and cpu.takes_autocast() and dtypes <= {torch.float32, torch.bfloat16}
        return dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and cpu.has_matrix_units())

    def is_product(self, input: Tensor) -> bool:
        """Whether it is a plain matrix product: the first block of a generator, which spreads one pixel an image."""
        alone = input.size(2) == input.size(3) == 1 and self.groups == 1
        whole = not any((*self.padding, *self.output_padding)) and self.dilation == (1, 1)
        return self.transposed and alone and whole


def explain_block(transposed: bool, found: Explanation, input: Tensor, weight: Tensor, *_: Any, **options: Any) -> Any:
    """What runs a block: the backend of its normalisation, and a note on the convolution's."""
    pairs = {
        name: value if isinstance(value, tuple) else (value, value)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
        for value in [options.get(name, default)]
    }
    conv = Convolution(transposed, **pairs, groups=options.get("groups", 1))
    made = input
    if input.dim() == weight.dim() == 4 and not isinstance(conv.padding[0], str):
        # The normalisation goes by the size of what the convolution makes.
        shape = [max(size, 0) for size in conv_shape(input.shape, weight.shape, conv.options)]
        made = input.new_empty(()).expand(shape)
    norm = backends.explain_call("batch_norm_act", made)
    by = "torch's own"
    if conv.is_plain(input, weight) and not conv.is_product(input):
        chosen = backends.explain_call("conv2d_act", input, weight).chosen
        by = by if chosen in (None, "reference") else f"backend {chosen}"
    notes = (f"convolution: {by}", f"batch norm and activation: {norm.chosen or 'no backend'}")
    return Explanation(found.op, norm.chosen, norm.refused, notes=notes)


class _Turned(torch.autograd.Function):
    """The weight in another layout. It is saved, so that changed in place it raises as torch's convolution would."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, memory_format: torch.memory_format) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.contiguous(memory_format=memory_format)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return like_layout(grad_output, weight), None


def _turned(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    if weight.is_contiguous(memory_format=memory_format) or not is_recorded(weight) or torch.compiler.is_compiling():
        return weight.contiguous(memory_format=memory_format)
    return _Turned.apply(weight, memory_format)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Transposed convolution of images of one pixel, in the layout of the weight."""
    pixels = input.flatten(1)
    if memory_format(weight) == torch.channels_last:
        weight = weight.permute(0, 2, 3, 1)
        output = (pixels @ weight.flatten(1)).unflatten(1, weight.shape[1:])
        return (output if bias is None else output + bias.to(output.dtype)).permute(0, 3, 1, 2)
    output = (pixels @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    return output if bias is None else output + bias.to(output.dtype).view(-1, 1, 1)


def folds(input: Tensor) -> bool:
    """Whether inference may fold: not where the normalisation was asked of a backend that must run it or refuse.

    Nor where a GPU's kernel normalises in the one pass that activates, which costs no more than to activate alone.
    """
    if torch.compiler.is_compiling():
        return False
    name = backends.requested()
    if name == "auto":
        return all(backends.refusal("batch_norm_act", gpu, input) is not None for gpu in _GPU)
    return name != "reference" and backends.refusal("batch_norm_act", name, input) is None


def affine(
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel that the normalisation comes down to, the convolution's bias included."""
    acc = _native.acc_dtype(running_mean.dtype)
    scale = (running_var.to(acc) + eps).rsqrt()
    if bn_weight is not None:
        scale = scale * bn_weight
    shift = -running_mean.to(acc) if bias is None else bias - running_mean.to(acc)
    shift = shift * scale
    return scale, shift if bn_bias is None else shift + bn_bias


def normalised(
    conv: Convolution, input: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, activation: str, slope: float
) -> Tensor:
    """``activation(conv(input) * scale + shift)`` without gradients; on the way to memory where a kernel does it."""
    kernels = backends.select("conv2d_act", input, weight) if conv.is_plain(input, weight) else reference
    if kernels is not reference:
        if kernels is cpu:
            (input,) = autocast(input)
        else:
            input, weight = autocast(input, weight)
        scale, shift = (t.to(_native.acc_dtype(input.dtype)).contiguous() for t in (scale, shift))
        output = kernels.conv(input, weight, None, conv.options, activation, slope, scale, shift)
        return like_layout(output, input)
    return conv_act(conv, input, *_fold(conv, weight, scale, shift), activation, slope)


def _fold(conv: Convolution, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that normalises as well."""
    if conv.transposed:
        # The output channels of (C_in, C_out // groups, kH, kW) are those of the group that the row belongs to.
        rows = weight.size(0) // conv.groups
        scale = scale.view(conv.groups, -1).repeat_interleave(rows, 0)[:, :, None, None]
    else:
        scale = scale.view(-1, 1, 1, 1)
    return weight * scale.to(weight.dtype), shift.to(weight.dtype)


# Activations that oneDNN applies to an output tile while it is in registers; Inductor's own way to its post-ops.
_POINTWISE = {
    name: getattr(torch.ops.mkldnn, name)
    for name in ("_convolution_pointwise", "_convolution_transpose_pointwise")
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, name)
}


def conv_act(
    conv: Convolution, input: Tensor, weight: Tensor, bias: Tensor, activation: str, negative_slope: float
) -> Tensor:
    """Convolution and activation, without gradients."""
    name = "_convolution_transpose_pointwise" if conv.transposed else "_convolution_pointwise"
    # oneDNN takes no more output padding than that, torch's own kernels do.
    fits = all(o < s for o, s in zip(conv.output_padding, conv.stride, strict=True))
    fusable = fits and name in _POINTWISE and torch.backends.mkldnn.enabled
    if fusable and input.device.type == "cpu" and input.numel():
        input, weight, bias = autocast(input, weight, bias)
        if input.dtype in (torch.float32, torch.bfloat16) and weight.dtype == input.dtype:
            scalars: list[Any] = [negative_slope] if activation == "leaky_relu" else []
            geometry: tuple[Any, ...] = (conv.padding, conv.stride, conv.dilation, conv.groups)
            if conv.transposed:
                geometry = (conv.padding, conv.output_padding, conv.stride, conv.dilation, conv.groups)
            output = _POINTWISE[name](input, weight, bias, *geometry, activation, scalars, "")
            return like_layout(output, input)
    return cpu.activate_(conv(input, weight, bias), activation, negative_slope)
