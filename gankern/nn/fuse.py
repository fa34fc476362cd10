"""Fusing the modules of models as people write them."""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from gankern.nn import block, guard, stretch
from gankern.nn.conv_bn_act import ConvBnAct2d, ConvTransposeBnAct2d
from gankern.nn.stretch import RAN, SMALL, FusedSequential, Stretch, stock_class
from gankern.ops.critic_layers.chain import add_sequential

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Run:
    """Modules that one fused op can stand for.

    Attributes
    ----------
    module : str
        Qualified name of the module whose children they are.
    names : tuple of str
        Names of the children.
    reason : str or None
        Why they stay stock; None where they are fused.
    """

    module: str
    names: tuple[str, ...]
    reason: str | None


def fuse(module: M) -> M:
    """Make every fusable run of modules in a model run as a fused op, in place.

    A run is [Conv2d or ConvTranspose2d,] BatchNorm [, ReLU, LeakyReLU or Tanh], or one of the convolutions
    [, activation], in an ``nn.Sequential`` anywhere in the model. A SyncBatchNorm counts as well, and runs on the CPU
    too, where stock has none. A ``forward`` of your own stays as it is: what it calls one by one runs stock, the
    sequentials that it calls run fused. Modules, parameters, buffers, their names, hooks and ``state_dict`` keys stay
    as they are, and so do copies and pickles. Only the class of a sequential with runs in it changes, to a subclass of
    the same name.

    What cannot run fused runs stock: :func:`fusion_report` tells, and why. At each call it is made sure that all that
    would run is torch's own code on plain tensors: no hooks, no methods or functions of torch that were replaced, no
    subclasses or parametrizations, no modes or transforms. Traced, scripted, exported or compiled, a fused model is
    the stock one. So does, on the CPU, a chain where model and batch are so small that calls from Python cost more than
    the fused passes save, as for a generator's single image, and a lone convolution of contiguous images with neither
    batch norm nor activation, unless a run before it has turned them to channels_last.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    nn.Module
        The same module.

    Raises
    ------
    TypeError
        If module is not an ``nn.Module``.

    Notes
    -----
    ``DistributedDataParallel`` refuses to wrap a SyncBatchNorm on the CPU. There, wrap the model with its BatchNorm
    and convert what is inside: ``nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)``.

    A model that is saved whole, by ``torch.save(model)`` or ``pickle``, needs gankern where it is loaded; one whose
    ``state_dict`` is saved, exported or undone by :func:`unfuse` does not.
    """
    for child in _modules(module):
        found = _is_sequential(child) and not isinstance(child, FusedSequential) and _runs(child)
        if found and _cannot_extend(type(child)) is None:
            child.__class__ = _fused_class(type(child))
    return module


def unfuse(module: M) -> M:
    """Undo :func:`fuse`, in place.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    nn.Module
        The same module, with nothing of gankern in its classes.

    Raises
    ------
    TypeError
        If module is not an ``nn.Module``.
    """
    for child in _modules(module):
        if isinstance(child, FusedSequential):
            child.__class__ = stock_class(type(child))  # type: ignore[assignment]
            for name in (SMALL, RAN):
                child.__dict__.pop(name, None)
    return module


class _Fused(FusedSequential):
    """Copies and pickles name the class that `fuse` has extended, and are fused again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        args = tuple(stock_class(type(self)) if arg is type(self) else arg for arg in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name not in (SMALL, RAN)}
        return (_rebuild, (function, args), *rest)


def _rebuild(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = function(*args)
    module.__class__ = _fused_class(type(module))
    return module


def _fused_class(kind: Any) -> Any:
    """The class of a fused sequential, under the same name."""
    return _made_class(kind)


@functools.cache
def _made_class(kind: Any) -> Any:
    names = {n: getattr(kind, n) for n in ("__module__", "__qualname__", "__doc__")} | {"_gankern_stock": kind}
    made = types.new_class(kind.__name__, (_Fused, kind), {}, lambda namespace: namespace.update(names))
    if kind is nn.Sequential:
        add_sequential(made)
    return made


def _cannot_extend(kind: type[nn.Module]) -> str | None:
    """Why a class can have no subclass that its author did not write."""
    for base in kind.__mro__:
        if "__init_subclass__" in base.__dict__ and base is not object and base.__module__ != "typing":
            return f"{base.__name__} watches its subclasses"
    try:
        _fused_class(kind)
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    return None


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and stock_class(type(module)).forward is nn.Sequential.forward


def _modules(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    return list(module.modules())


def fusion_report(module: nn.Module) -> list[Run]:
    """List the convolutions and batch norms of a model: those that fuse, in runs, and why the others do not.

    The reasons: ``"not fused: call gankern.fuse"``; a hook on one of the modules, or on all; a subclass, a
    parametrization or a method that was replaced; an option, type or layout that no kernel has; a ``forward`` of the
    user's own, with its file and line; so few elements that stock is faster.

    A model that was called is reported as in its last call, which also tells what went by the input; one that was not,
    as far as is known without an input.

    Parameters
    ----------
    module : nn.Module

    Returns
    -------
    list of Run

    Raises
    ------
    TypeError
        If module is not an ``nn.Module``.
    """
    _modules(module)
    runs = []
    for name, child in module.named_modules():
        if _is_sequential(child):
            names = list(child._modules)
            runs += [Run(name, tuple(names[start:stop]), reason) for start, stop, reason in _reported(child)]
        elif isinstance(child, (ConvBnAct2d, ConvTransposeBnAct2d)):
            runs.append(Run(name, ("conv", "bn"), block.refusal(child.conv, child.bn)))
        elif not isinstance(child, _CONTAINERS) and (owned := _owned(child)):
            runs.append(Run(name, tuple(owned), _own_forward(child)))
    return runs


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def _owned(module: nn.Module) -> list[str]:
    """Names of the convolutions and batch norms that a module's own forward may call."""
    names = []
    for name, child in module._modules.items():
        if isinstance(child, guard.CONVS + guard.NORMS):
            names.append(name)
        elif isinstance(child, _CONTAINERS):
            names += [f"{name}.{inner}" for inner in _owned(child)]
    return names


def _own_forward(module: nn.Module) -> str:
    kind = type(module)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    place = "" if code is None else f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    return f"{kind.__qualname__}.forward{place} calls them one by one; fuse takes what stands in an nn.Sequential"


def _runs(module: nn.Module) -> list[Stretch]:
    """The stretches among a sequential's own children."""
    return stretch.find_stretches([(child, module, i) for i, child in enumerate(module._modules.values())])


def _reported(module: nn.Module) -> list[tuple[int, int, str | None]]:
    """First and last step of each stretch, and the reason why it stays stock."""
    runs = _runs(module)
    reason = _cannot_extend(stock_class(type(module))) or guard.state_refusal() or stretch.refusal(module)
    if reason is None and not isinstance(module, FusedSequential):
        reason = "not fused: call gankern.fuse"
    modules, ran = module.__dict__.get(RAN, ((), None))
    if reason is None and ran is not None and stretch.same_modules(modules, module):
        if ran == stretch.TOO_SMALL:
            reason = ran
        elif {(run.start, (run.stop, run.reason)) for run in runs} <= {(entry.start, entry.planned) for entry in ran}:
            return [entry[:3] for entry in ran]
    return [(run.start, run.stop, run.reason or reason or _alone(run, runs)) for run in runs]


def _alone(run: Stretch, runs: list[Stretch]) -> str | None:
    """The reason why torch runs a convolution that no other stretch could share a layout with."""
    others = any(
        s.reason is None and (not s.is_alone or run.start in (s.stop, s.start - 1)) for s in runs if s is not run
    )
    return stretch.ALONE if run.is_alone and not others else None
