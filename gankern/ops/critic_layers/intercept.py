"""Puts the critic layers in the place of stock functions while a critic runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gankern._layout import autocast, memory_format
from gankern.ops.conv_act import conv2d_act, conv2d_acts
from gankern.ops.conv_act.reference import ConvOptions, Layer, activate
from gankern.ops.critic_layers.activation import LeakyRelu
from gankern.ops.critic_layers.fork import Forks, add
from gankern.ops.critic_layers.group_norm import group_norm, instance_norm
from gankern.ops.critic_layers.layer_norm import layer_norm
from gankern.ops.critic_layers.linear import Act, Conv, Linear
from gankern.ops.critic_layers.options import ints
from gankern.ops.critic_layers.pooling import adaptive_avg_pool, avg_pool
from gankern.ops.critic_layers.scope import Scope


def _convolve(
    scope: Scope, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, after: Act | None = None
) -> Tensor:
    first = input is scope.points
    given, *parameters = autocast(input, weight, bias)
    found = scope.activated.find(input) if given is input else None
    if found is None:
        return Conv.apply(given, *parameters, options, scope, first, None, after)
    edge, negative_slope = found
    return Conv.apply(edge, *parameters, options, scope, first, (input.detach(), Act(negative_slope)), after)


def _conv(dims: int) -> Callable[..., Tensor]:
    def conv(
        scope: Scope,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        after: Act | None = None,
    ) -> Any:
        if isinstance(padding, str) or input.dim() != dims + 2:
            return NotImplemented
        zeros = (0,) * dims
        options = ConvOptions(ints(stride, dims), ints(padding, dims), ints(dilation, dims), False, zeros, groups)
        return _convolve(scope, input, weight, bias, options, after)

    return conv


def _conv_transpose(dims: int) -> Callable[..., Tensor]:
    def conv_transpose(
        scope: Scope,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if input.dim() != dims + 2:
            return NotImplemented
        pads = ints(padding, dims), ints(dilation, dims)
        options = ConvOptions(ints(stride, dims), *pads, True, ints(output_padding, dims), groups)
        return _convolve(scope, input, weight, bias, options)

    return conv_transpose


def _linear(scope: Scope, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return Linear.apply(*autocast(input, weight, bias), scope)


def _activate(scope: Scope, input: Tensor, negative_slope: float, inplace: bool, applied: bool = False) -> Any:
    # Autograd lets a function with two outputs change no view in place.
    if inplace and input._is_view():
        return NotImplemented
    output, edge = LeakyRelu.apply(input, negative_slope, inplace, applied)
    if scope.fuses:
        scope.activated.note(output, edge, negative_slope)
    return output


def _relu(scope: Scope, input: Tensor, inplace: bool = False) -> Any:
    return _activate(scope, input, 0.0, inplace)


def _relu_(scope: Scope, input: Tensor) -> Any:
    return _activate(scope, input, 0.0, True)


def _leaky_relu(scope: Scope, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return _activate(scope, input, negative_slope, inplace) if negative_slope >= 0 else NotImplemented


def _leaky_relu_(scope: Scope, input: Tensor, negative_slope: float = 0.01) -> Any:
    return _leaky_relu(scope, input, negative_slope, True)


_conv2d = _conv(2)


def _conv2d_act(
    scope: Scope,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
    **options: Any,
) -> Any:
    """What ``fuse`` made of a convolution and an activation."""
    if activation not in ("relu", "leaky_relu") or negative_slope < 0:
        output = _conv2d(scope, input, weight, bias, **options)
        return output if output is NotImplemented else activate(output, activation, negative_slope)
    after = Act(negative_slope if activation == "leaky_relu" else 0.0)
    output = _conv2d(scope, input, weight, bias, **options, after=after)
    return output if output is NotImplemented else _activate(scope, output, after.negative_slope, True, applied=True)


_conv_transpose2d = _conv_transpose(2)


def _conv2d_acts(scope: Scope, input: Tensor, layers: Sequence[Layer]) -> Any:
    """What ``fuse`` made of several in a row."""
    output: Any = input
    for weight, bias, options, activation, slope in layers:
        stride, padding, dilation, transposed, output_padding, groups = options
        act: dict[str, Any] = {"activation": activation, "negative_slope": slope}
        if transposed:
            output = _conv_transpose2d(scope, output, weight, bias, stride, padding, output_padding, groups, dilation)
            output = output if output is NotImplemented else activate(output, activation, slope)
        else:
            geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            output = _conv2d_act(scope, output, weight, bias, **geometry, **act)
        if output is NotImplemented:
            return NotImplemented
    return output


_TAKEN: dict[Any, Callable[..., Any]] = {
    F.conv1d: _conv(1),
    F.conv2d: _conv2d,
    conv2d_act: _conv2d_act,
    conv2d_acts: _conv2d_acts,
    F.conv3d: _conv(3),
    F.conv_transpose1d: _conv_transpose(1),
    F.conv_transpose2d: _conv_transpose2d,
    F.conv_transpose3d: _conv_transpose(3),
    F.linear: _linear,
    torch.add: add,
    Tensor.add: add,
    Tensor.__add__: add,
    Tensor.__radd__: add,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.avg_pool1d: avg_pool(1),
    F.avg_pool2d: avg_pool(2),
    F.avg_pool3d: avg_pool(3),
    F.adaptive_avg_pool1d: adaptive_avg_pool(1),
    F.adaptive_avg_pool2d: adaptive_avg_pool(2),
    F.adaptive_avg_pool3d: adaptive_avg_pool(3),
}


_CONVOLUTIONS = {
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(conv2d_act, conv2d_acts),
}

# Functions that do the same in any order of memory, beside those above, by name: they compute element by element, move
# whole elements or none.
_ANY_ORDER = {
    *("__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point"),
    *("type", "to", "float", "double", "bfloat16", "half", "get_device", "requires_grad_", "detach", "clone"),
    *("flatten", "reshape", "cat", "concat", "where", "max_pool2d", "neg", "__neg__", "abs", "square", "sqrt", "exp"),
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "rsub", "__sub__", "__rsub__", "__isub__"),
    *("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__", "true_divide"),
    *("pow", "__pow__", "clamp", "clamp_", "clamp_min", "clamp_max", "threshold", "prelu", "relu6", "hardtanh"),
    *("silu", "silu_", "gelu", "mish", "elu", "elu_", "selu", "celu", "hardswish", "softplus", "softsign"),
    *("tanh", "tanh_", "sigmoid", "sigmoid_", "logsigmoid"),
}


_OF_THE_TENSOR = {"__setitem__", "register_hook", "retain_grad"}


def _is_of_the_tensor(name: str) -> bool:
    """Whether a function changes or watches its first argument, which then must not be a copy."""
    return name in _OF_THE_TENSOR or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    position = {F.relu: 1, F.leaky_relu: 2}.get(func, len(args))
    given = args[position] if position < len(args) else kwargs.get("inplace", False)
    return bool(given) or func in (F.relu_, Tensor.relu_, F.leaky_relu_)


class CriticLayers(TorchFunctionMode):
    """Runs the functions that gankern knows by its own layers, and all others as they are.

    Parameters
    ----------
    scope : Scope
        Handed to every layer.

    Attributes
    ----------
    taken, stock : Counter
        Calls by function name: those that gankern's layers ran, and differentiable ones left to stock autograd.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self._forks = Forks()
        self._copies = WeakTensorKeyDictionary()
        self.taken: Counter[str] = Counter()
        self.stock: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _TAKEN.get(func)
        if replacement is not None:
            if not _in_place(func, args, kwargs) and not self._is_fused(func, args):
                args = (*map(self._forks.use, args[:2]), *args[2:])
            result = replacement(self.scope, *args, **kwargs)
            if result is not NotImplemented:
                self.taken[func.__name__] += 1
                return result
        name = getattr(func, "__name__", "")
        self._refuse_lost_change(name, args)
        if self.scope.turns and name not in _ANY_ORDER:
            kept = 1 if _is_of_the_tensor(name) else 0
            args = (*args[:kept], *self._contiguous(args[kept:]))
            kwargs = {key: self._contiguous(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        if any(isinstance(t, Tensor) and t.grad_fn is not None for t in outputs):
            self.leave(func, args, kwargs, known=replacement is not None)
        return result

    def _contiguous(self, value: Any) -> Any:
        """Activations in the order that they have in stock."""
        if isinstance(value, Tensor):
            if not value.requires_grad or memory_format(value) != torch.channels_last:
                return value
            copy = value.contiguous()
            self._copies[copy] = None
            return copy
        if type(value) in (tuple, list):
            return type(value)(self._contiguous(v) for v in value)
        return value

    def _refuse_lost_change(self, name: str, args: tuple[Any, ...]) -> None:
        """A view of a copy would be changed, and the activation left as it is."""
        changes = _is_of_the_tensor(name) and name not in ("register_hook", "retain_grad")
        base = args[0]._base if changes and args and isinstance(args[0], Tensor) else None
        if base is not None and base in self._copies:
            raise RuntimeError(
                "critic changes a view of an activation in place, which gankern's layers cannot follow; got "
                f"{name} of a view: change a clone of it, or use gankern.backend('reference')"
            )

    def _is_fused(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a convolution takes its input together with the activation before."""
        taken = func in _CONVOLUTIONS and args and isinstance(args[0], Tensor)
        return bool(taken) and self.scope.activated.find(args[0]) is not None

    def __exit__(self, *args: Any) -> None:
        self._forks.clear()
        self.scope.activated.clear()
        super().__exit__(*args)

    def leave(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: bool) -> None:
        """Note a differentiable call that stock autograd ran; `known` functions were called in a way not taken."""
        self.stock[getattr(func, "__name__", str(func))] += 1
