"""Fusing the modules of models as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from gankern import backends
from gankern._layout import memory_format
from gankern.nn import block
from gankern.ops.conv_act import conv2d_acts
from gankern.ops.conv_act.reference import conv_shape

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Run:
    """A stretch of an ``nn.Sequential`` that a fused op can stand for.

    Attributes
    ----------
    module : str
        Qualified name of the sequential.
    names : tuple of str
        Names of its children in the stretch.
    reason : str or None
        Why it stays stock; None where it is fused.
    """

    module: str
    names: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class _Stretch:
    """Children [start, stop) of a sequential: a convolution, a batch norm or both, and maybe an activation."""

    start: int
    stop: int
    conv: block.Conv | None
    bn: block.Norm | None
    activation: nn.Module | None

    def refusal(self) -> str | None:
        reason = block.refusal(self.conv, self.bn)
        if reason is None and self.activation is not None and block.has_hooks(self.activation):
            reason = f"a hook on {type(self.activation).__name__}"
        return reason

    @property
    def act(self) -> tuple[str, float]:
        return _ACTIVATIONS[type(self.activation)], getattr(self.activation, "negative_slope", 0.0)

    def run(self, input: Tensor) -> Tensor:
        return block.run_block(input, self.conv, self.bn, *self.act)


_ACTIVATIONS: dict[type, str] = {
    type(None): "none",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
}
_CONVS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _stretches(children: list[nn.Module]) -> list[_Stretch]:
    found = []
    position = 0
    while position < len(children):
        start = position
        conv = bn = activation = None
        if isinstance(module := children[position], _CONVS):
            conv = module
            position += 1
        if position < len(children) and isinstance(module := children[position], _NORMS):
            bn = module
            position += 1
        if bn is None and conv is None:
            position = start + 1
            continue
        if position < len(children) and type(children[position]) in _ACTIVATIONS:
            activation = children[position]
            position += 1
        found.append(_Stretch(start, position, conv, bn, activation))
    return found


def _rows(stretches: list[_Stretch]) -> list[list[_Stretch]]:
    """The stretches; convolutions without batch norm that follow each other in one row."""
    rows: list[list[_Stretch]] = []
    for stretch in stretches:
        last = rows[-1][-1] if rows else None
        if last is not None and last.stop == stretch.start and last.bn is stretch.bn is None:
            rows[-1].append(stretch)
        else:
            rows.append([stretch])
    return rows


# Products of a forward pass below which batch norms cost more by calls from Python than they save, as measured.
_FEW_PRODUCTS = 2e8


def _is_small(stretches: list[_Stretch], input: Tensor) -> bool:
    """Whether stock modules are faster, by an estimate; a backend that was asked for by name runs all the same."""
    if torch.compiler.is_compiling() or backends.requested() != "auto" or input.device.type != "cpu":
        return False
    norms = [s.bn for s in stretches if s.bn is not None]
    # Stock's SyncBatchNorm does not run on the CPU.
    if input.dim() != 4 or not norms or any(isinstance(bn, nn.SyncBatchNorm) for bn in norms):
        return False
    products, shape = 0, list(input.shape)
    for stretch in stretches:
        if stretch.conv is not None:
            weight, _, options, *_ = block.layer(stretch.conv, *stretch.act)
            before, shape = shape, conv_shape(shape, weight.shape, options)
            n, _, height, width = before if options.transposed else shape
            products += n * height * width * weight.numel()
    return products < _FEW_PRODUCTS


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs stretches of convolution, batch norm and activation as fused ops."""

    def forward(self, input: Tensor) -> Tensor:
        children = list(self)
        stretches = [s for s in _stretches(children) if s.refusal() is None]
        if _is_small(stretches, input):
            return super().forward(input)
        # The CPU's convolutions are faster in channels_last; the caller and other people's modules keep their layout.
        turns = input.dim() == 4 and input.device.type == "cpu" and memory_format(input) == torch.contiguous_format
        position = 0
        for row in _rows(stretches):
            first = row[0]
            input = _run(children[position : first.start], input, turns)
            if len(row) > 1 and input.dim() == 4:
                input = conv2d_acts(input, [block.layer(s.conv, *s.act) for s in row if s.conv is not None])
            else:
                if turns and first.bn is not None and first.conv is not None and input.dim() == 4:
                    input = _channels_last(input)
                for stretch in row:
                    input = stretch.run(input)
            position = row[-1].stop
        input = _run(children[position:], input, turns)
        return input.contiguous() if turns else input


def _channels_last(input: Tensor) -> Tensor:
    # Not contiguous(), which leaves an image of one pixel as it is: convolutions go by the strides.
    turned = memory_format(input) == torch.channels_last
    return input if turned else input.clone(memory_format=torch.channels_last)


def _run(modules: list[nn.Module], input: Tensor, turns: bool) -> Tensor:
    for module in modules:
        known = type(module).__module__.startswith("torch.nn.") or isinstance(module, FusedSequential)
        input = module(input.contiguous() if turns and not known and input.dim() == 4 else input)
    return input


def fuse(module: M) -> M:
    """Make every fusable run of ``nn.Sequential`` children in a model run as a fused op, in place.

    A run is [Conv2d or ConvTranspose2d,] BatchNorm [, ReLU, LeakyReLU or Tanh], or one of the convolutions
    [, activation]. A SyncBatchNorm counts as well, and runs on the CPU too, where stock has none. Modules, parameters,
    buffers, their names and ``state_dict`` keys stay as they are; only how the sequential calls its children changes. A
    run with a hook on one of its modules, or with an option that has no kernel, runs stock: :func:`fusion_report`
    tells. So does, on the CPU, a sequential with batch norm where model and batch are so small that calls from Python
    cost more than the fused passes save, as for a generator's single image.

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
    """
    return _reclass(module, nn.Sequential, FusedSequential)


def unfuse(module: M) -> M:
    """Undo :func:`fuse`, in place."""
    return _reclass(module, FusedSequential, nn.Sequential)


def _reclass(module: M, old: type[nn.Sequential], new: type[nn.Sequential]) -> M:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    for child in module.modules():
        if type(child) is old and (new is nn.Sequential or _stretches(list(child))):
            child.__class__ = new
    return module


def fusion_report(module: nn.Module) -> list[Run]:
    """List the runs of a model that fuse or could, each with the reason where it stays stock.

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    report = []
    for name, child in module.named_modules():
        if not isinstance(child, nn.Sequential):
            continue
        names = list(child._modules)
        for stretch in _stretches(list(child)):
            reason = stretch.refusal()
            if reason is None and not isinstance(child, FusedSequential):
                plain = type(child).forward is nn.Sequential.forward
                reason = "not fused: call gankern.fuse" if plain else "the sequential has a forward of its own"
            report.append(Run(name, tuple(names[stretch.start : stretch.stop]), reason))
    return report
