"""When a fused op may stand for modules: only where all that runs is torch's own code, on plain tensors, unwatched."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as calls

from gankern import _autograd

CONVS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_CALLED: tuple[str, ...] = ("__call__", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "forward")
_CALLED += ("__getattr__", "__getattribute__")
_ALSO_CALLED: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("_conv_forward",),
    nn.ConvTranspose2d: ("_output_padding",),
    nn.SyncBatchNorm: ("_check_input_dim", "_check_non_zero_input_channels"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("_check_input_dim",)),
}
_FUNCTIONS = ("conv2d", "conv_transpose2d", "batch_norm", "relu", "relu_", "leaky_relu", "leaky_relu_")
_FUNCTION_PATHS = (
    *(f"nn.functional.{name}" for name in _FUNCTIONS),
    *("batch_norm", "relu", "relu_", "tanh", "_C._nn.leaky_relu", "_C._nn.leaky_relu_"),
)


def _is_torchs(value: Any) -> bool:
    """Whether torch defined a function, and nobody has put another in its place before gankern was imported."""
    return not isinstance(value, FunctionType) or value.__globals__["__name__"].startswith("torch.")


class Code(NamedTuple):
    """What runs when a module of a class is called, as torch defined it."""

    read: Callable[[Any], tuple[Any, ...]]
    values: tuple[Any, ...]
    #: Names that mean something else where an instance has an attribute of its own under them.
    names: frozenset[str]

    def is_patched(self, owner: Any) -> bool:
        return self.read(owner) != self.values


def _code(owner: Any, paths: tuple[str, ...]) -> Code:
    read = attrgetter(*paths)
    values = read(owner)
    methods = {name for name in dir(owner) if callable(getattr(owner, name, None))} if isinstance(owner, type) else ()
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_compiled_call_impl")
    return Code(read, values if all(map(_is_torchs, values)) else (), frozenset((*methods, *tensors)))


_TORCH = _code(torch, _FUNCTION_PATHS)
_CODE: dict[type, Code] = {kind: _code(kind, (*_CALLED, *_ALSO_CALLED.get(kind, ()))) for kind in (*CONVS, *NORMS)}


def state_refusal() -> str | None:
    """Why no module may run fused now: someone traces, transforms or watches what torch runs."""
    if (
        calls._global_forward_hooks
        or calls._global_forward_pre_hooks
        or calls._global_backward_hooks
        or calls._global_backward_pre_hooks
    ):
        return "a hook on all modules"
    reason = _autograd.onlooker()
    return "a function of torch was replaced" if reason is None and _TORCH.is_patched(torch) else reason


def _refusal(module: nn.Module, code: Code) -> str | None:
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"a hook on {type(module).__name__}"
    if code.names.isdisjoint(own):
        return None
    return f"{next(name for name in own if name in code.names)} of {type(module).__name__} was replaced"


def refusal(module: nn.Module) -> str | None:
    """Why a convolution or batch norm must be called as it is, whatever its input; None if it need not."""
    kind = type(module)
    code = _CODE.get(kind)
    if code is None:
        return _foreign(kind)
    reason = _refusal(module, code)
    if reason is not None:
        return reason
    if code.read(kind) != code.values:
        return f"a method of {kind.__name__} was replaced"
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and not (
            (type(tensor) is nn.Parameter or type(tensor) is Tensor)
            and tensor.is_leaf
            and not tensor._backward_hooks
            and tensor.layout is torch.strided
        ):
            return f"a parameter of {kind.__name__} is no plain leaf, or has a hook"
    if kind in CONVS:
        return _conv_refusal(module)
    return _norm_refusal(module)


def _foreign(kind: type) -> str:
    base = next((base for base in kind.__mro__ if base in _CODE), None)
    if base is None:
        return f"{kind.__name__} has no kernel"
    if kind.__name__ == f"Parametrized{base.__name__}":
        return f"a parametrization on {base.__name__}"
    return f"{kind.__name__} is a subclass of {base.__name__}, whose forward may be its own"


def _conv_refusal(conv: Any) -> str | None:
    if conv.padding_mode != "zeros":
        return f"padding {conv.padding!r} with padding_mode {conv.padding_mode!r} is not supported"
    for name, least in (("padding", 0), ("stride", 1), ("dilation", 1), ("output_padding", 0)):
        pair = getattr(conv, name)
        plain = type(pair) is tuple and len(pair) == 2 and type(pair[0]) is type(pair[1]) is int
        if not plain or min(pair) < least:
            return f"{name} {pair!r} is not supported"
    if conv._parameters.get("weight") is None or "bias" not in conv._parameters:
        return "it has no weight"
    return None if type(conv.groups) is int and conv.groups > 0 else f"groups is {conv.groups}"


def _norm_refusal(bn: Any) -> str | None:
    if bn.momentum is not None and not (type(bn.momentum) in (int, float) and 0 <= bn.momentum <= 1):
        return f"momentum is {bn.momentum}"
    if not (type(bn.eps) in (int, float) and 0 <= bn.eps < float("inf")):
        return f"eps is {bn.eps}"
    mean, var = bn._buffers.get("running_mean"), bn._buffers.get("running_var")
    if (mean is None) != (var is None):
        return "one running statistic is missing"
    return (
        "a running statistic requires grad" if mean is not None and (mean.requires_grad or var.requires_grad) else None
    )
