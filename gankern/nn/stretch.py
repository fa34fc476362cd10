"""Stretches of modules that one op stands for: found in the order in which they are called, and run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gankern import _stock, backends
from gankern.nn import block, guard
from gankern.nn.guard import ACTIVATIONS, CONVS, NORMS
from gankern.ops.conv_act import conv2d_acts
from gankern.ops.conv_act import cpu as conv_cpu
from gankern.ops.conv_act.reference import conv_shape

#: Names in a sequential's ``__dict__``: for what shape of input it runs stock, and what its last call ran.
SMALL, RAN = "_gankern_small", "_gankern_ran"
TOO_SMALL = "it is so small that stock is faster"
ALONE = "a convolution with nothing to fuse"


#: A module that a sequential calls, the sequential that it is a child of, and its place there.
Step = tuple[Any, nn.Module, int]


class Stretch(NamedTuple):
    """Steps [start, stop): a convolution, a batch norm or both, and maybe an activation; why they stay stock."""

    start: int
    stop: int
    conv: Any = None
    bn: Any = None
    activation: Any = None
    reason: str | None = None

    @property
    def act(self) -> tuple[str, float]:
        return ACTIVATIONS[type(self.activation)], getattr(self.activation, "negative_slope", 0.0)

    @property
    def is_alone(self) -> bool:
        """Whether it is a convolution and nothing else."""
        return self.bn is None and self.activation is None


def stretch_at(steps: Sequence[Step], start: int) -> Stretch | None:
    """The stretch that begins with a step; None where it is neither a convolution nor a batch norm."""
    module, owner, _ = steps[start]
    conv = bn = activation = None
    stop = start + 1
    if isinstance(module, CONVS):
        conv = module
    elif isinstance(module, NORMS):
        bn = module
    else:
        return None
    reason = guard.refusal(module)
    if reason is not None:
        return Stretch(start, stop, conv, bn, None, reason)

    def following(kinds: Any) -> Any:
        if stop == len(steps):
            return None
        found, its_owner, _ = steps[stop]
        return found if its_owner is owner and type(found) in kinds and guard.refusal(found) is None else None

    if conv is not None and (bn := following((nn.BatchNorm2d, nn.SyncBatchNorm))) is not None:
        stop += 1
    if bn is None and conv is not None and conv.groups != 1:
        return Stretch(start, stop, conv, None, None, f"{conv.groups} groups have no kernel")
    if (activation := following(ACTIVATIONS)) is not None:
        stop += 1
    return Stretch(start, stop, conv, bn, activation)


def find_stretches(steps: Sequence[Step]) -> list[Stretch]:
    found: list[Stretch] = []
    position = 0
    while position < len(steps):
        stretch = stretch_at(steps, position)
        if stretch is not None:
            found.append(stretch)
        position = position + 1 if stretch is None else stretch.stop
    return found


def _row_at(steps: Sequence[Step], start: int) -> list[Stretch]:
    """The stretch that begins with a step; convolutions without batch norm that follow each other in one row."""
    row: list[Stretch] = []
    while start < len(steps):
        stretch = stretch_at(steps, start)
        if stretch is None or (row and (stretch.bn is not None or stretch.reason is not None)):
            break
        row.append(stretch)
        if stretch.bn is not None or stretch.reason is not None:
            break
        start = stretch.stop
    return row


# Elements of its output below which a stretch without, or with batch norm costs more by calls from Python than it saves
# in passes over them, as measured; and channels up to which it saves less.
_FEW_ELEMENTS = (80_000, 230_000)
_FEW_CHANNELS = 16


def _is_small(steps: Sequence[Step], input: Tensor) -> bool:
    """Whether stock modules are faster, by an estimate."""
    elements, few, shape = 0.0, 0, list(input.shape)
    for stretch in find_stretches(steps):
        if stretch.reason is not None:
            continue
        # Stock's SyncBatchNorm does not run on the CPU.
        if type(stretch.bn) is nn.SyncBatchNorm or (stretch.conv is not None and len(shape) != 4):
            return False
        if stretch.conv is not None:
            shape = conv_shape(shape, stretch.conv.weight.shape, block.options(stretch.conv))
        channels = shape[1] if stretch.bn is None else stretch.bn.num_features
        elements += shape[0] * math.prod(shape[2:]) * channels * min(1, channels / _FEW_CHANNELS)
        few += _FEW_ELEMENTS[stretch.bn is not None]
    return elements < few


def _strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Of a dense tensor of a shape."""
    if channels_last:
        _, c, h, w = shape
        return c * h * w, 1, w * c, c
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _order(tensor: Tensor) -> bool | None:
    """Whether a tensor is dense in channels_last; None where it is neither that nor contiguous."""
    strides = tensor.stride()
    if strides == _strides(tensor.shape, False):
        return False
    return True if tensor.dim() == 4 and strides == _strides(tensor.shape, True) else None


def _is_ambiguous(shape: Sequence[int]) -> bool:
    """Whether images are dense in both orders: of one channel, or of one pixel."""
    return len(shape) == 4 and (shape[1] == 1 or (shape[2] == 1 and shape[3] == 1))


_FLOATS = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


def takes(input: Any) -> bool:
    """Whether kernels may be given it: a plain tensor of a type that they know."""
    return (
        (type(input) is Tensor or type(input) is nn.Parameter)
        and input.layout is torch.strided
        and input.dtype in _FLOATS.get(input.device.type, ())
        and input.numel() > 0
        and not input.is_neg()
    )


class Form(NamedTuple):
    """What is known of a tensor before it is there; `channels_last` is its order of memory in stock."""

    shape: Sequence[int]
    dtype: torch.dtype
    channels_last: bool


def _after(stretch: Stretch, given: Form, device: torch.device) -> Form | str:
    """The form of a stretch's output in stock; the reason where the stretch cannot run on its input."""
    if stretch.reason is not None:
        return stretch.reason
    made: Form | str = given
    if stretch.conv is not None:
        made = _after_conv(stretch.conv, given, device)
    if stretch.bn is not None and not isinstance(made, str):
        made = _after_norm(stretch.bn, made, device)
    # Of such an image stock's order depends on more than the input's.
    if not isinstance(made, str) and made.channels_last and device.type == "cpu" and _is_ambiguous(made.shape):
        return "an output of one channel or pixel in channels_last"
    return made


def _after_conv(conv: Any, given: Form, device: torch.device) -> Form | str:
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    shape, dtype, channels_last = given
    types = {dtype}
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        types = {torch.float32, dtype}
        if given.dtype not in types or dtype not in _FLOATS[device.type]:
            return f"autocast of {given.dtype} to {dtype}"
    for tensor in (weight, bias):
        if tensor is not None and not (tensor.dtype in types and tensor.device == device):
            return f"a {tensor.dtype} parameter on {tensor.device} for a {given.dtype} input on {device}"
    order = _order(weight)
    if order is None or weight.dim() != 4 or len(shape) != 4:
        return f"a weight {tuple(weight.shape)} of strides {weight.stride()} for an input {tuple(shape)}"
    groups, options = conv.groups, block.options(conv)
    ins, outs = weight.size(1) * groups, weight.size(0)
    if options.transposed:
        ins, outs = outs, ins
        for pad, stride, dilation in zip(options.output_padding, options.stride, options.dilation, strict=True):
            if pad >= max(stride, dilation):
                return f"output_padding is {options.output_padding}"
    if ins != shape[1] or weight.size(0) % groups or (bias is not None and bias.shape != (outs,)):
        return f"a weight {tuple(weight.shape)} for {shape[1]} channels"
    shape = conv_shape(shape, weight.shape, options)
    if min(shape) < 1:
        return f"an output {tuple(shape)}"
    return Form(shape, dtype, channels_last or order)


_DIMS: dict[type, Sequence[int]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def _after_norm(bn: Any, given: Form, device: torch.device) -> Form | str:
    shape, dtype, _ = given
    if len(shape) not in _DIMS.get(type(bn), range(2, 6)):
        return f"{len(shape)} dims"
    types, mean = set(), bn._buffers.get("running_mean")
    for tensor in (*bn._parameters.values(), mean, bn._buffers.get("running_var")):
        if tensor is None:
            continue
        types.add(tensor.dtype)
        if tensor.shape != (shape[1],) or tensor.device != device:
            return f"a {type(bn).__name__} of other channels or on another device than its input"
    if not (types <= {dtype} or (types == {torch.float32} and dtype.itemsize == 2)):
        return f"a {type(bn).__name__} of another type than its {dtype} input"
    if shape[0] * math.prod(shape[2:]) == 1 and (bn.training or mean is None) and not block.group_of(bn):
        return "one value a channel"
    return given


def _no_kernel(op: str, *tensors: Tensor) -> str | None:
    """Why no kernel of the backend in force runs an op; None where one does."""
    name = backends.requested()
    if name == "reference":
        return "the backend in force is 'reference'"
    if name == "auto" and tensors[0].device.type != "cpu":
        return f"auto leaves {op} to torch" if backends.explain_call(op, *tensors).chosen == "reference" else None
    return backends.refusal(op, "cpu" if name == "auto" else name, *tensors)


def steps_of(sequential: nn.Module) -> list[Step]:
    """The modules that a sequential calls one after the other, those of the fused sequentials in it among them."""
    steps: list[Step] = []
    for place, module in enumerate(sequential._modules.values()):
        if isinstance(module, FusedSequential) and refusal(module) is None:
            steps += steps_of(module)
        else:
            steps.append((module, sequential, place))
    return steps


class _GradientInOrder(torch.autograd.Function):
    """An image as it is, whose gradient is contiguous as in stock: people take views of that."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output.contiguous()


class Walk:
    """One call of a sequential: its steps one after the other, stretches among them as fused ops.

    On the CPU convolutions are faster in channels_last, so in between the tensor may have that order of memory. Whoever
    else sees it gets it in the order that it has in stock: `_channels_last`, or None where that is another.
    """

    def __init__(self, sequential: FusedSequential, steps: list[Step], input: Tensor) -> None:
        self._sequential = sequential
        self._steps = steps
        self._position = 0
        self._watched: str | None = None
        self._ran: list[tuple[Stretch, int, str | None]] = []
        self._receive(input)

    def _receive(self, value: Any) -> None:
        self._value = value
        self._channels_last = _order(value) if takes(value) else None

    def run(self) -> Any:
        while self._position < len(self._steps):
            row = _row_at(self._steps, self._position)
            if not (row and self._run_row(row)):
                self._call(self._steps[self._position][0])
        _note(self._steps, self._ran)
        return self._handed_out()

    def _handed_out(self) -> Any:
        """The tensor in stock's order of memory."""
        if not self._is_turned():
            return self._value
        return self._value.clone(memory_format=torch.channels_last if self._channels_last else torch.contiguous_format)

    def _is_turned(self) -> bool:
        """Whether the tensor has another order of memory than in stock."""
        value, channels_last = self._value, self._channels_last
        if channels_last is None or value.device.type != "cpu":
            return False
        return value.stride() != _strides(value.shape, channels_last)

    def _call(self, module: nn.Module) -> None:
        """Call a module as it is."""
        self._position += 1
        foreign = guard.refusal(module) is not None
        if not foreign and type(module) in guard.ELEMENTWISE and self._is_turned():
            self._value = module(self._value)
            return
        self._receive(module(self._handed_out()))
        if foreign:
            # It may have changed what follows, or the state of torch.
            self._steps = steps_of(self._sequential)
            self._watched = guard.state_refusal()

    def _run_row(self, row: list[Stretch]) -> bool:
        """Run what fits of a row; False where its first step is to be called as it is."""
        value = self._value
        fitting: list[Stretch] = []
        reason = self._watched
        if reason is None and self._channels_last is None:
            reason = "its input is none that kernels take"
        if reason is None:
            form = Form(value.shape, value.dtype, bool(self._channels_last))
            for stretch in row:
                after = _after(stretch, form, value.device)
                if isinstance(after, str):
                    reason = after
                    break
                fitting.append(stretch)
                form = after
        if fitting and (refused := self._unwanted(fitting)) is not None:
            fitting, reason = [], refused
        if not fitting:
            self._ran.append((row[0], self._position + 1, reason))
            return False
        self._run(fitting, form)
        return True

    def _unwanted(self, row: list[Stretch]) -> str | None:
        """Why stretches that fit had better be left to torch."""
        value, on_cpu = self._value, self._value.device.type == "cpu"
        first = row[0]
        if first.bn is not None:
            return _no_kernel("batch_norm_act", value)
        # Turning the images there and back for it alone costs more than a convolution saves.
        if len(row) == 1 and first.is_alone and on_cpu and _order(value) is False:
            return ALONE
        if on_cpu and torch.is_autocast_enabled("cpu") and not conv_cpu.takes_autocast():
            return "autocast needs a processor with matrix units (AMX)"
        return _no_kernel("conv2d_act", value, *[stretch.conv._parameters["weight"] for stretch in row])

    def _run(self, row: list[Stretch], form: Form) -> None:
        self._ran += [(stretch, stretch.stop, None) for stretch in row]
        self._position = row[-1].stop
        value, first = self._value, row[0]
        turns = first.conv is not None and value.device.type == "cpu" and value.dtype != torch.float64
        turns = turns and not _order(value)
        if turns and not form.channels_last and value.requires_grad and torch.is_grad_enabled():
            value = _GradientInOrder.apply(value)
        if first.bn is None:
            self._value = conv2d_acts(value, [block.layer(s.conv, *s.act) for s in row])
        else:
            # Not contiguous(), which leaves an image of one pixel as it is: convolutions go by the strides.
            value = value.clone(memory_format=torch.channels_last) if turns else value
            self._value = block.run_fused(value, first.conv, first.bn, *first.act)
        self._channels_last = form.channels_last


class Ran(NamedTuple):
    """What the children [start, stop) of a sequential ran as; `planned`: where the stretch ends, and why it is none."""

    start: int
    stop: int
    reason: str | None
    planned: tuple[int, str | None]


def _note(steps: Sequence[Step], ran: Sequence[tuple[Stretch, int, str | None]]) -> None:
    """Remember for each sequential what its modules ran as."""
    found: dict[int, tuple[nn.Module, list[Ran]]] = {id(owner): (owner, []) for _, owner, _ in steps}
    for stretch, stop, reason in ran:
        _, owner, place = steps[stretch.start]
        shift = place - stretch.start
        entry = Ran(place, stop + shift, reason, (stretch.stop + shift, stretch.reason))
        found[id(owner)][1].append(entry)
    for owner, entries in found.values():
        owner.__dict__[RAN] = tuple(owner._modules.values()), entries


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs stretches of convolution, batch norm and activation as fused ops.

    Its ``forward`` is stock's, for what traces or scripts it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kwargs or len(args) != 1 or not takes(args[0]) or _stock.is_asked():
            return super().__call__(*args, **kwargs)
        (input,) = args
        small = _known_small(self, input) if _goes_by_size(input) else False
        if not small:
            if guard.state_refusal() is not None or refusal(self) is not None:
                return super().__call__(input)
            steps = steps_of(self)
            if small is None:
                small = _is_small(steps, input)
                self.__dict__[SMALL] = input.shape, tuple(self._modules.values()), small
            if not small:
                return Walk(self, steps, input).run()
        self.__dict__[RAN] = self.__dict__[SMALL][1], TOO_SMALL
        return super().__call__(input)


def refusal(sequential: nn.Module) -> str | None:
    """Why a sequential must run as stock does, whatever its input."""
    return guard.sequential_refusal(sequential, stock_class(type(sequential)))


def _goes_by_size(input: Tensor) -> bool:
    """A backend that was asked for by name runs, whatever the size."""
    return input.device.type == "cpu" and backends.requested() == "auto"


def _known_small(sequential: nn.Module, input: Tensor) -> bool | None:
    """What was found out of an input of this shape: that takes as long as a small module, so once is enough."""
    known = sequential.__dict__.get(SMALL)
    if known is None or known[0] != input.shape or not same_modules(known[1], sequential):
        return None
    return bool(known[2])


def same_modules(modules: Sequence[Any], sequential: nn.Module) -> bool:
    """Whether a sequential still has these children."""
    return len(modules) == len(sequential._modules) and all(map(is_, modules, sequential._modules.values()))


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `fuse` made this of; itself if it did not."""
    return kind.__dict__.get("_gankern_stock", kind)
