"""Fusing the modules of models as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from gankern.nn import traced
from gankern.nn.stretch import FusedSequential, find_stretches

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Run:
    """Calls that one fused op can stand for.

    Attributes
    ----------
    module : str
        Qualified name of the module whose forward makes them.
    names : tuple of str
        Names of its children that are called; an activation that is called as a function by the function's name.
    reason : str or None
        Why they stay stock; None where they are fused.
    """

    module: str
    names: tuple[str, ...]
    reason: str | None


def fuse(module: M) -> M:
    """Make every fusable run of calls in a model run as a fused op, in place.

    A run is [Conv2d or ConvTranspose2d,] BatchNorm [, ReLU, LeakyReLU or Tanh], or one of the convolutions
    [, activation]: in an ``nn.Sequential``, or in any module's own ``forward``, from attributes or lists, activations
    called as modules, functions or methods. A SyncBatchNorm counts as well, and runs on the CPU too, where stock has
    none. Modules, parameters, buffers, their names, hooks and ``state_dict`` keys stay as they are, and so do copies
    and pickles. Only the class of a module with runs in it changes, to a subclass of the same name.

    What cannot run fused runs stock: :func:`fusion_report` tells, and why. So does, on the CPU, a chain where model and
    batch are so small that calls from Python cost more than the fused passes save, as for a generator's single image,
    and a lone convolution of contiguous images with neither batch norm nor activation, unless a run before it has
    turned them to channels_last. Under ``torch.compile`` all is left to the compiler but for sequentials.

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
    A ``forward`` is traced by ``torch.fx`` when it is first called, and again when something changes that it depended
    on: the structure of its arguments or an argument that is no tensor, an attribute or global name that it reads, the
    children it has. Where that happens too often, calls in between run stock. Code of which a trace could miss
    something (a ``with`` or ``try`` block, an attribute that it sets, a random number of its own) is not traced.

    ``DistributedDataParallel`` refuses to wrap a SyncBatchNorm on the CPU. There, wrap the model with its BatchNorm
    and convert what is inside: ``nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)``.
    """
    for child in _modules(module):
        fused = isinstance(child, (FusedSequential, traced.Reclassed))
        if not fused and _fusable(child) and traced.refusal(child) is None:
            traced.fuse(child)
    return module


def unfuse(module: M) -> M:
    """Undo :func:`fuse`, in place."""
    for child in _modules(module):
        traced.unfuse(child)
    return module


def _fusable(module: nn.Module) -> bool:
    if _is_sequential(module):
        return bool(find_stretches(list(module.children())))
    return traced.has_own_forward(module)


def _is_sequential(module: nn.Module) -> bool:
    return traced.stock_class(type(module)).forward is nn.Sequential.forward


def _modules(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    return list(module.modules())


def fusion_report(module: nn.Module) -> list[Run]:
    """List the runs of a model that fuse or could, each with the reason where it stays stock.

    The reasons: ``"not fused: call gankern.fuse"``; a hook on one of the modules, or on all; an option that no kernel
    has; an output that is used more than once, or another call in between, named with the two calls that they keep
    apart; a module that is called with more than its input; a forward that was replaced on the module, or whose class
    cannot have a subclass; ``"forward cannot be traced: ..."``, once for all convolutions and batch norms of a module.

    A module that was called is reported as in the last calls, one that was not as if each argument without a default
    were a tensor.

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
        fused = isinstance(child, (FusedSequential, traced.Reclassed))
        for names, reason in _found(child):
            runs.append(Run(name, names, reason if fused or reason is not None else "not fused: call gankern.fuse"))
    return runs


def _found(module: nn.Module) -> list[tuple[tuple[str, ...], str | None]]:
    """Names of the children in each stretch, and the reason why it stays stock."""
    if not _is_sequential(module):
        return [(f.names, f.reason) for f in traced.report(module)] if traced.has_own_forward(module) else []
    names = list(module._modules)
    refusal = traced.refusal(module)
    stretches = find_stretches(list(module.children()))
    return [(tuple(names[s.start : s.stop]), refusal or s.refusal()) for s in stretches]
