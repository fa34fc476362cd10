"""Stretches of modules that one op stands for: found in the order in which they are called, and run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gankern import backends
from gankern._layout import memory_format
from gankern.nn import block
from gankern.ops.conv_act import conv2d_acts
from gankern.ops.conv_act.reference import activate, conv_shape

#: A module, or an activation that is called as a function: its name and negative slope.
Step = nn.Module | tuple[str, float]

ACTIVATIONS: dict[type, str] = {
    type(None): "none",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
}
CONVS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Stretch:
    """Steps [start, stop): a convolution, a batch norm or both, and maybe an activation."""

    start: int
    stop: int
    conv: block.Conv | None
    bn: block.Norm | None
    activation: Step | None

    def refusal(self) -> str | None:
        reason = block.refusal(self.conv, self.bn)
        if reason is None and isinstance(self.activation, nn.Module) and block.has_hooks(self.activation):
            reason = f"a hook on {type(self.activation).__name__}"
        return reason

    @property
    def act(self) -> tuple[str, float]:
        if isinstance(self.activation, tuple):
            return self.activation
        return ACTIVATIONS[type(self.activation)], getattr(self.activation, "negative_slope", 0.0)

    def run(self, input: Tensor) -> Tensor:
        return block.run_block(input, self.conv, self.bn, *self.act)


def _is_activation(step: Step) -> bool:
    return isinstance(step, tuple) or type(step) in ACTIVATIONS


def find_stretches(steps: Sequence[Step]) -> list[Stretch]:
    found = []
    position = 0
    while position < len(steps):
        start = position
        conv = bn = activation = None
        if isinstance(step := steps[position], CONVS):
            conv = step
            position += 1
        if position < len(steps) and isinstance(step := steps[position], NORMS):
            bn = step
            position += 1
        if bn is None and conv is None:
            position = start + 1
            continue
        if position < len(steps) and _is_activation(steps[position]):
            activation = steps[position]
            position += 1
        found.append(Stretch(start, position, conv, bn, activation))
    return found


def _rows(stretches: list[Stretch]) -> list[list[Stretch]]:
    """The stretches; convolutions without batch norm that follow each other in one row."""
    rows: list[list[Stretch]] = []
    for stretch in stretches:
        last = rows[-1][-1] if rows else None
        if last is not None and last.stop == stretch.start and last.bn is stretch.bn is None:
            rows[-1].append(stretch)
        else:
            rows.append([stretch])
    return rows


# Elements of its output below which a stretch without, or with batch norm costs more by calls from Python than it saves
# in passes over them, as measured; and channels up to which it saves less.
_FEW_ELEMENTS = (80_000, 230_000)
_FEW_CHANNELS = 16


def _may_be_small(input: Tensor) -> bool:
    """A backend that was asked for by name runs, whatever the size."""
    return not torch.compiler.is_compiling() and input.device.type == "cpu" and backends.requested() == "auto"


def _is_small(stretches: list[Stretch], input: Tensor) -> bool:
    """Whether stock modules are faster, by an estimate."""
    if not _may_be_small(input):
        return False
    # Stock's SyncBatchNorm does not run on the CPU.
    if input.dim() != 4 or not stretches or any(isinstance(s.bn, nn.SyncBatchNorm) for s in stretches):
        return False
    elements, few, shape = 0.0, 0, list(input.shape)
    for stretch in stretches:
        if stretch.conv is not None:
            weight, _, options, *_ = block.layer(stretch.conv, *stretch.act)
            shape = conv_shape(shape, weight.shape, options)
        elements += math.prod(shape) * min(1, shape[1] / _FEW_CHANNELS)
        few += _FEW_ELEMENTS[stretch.bn is not None]
    return elements < few


def run_steps(steps: Sequence[Step], input: Tensor) -> Tensor:
    """Call the steps one after the other, stretches among them as fused ops."""
    stretches = _fusable(steps)
    return _call(steps, input, False) if _is_small(stretches, input) else _run(steps, stretches, input)


def _fusable(steps: Sequence[Step]) -> list[Stretch]:
    return [s for s in find_stretches(steps) if s.refusal() is None]


def _run(steps: Sequence[Step], stretches: list[Stretch], input: Tensor) -> Tensor:
    # The kernels know no vmap.
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if not stretches or transformed:
        return _call(steps, input, False)
    # The CPU's convolutions are faster in channels_last; the caller and other people's modules keep their layout.
    turns = input.dim() == 4 and input.device.type == "cpu" and memory_format(input) == torch.contiguous_format
    position, turned = 0, False
    for row in _rows(stretches):
        first = row[0]
        input = _call(steps[position : first.start], input, turned)
        position = first.start
        if turns and memory_format(input) == torch.contiguous_format:
            # Turning the images there and back for it alone costs more than a convolution saves.
            if not turned and len(row) == 1 and first.bn is first.activation is None:
                continue
            turned = True
        if len(row) > 1 and input.dim() == 4:
            input = conv2d_acts(input, [block.layer(s.conv, *s.act) for s in row if s.conv is not None])
        else:
            if turns and first.bn is not None and first.conv is not None and input.dim() == 4:
                input = _channels_last(input)
            for stretch in row:
                input = stretch.run(input)
        position = row[-1].stop
    input = _call(steps[position:], input, turned)
    return input.contiguous() if turned else input


def _channels_last(input: Tensor) -> Tensor:
    # Not contiguous(), which leaves an image of one pixel as it is: convolutions go by the strides.
    turned = memory_format(input) == torch.channels_last
    return input if turned else input.clone(memory_format=torch.channels_last)


def _call(steps: Sequence[Step], input: Tensor, turned: bool) -> Tensor:
    for step in steps:
        if isinstance(step, tuple):
            input = activate(input, *step)
            continue
        ours = isinstance(step, FusedSequential)
        known = (type(step).__module__.startswith("torch.nn.") or ours) and not block.has_hooks(step)
        input = step(input.contiguous() if turned and not known and input.dim() == 4 else input)
    return input


# Sequentials that run stock, with the modules and the shape of the input for which they do.
_small: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs stretches of convolution, batch norm and activation as fused ops."""

    def forward(self, input: Tensor) -> Tensor:
        if not _may_be_small(input):
            return run_steps(list(self), input)
        # To find out what runs takes as long as a small module: once is enough.
        key = [*self._modules.values(), input.shape]
        if _small.get(self) == key:
            return super().forward(input)
        steps = list(self)
        stretches = _fusable(steps)
        if not _is_small(stretches, input):
            return _run(steps, stretches, input)
        _small[self] = key
        return super().forward(input)
