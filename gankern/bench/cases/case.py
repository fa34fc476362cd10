"""What a case is, and what the rooms make theirs of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from gankern.bench.check import Results
from gankern.bench.results import OURS

Run = Callable[[], Results]
Size = Mapping[str, int]

OURS_CHANNELS_LAST = f"{OURS} channels_last"
STEPS = ("critic_step", "generator_step", "training_step")
DOUBLE_BACKWARD = "torch.compile does not support double backward (torch 2.13, as it is set by default)"
# Relative error in norm against float64; bfloat16 carries 8 bits, and a gradient sums many of its roundings.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Sides:
    """The same work several times over: what is checked is what is timed.

    Attributes
    ----------
    reference : callable
        The expected results; run once, never timed.
    stock : dict of str to callable
        Variants of stock PyTorch. One that fails or computes something else is left out, with the reason.
    ours : dict of str to callable
        The same through gankern, under "gankern" and, where stock PyTorch may choose its memory layout,
        "gankern channels_last".
    work : int
        How many `unit` one call gets through.
    unit : str
        "images" or "elements".
    tolerance : float
        Largest relative error in norm of each result.
    left_out : dict of str to str
        Stock variants that cannot do this work, and why.
    moved_bytes : int or None
        Fewest bytes that one call must read and write.
    flops : int or None
        Fewest operations of one call, where torch cannot count those of stock.
    """

    reference: Run
    stock: dict[str, Run]
    ours: dict[str, Run]
    work: int
    unit: str
    tolerance: float
    left_out: dict[str, str] = field(default_factory=dict)
    moved_bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    name : str
        ``<op>.<mode>``.
    measures : str
        One line for people.
    setup : callable
        ``setup(size, dtype, device)`` makes the inputs and the sides.
    size : mapping of str to int
        The default sizes; ``tiny`` replaces them where only correctness counts.
    not_in_main : mapping of str to str
        Stock variants that the main job has no time for, and why.
    sizes : mapping of str to sequence of int
        Sizes to sweep over, by dimension; the first dimension is the main one.
    needs : callable
        ``needs(size, dtype)``: bytes that a stock variant takes, where they grow beyond a machine's memory.
    """

    name: str
    measures: str
    setup: Callable[[Size, torch.dtype, str], Sides]
    size: Size
    tiny: Size
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    not_in_main: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    needs: Callable[[Size, torch.dtype], Mapping[str, int]] = lambda size, dtype: {}

    @property
    def group(self) -> str:
        """The op or the kind of step."""
        return self.name.partition(".")[0]

    @property
    def is_op(self) -> bool:
        """Whether it measures one op, not a step of a model."""
        return self.group not in STEPS


def gankern() -> ModuleType:
    """Import gankern at the moment of use: listing cases needs no kernels."""
    import gankern

    return gankern


def random_tensor(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(device, dtype)


def forward(function: Callable[[], Tensor]) -> Run:
    @torch.no_grad()
    def run() -> Results:
        return {"output": [function()]}

    return run


def forward_backward(
    function: Callable[[], Tensor], inputs: Mapping[str, Tensor], grad_output: Tensor, state: Sequence[Tensor] = ()
) -> Run:
    def run() -> Results:
        output = function()
        gradients = torch.autograd.grad(output, list(inputs.values()), grad_output)
        named = {f"gradient of {name}": [g] for name, g in zip(inputs, gradients, strict=True)}
        return {"output": [output], "state": state, **named}

    return run


def double_backward(function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> Run:
    def run() -> Results:
        (gradient,) = torch.autograd.grad(function(x), x, grad_output, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        return {"gradient": [gradient], "second gradient": [second]}

    return run


def least_bytes(inputs: Iterable[Tensor], output: Tensor, *, backward: bool) -> int:
    """Bytes of inputs read and an output written once; backward reads inputs and a gradient, and writes gradients."""
    read, written = sum(t.nbytes for t in inputs), output.nbytes
    return 3 * read + 2 * written if backward else read + written


def under_autocast(device: str, enabled: bool = True) -> AbstractContextManager[None]:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def to_channels_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
