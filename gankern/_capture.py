"""A whole training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gankern.dispatch import as_captured

T = TypeVar("T")


class CaptureError(RuntimeError):
    """A step that cannot be captured in a CUDA graph, with the reason."""


def capture(
    step: Callable[..., T], *inputs: Tensor, warmup: int = 3, generators: Sequence[torch.Generator] = ()
) -> CapturedStep[T]:
    """Make a training step that is launched as one CUDA graph, instead of kernel by kernel.

    Parameters
    ----------
    step : callable
        ``step(*inputs)``: for example zeroing the gradients, a critic's loss with :func:`gankern.gradient_penalty`,
        its backward and the optimizer's step. It may return a tensor, or tensors in tuples, lists and dicts.
    *inputs : Tensor
        Examples of its inputs, on one CUDA device: every later call's have their shapes, dtypes and layouts.
    warmup : int, optional
        How many first calls run the step as it is, which lets it make its buffers, compile its kernels and choose its
        algorithms; at least 1.
    generators : sequence of torch.Generator, optional
        Generators on the device that the step draws from, besides the device's own. All draws, the penalty's ``alpha``
        among them, are other ones at each replay.

    Returns
    -------
    CapturedStep
        To be called as the step is. Every call makes exactly one step.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.
    CaptureError
        When the step is captured, if it does what a graph cannot: wait for the device (``.item()``, ``print`` of a
        tensor, a learning rate read on the host), or copy from memory that is not pinned.

    Notes
    -----
    What the step returns is overwritten by the next call: clone what is to be kept. Optimizers need their
    ``capturable`` option; of :class:`gankern.optim.RMSprop`, a learning rate or bound that changes must be a tensor on
    the device. Python code in the step runs in the first ``warmup + 1`` calls only.
    """
    if not callable(step):
        raise TypeError(f"step must be callable; got {type(step).__name__}")
    if isinstance(warmup, bool) or not isinstance(warmup, int):
        raise TypeError(f"warmup must be an int; got {warmup!r}")
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1; got {warmup}")
    for i, given in enumerate(inputs):
        if not isinstance(given, Tensor):
            raise TypeError(f"inputs[{i}] must be a Tensor; got {type(given).__name__}")
        if given.device.type != "cuda":
            raise ValueError(f"inputs[{i}] must be on a CUDA device: there are no graphs elsewhere; got {given.device}")
        if given.device != inputs[0].device:
            raise ValueError(f"inputs[{i}] must be on inputs[0]'s device {inputs[0].device}; got {given.device}")
    if not inputs and not torch.cuda.is_available():
        raise ValueError("inputs must be on a CUDA device; torch finds none")
    return CapturedStep(step, inputs, warmup, generators)


class CapturedStep(Generic[T]):
    """A step that runs as it is at first and is then captured and replayed: made by :func:`capture`."""

    def __init__(
        self, step: Callable[..., T], inputs: Sequence[Tensor], warmup: int, generators: Sequence[torch.Generator]
    ) -> None:
        self._step = step
        self._inputs = [torch.empty_like(x).requires_grad_(x.requires_grad) for x in inputs]
        self._device = inputs[0].device if inputs else torch.device("cuda", torch.cuda.current_device())
        self._warmup = warmup
        self._generators = list(generators)
        self._stream: Any = None
        self._graph: Any = None
        self._output: T

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph by now."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> T:
        """Make one step.

        Parameters
        ----------
        *inputs : Tensor
            Like those that the step was captured with; copied to where the graph reads them.

        Returns
        -------
        Any
            What the step returns; overwritten by the next call.

        Raises
        ------
        TypeError, ValueError
            If the inputs are others in number, shape or dtype.
        CaptureError
            If the step cannot be captured.
        """
        self._take(inputs)
        with torch.cuda.device(self._device):
            if not self.captured:
                if self._warmup > 0:
                    self._warmup -= 1
                    return self._aside()
                self._capture()
            self._graph.replay()
        return self._output

    def _take(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._inputs):
            raise TypeError(f"inputs must be {len(self._inputs)} tensors; got {len(inputs)}")
        for i, (kept, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if not isinstance(given, Tensor):
                raise TypeError(f"inputs[{i}] must be a Tensor; got {type(given).__name__}")
            if given.shape != kept.shape or given.dtype != kept.dtype:
                raise ValueError(
                    f"inputs[{i}] must be {tuple(kept.shape)} of {kept.dtype}, as captured; got {tuple(given.shape)} "
                    f"of {given.dtype}"
                )
        with torch.no_grad():
            for kept, given in zip(self._inputs, inputs, strict=True):
                # A copy of pinned memory goes on after this returns: the caller may fill it anew by then.
                kept.copy_(given, non_blocking=not given.is_pinned())

    def _aside(self) -> T:
        """The step on the stream that it is captured on, so that its buffers belong there."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), as_captured():
            output = self._step(*self._inputs)
        here.wait_stream(self._stream)
        return output

    def _capture(self) -> None:
        try:
            graph, self._output = record(partial(self._step, *self._inputs), self._stream, self._generators)
        except Exception as error:
            raise CaptureError(
                f"step cannot be captured: {error}\nA graph cannot wait for the device: look for .item(), a printed "
                "tensor, a Python number made of one, or an optimizer without capturable=True."
            ) from error
        self._graph = graph


def record(work: Callable[[], T], stream: Any, generators: Sequence[torch.Generator] = ()) -> tuple[Any, T]:
    """A CUDA graph of some work, captured on a stream, and what the work returned.

    Where it cannot be captured, the current stream and the generators are as before.
    """
    here = torch.cuda.current_stream()
    graph = _graph(generators)
    try:
        with torch.cuda.graph(graph, stream=stream), as_captured():
            output = work()
    except BaseException:
        # torch leaves its own stream current, and generators in a state in which they draw for graphs only. The end of
        # any capture frees them, and other graphs that draw from them keep their states.
        torch.cuda.set_stream(here)
        del graph
        with suppress(RuntimeError), torch.cuda.graph(_graph(generators), stream=stream):
            torch.empty(1, device=stream.device).zero_()
        torch.cuda.set_stream(here)
        raise
    return graph, output


def _graph(generators: Sequence[torch.Generator]) -> Any:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph
