"""Critics that are plain: modules of torch's own, one after the other, which do what their classes say.

Only of these is it known without running them which functions they call, that nobody else reads or changes an
activation, that weights do not depend on the points, and that nothing is written or drawn. All others run as their
authors wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from gankern._layout import autocast
from gankern.ops.conv_act.reference import ConvOptions
from gankern.ops.critic_layers.activation import LeakyRelu
from gankern.ops.critic_layers.group_norm import group_norm, instance_norm
from gankern.ops.critic_layers.layer_norm import layer_norm
from gankern.ops.critic_layers.linear import Act, Conv, Linear
from gankern.ops.critic_layers.options import ints
from gankern.ops.critic_layers.pooling import adaptive_avg_pool, avg_pool
from gankern.ops.critic_layers.scope import Scope


class Declined(Exception):
    """Values or shapes that the layers do not take."""


#: Runs a module by one of gankern's layers, on tensors that stand for its own; NotImplemented where it declines.
Run = Callable[[Scope, Tensor, Any, Sequence[Any]], Any]


@dataclass(frozen=True)
class Kind:
    """What is known of one of torch's classes.

    Attributes
    ----------
    run : callable or None
        None where the module itself is called, which then has no tensors of its own.
    tensors : tuple of str
        Names of its parameters.
    options : dict of str to tuple of types
        Attributes that its forward reads, and the types of theirs, or of their elements, that are taken.
    bends : bool
        Whether stock's outer pass hands on a gradient to what comes before it, be it zeros: it does so wherever the
        derivative is a function of the input.
    casts : bool
        Whether its layer runs under autocast.
    refuse : callable
        Why a module is not taken; None if it is.
    """

    run: Run | None = None
    tensors: tuple[str, ...] = ()
    options: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    bends: bool = False
    casts: bool = True
    refuse: Callable[[Any], str | None] = lambda module: None


def _convolve(
    scope: Scope,
    input: Tensor,
    module: Any,
    tensors: Sequence[Any],
    first: bool = False,
    edge: tuple[Tensor, float] | None = None,
    after: Act | None = None,
) -> Any:
    """A convolution; of an activation's output, where its `edge` is given, and with the activation `after` it."""
    dims = len(module.kernel_size)
    if input.dim() != dims + 2 or tensors[0].dim() != dims + 2:
        return NotImplemented
    output_padding = ints(module.output_padding, dims) if module.transposed else (0,) * dims
    stride, padding, dilation = (ints(o, dims) for o in (module.stride, module.padding, module.dilation))
    options = ConvOptions(stride, padding, dilation, module.transposed, output_padding, module.groups)
    given, *parameters = autocast(input, *tensors)
    if edge is None or given is not input:
        return Conv.apply(given, *parameters, options, scope, first, None, after)
    return Conv.apply(edge[0], *parameters, options, scope, first, (input.detach(), Act(edge[1])), after)


def _linear(scope: Scope, input: Tensor, module: Any, tensors: Sequence[Any]) -> Any:
    return NotImplemented if tensors[0].dim() != 2 else Linear.apply(*autocast(input, *tensors), scope)


def _layer_norm(scope: Scope, input: Tensor, module: Any, tensors: Sequence[Any]) -> Any:
    weight, bias = tensors
    return layer_norm(scope, input, module.normalized_shape, weight, bias, module.eps)


def _group_norm(scope: Scope, input: Tensor, module: Any, tensors: Sequence[Any]) -> Any:
    weight, bias = tensors
    return group_norm(scope, input, module.num_groups, weight, bias, module.eps)


def _instance_norm(dims: int) -> Run:
    def run(scope: Scope, input: Tensor, module: Any, tensors: Sequence[Any]) -> Any:
        if input.dim() != dims + 2 or input.size(1) != module.num_features:
            return NotImplemented
        weight, bias = tensors
        return instance_norm(scope, input, weight, bias, module.eps)

    return run


def _pool(pool: Callable[..., Any], names: Sequence[str]) -> Run:
    def run(scope: Scope, input: Tensor, module: Any, tensors: Sequence[Any]) -> Any:
        return pool(scope, input, **{name: getattr(module, name) for name in names})

    return run


def _refuse_padding(module: Any) -> str | None:
    return None if module.padding_mode == "zeros" else f"padding_mode={module.padding_mode!r}"


def _refuse_slope(module: Any) -> str | None:
    # The output tells the sign of the input only so.
    return None if 0 < module.negative_slope < 1 else f"negative_slope={module.negative_slope}"


def _refuse_statistics(module: Any) -> str | None:
    return None if module.running_mean is module.running_var is None else "it keeps running statistics"


def _refuse_in_place(module: Any) -> str | None:
    return "it works in place" if module.inplace else None


def _refuse_dropout(module: Any) -> str | None:
    # It draws in the order of memory, which the layers before it change.
    return "it draws random numbers" if module.training else _refuse_in_place(module)


_INT, _MAYBE, _NUMBER, _BOOL = (int,), (int, type(None)), (int, float), (bool,)
_CONV: dict[str, tuple[type, ...]]
_CONV = {"kernel_size": _INT, "stride": _INT, "padding": _INT, "dilation": _INT, "groups": _INT, "transposed": _BOOL}
_AFFINE = ("weight", "bias")


def _conv_kind(options: Mapping[str, tuple[type, ...]]) -> Kind:
    return Kind(_convolve, _AFFINE, options, refuse=_refuse_padding)


def _instance_norm_kind(dims: int) -> Kind:
    options = {"num_features": _INT, "eps": _NUMBER}
    return Kind(_instance_norm(dims), _AFFINE, options, bends=True, casts=False, refuse=_refuse_statistics)


def _pool_kind(dims: int) -> Kind:
    options = {"kernel_size": _INT, "stride": _MAYBE, "padding": _INT, "ceil_mode": _BOOL, "count_include_pad": _BOOL}
    options |= {"divisor_override": _MAYBE} if dims > 1 else {}
    return Kind(_pool(avg_pool(dims), list(options)), (), options, bends=True, casts=False)


def _adaptive_kind(dims: int) -> Kind:
    options = {"output_size": _INT}
    return Kind(_pool(adaptive_avg_pool(dims), list(options)), (), options, bends=True, casts=False)


# Activations are run together with what stands before or after them: see `Chain.run`.
_ACT = LeakyRelu.apply
_SHAPE, _SMOOTH, _DROPOUT = Kind(), Kind(bends=True), Kind(options={"inplace": _BOOL}, refuse=_refuse_dropout)
_SMOOTH_IN_PLACE = Kind(options={"inplace": _BOOL}, bends=True, refuse=_refuse_in_place)

KINDS: dict[type[nn.Module], Kind] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv_kind(_CONV)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_kind(_CONV | {"output_padding": _INT})
    ),
    nn.Linear: Kind(_linear, _AFFINE),
    nn.ReLU: Kind(_ACT, (), {"inplace": _BOOL}, bends=True),
    nn.LeakyReLU: Kind(_ACT, (), {"inplace": _BOOL, "negative_slope": _NUMBER}, bends=True, refuse=_refuse_slope),
    nn.LayerNorm: Kind(_layer_norm, _AFFINE, {"normalized_shape": _INT, "eps": _NUMBER}, bends=True, casts=False),
    nn.GroupNorm: Kind(_group_norm, _AFFINE, {"num_groups": _INT, "eps": _NUMBER}, bends=True, casts=False),
    nn.InstanceNorm1d: _instance_norm_kind(1),
    nn.InstanceNorm2d: _instance_norm_kind(2),
    nn.InstanceNorm3d: _instance_norm_kind(3),
    nn.AvgPool1d: _pool_kind(1),
    nn.AvgPool2d: _pool_kind(2),
    nn.AvgPool3d: _pool_kind(3),
    nn.AdaptiveAvgPool1d: _adaptive_kind(1),
    nn.AdaptiveAvgPool2d: _adaptive_kind(2),
    nn.AdaptiveAvgPool3d: _adaptive_kind(3),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.Identity), _SHAPE),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _DROPOUT),
    **dict.fromkeys((nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU), _SMOOTH),
    **dict.fromkeys((nn.SiLU, nn.ELU), _SMOOTH_IN_PLACE),
}

# What calling a module runs, which people replace on a class or on an instance.
_CODE = (
    *("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__", "__iter__", "forward"),
    *("_conv_forward", "_output_padding", "_check_input_dim", "_apply_instance_norm", "_handle_no_batch_input"),
)
_FUNCTIONS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "relu"),
    *("leaky_relu", "layer_norm", "group_norm", "instance_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _code(kind: type) -> tuple[Any, ...]:
    return tuple(getattr(kind, name, None) for name in _CODE)


def _functions() -> tuple[Any, ...]:
    mine = tuple(getattr(F, name) for name in _FUNCTIONS)
    return *mine, torch.relu, torch.relu_, torch.layer_norm, torch.group_norm, torch.instance_norm


def _is_torchs(code: tuple[Any, ...]) -> bool:
    """Whether nobody had replaced any of it before gankern was imported."""
    return all(not isinstance(f, FunctionType) or f.__module__.startswith("torch.") for f in code)


#: Classes that call their modules one after the other, with what calling them runs; :mod:`gankern.nn` adds its own.
SEQUENTIALS: dict[type[nn.Module], tuple[Any, ...]] = {}
_TORCHS_CODE = {kind: _code(kind) for kind in KINDS if _is_torchs(_code(kind))}
_TORCHS_FUNCTIONS = _functions()
_FUNCTIONS_ARE_TORCHS = _is_torchs(_TORCHS_FUNCTIONS)


def add_sequential(kind: type[nn.Module]) -> None:
    """Make known a class that does what ``nn.Sequential`` does."""
    SEQUENTIALS[kind] = _code(kind)


if _is_torchs(_code(nn.Sequential)):
    add_sequential(nn.Sequential)


class Step(NamedTuple):
    """A module of a chain, and where its tensors are among the chain's parameters."""

    module: Any
    kind: Kind
    tensors: tuple[int | None, ...]

    @property
    def bends(self) -> bool:
        # Stock takes the pooling of all pixels for a mean, which has no second derivative.
        whole = set(ints(getattr(self.module, "output_size", 0), 1)) == {1}
        return self.kind.bends and not whole

    @property
    def slope(self) -> float | None:
        """Negative slope of an activation; None for all else."""
        if type(self.module) is nn.ReLU:
            return 0.0
        return self.module.negative_slope if type(self.module) is nn.LeakyReLU else None


class Chain(NamedTuple):
    """A plain critic, with its parameters in the order of ``critic.parameters()``."""

    steps: list[Step]
    params: list[nn.Parameter]

    @property
    def casts(self) -> bool:
        """Whether it runs under autocast."""
        return all(step.kind.casts for step in self.steps)

    @property
    def has_norm(self) -> bool:
        """Whether a norm's kernels round otherwise than stock's, so that the forward pass has other bits anyway."""
        return any(step.kind.tensors and not step.kind.casts for step in self.steps)

    def gets_gradients(self) -> list[bool]:
        """Whether stock's outer pass gives each parameter, and last the points, a gradient, if only zeros, not None."""
        reached: set[int | None] = set()
        bends = False
        for step in reversed(self.steps):
            # An input gradient depends on each weight, and on a bias by what comes after it.
            reached.update(step.tensors if bends else step.tensors[:1])
            bends = bends or step.bends
        return [*(i in reached for i in range(len(self.params))), bends]

    def run(self, scope: Scope, input: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Scores, with `values` for the parameters."""
        edge = before = None
        applied = False
        for i, step in enumerate(self.steps):
            module, kind, _ = step
            tensors = [None if at is None else values[at] for at in step.tensors]
            slope = step.slope
            if slope is not None:
                # What these functions make is not needed for their derivatives; and autograd lets a function with two
                # outputs change no view in place.
                fresh = module.inplace and before in _KEEP_NO_OUTPUT and not input._is_view()
                input, stands_for_input = LeakyRelu.apply(input, slope, applied or fresh, applied)
                edge, applied = (stands_for_input, slope), False
            else:
                output: Any
                if kind.run is _convolve:
                    following = self.steps[i + 1].slope if i + 1 < len(self.steps) else None
                    applied = following is not None and type(module) is nn.Conv2d
                    first = i == 0 and not scope.want_points
                    after = Act(following) if applied and following is not None else None
                    output = _convolve(scope, input, module, tensors, first, edge, after)
                else:
                    output = module(input) if kind.run is None else kind.run(scope, input, module, tensors)
                if output is NotImplemented:
                    raise Declined(type(module).__name__)
                input, edge = output, None
            before = kind.run
        return input


_KEEP_NO_OUTPUT = {_convolve, _linear, _layer_norm, _group_norm, *(k.run for k in KINDS.values() if not k.casts)}


class _NotPlain(Exception):
    """The reason why a critic is not plain."""


def find(critic: Any) -> Chain | str:
    """The chain that a critic is; else the reason why it is none."""
    if _functions() != _TORCHS_FUNCTIONS or not _FUNCTIONS_ARE_TORCHS:
        return "a function of torch's was replaced"
    if any(getattr(torch_module, f"_global{name}") for name in _HOOKS):
        return "a hook on all modules"
    steps: list[Step] = []
    places: dict[int, int] = {}
    params: list[nn.Parameter] = []
    fresh = False
    try:
        for module, kind in _leaves(critic, ""):
            tensors = [getattr(module, name) for name in kind.tensors]
            for t in tensors:
                if t is not None and id(t) not in places:
                    places[id(t)] = len(params)
                    params.append(t)
            if not fresh and getattr(module, "inplace", False):
                return "it changes the points in place"
            # All others hand on what they get, or a view of it.
            fresh = fresh or kind.run is not None or kind.bends
            steps.append(Step(module, kind, tuple(None if t is None else places[id(t)] for t in tensors)))
    except _NotPlain as reason:
        return str(reason)
    if not steps:
        return "it has no layers"
    return Chain(steps, params)


def _leaves(module: Any, path: str) -> Iterator[tuple[Any, Kind]]:
    """Modules in the order in which a critic calls them."""
    kind = type(module)
    where = f"{path or 'the critic'} ({kind.__name__})"
    known = KINDS.get(kind)
    code = _TORCHS_CODE.get(kind) or SEQUENTIALS.get(kind)
    if code is None:
        what = "is no module" if not isinstance(module, nn.Module) else "is of no class that gankern's layers know"
        raise _NotPlain(f"{where} {what}")
    if _code(kind) != code or not module.__dict__.keys().isdisjoint(_CODE):
        raise _NotPlain(f"{where} has a method that was replaced")
    if any(getattr(module, name) for name in _HOOKS):
        raise _NotPlain(f"{where} has a hook")
    if known is None:
        for name, child in module._modules.items():
            yield from _leaves(child, f"{path}.{name}" if path else name)
        return
    reason = _refusal(module, known)
    if reason is not None:
        raise _NotPlain(f"{where}: {reason}")
    yield module, known


def _is_plain(value: Any) -> bool:
    """Whether a value is a parameter that its memory alone says all of."""
    if type(value) is not nn.Parameter or value.layout != torch.strided or not value.is_floating_point():
        return False
    return value.is_leaf and value.numel() > 0 and not (value.is_inference() or value.is_neg())


def _refusal(module: Any, kind: Kind) -> str | None:
    for name, types in kind.options.items():
        value = getattr(module, name)
        for element in value if isinstance(value, tuple) else (value,):
            if type(element) not in types:
                return f"{name}={value!r}"
    for name in kind.tensors:
        value = getattr(module, name, kind)
        if value is not None and not _is_plain(value):
            return f"{name} is not a plain parameter"
    # A parametrization makes a class of its own; what was registered by hand is not read.
    return kind.refuse(module)
