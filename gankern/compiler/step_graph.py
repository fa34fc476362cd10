"""The flat graph of a whole training step: its own code, run once on fake tensors, its backward passes inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gankern import _stock, compiler
from gankern.compiler import attention
from gankern.compiler.derive import Functions, bilinear_convolutions, derive, in_place_of, leaf_like
from gankern.compiler.following import OPAQUE
from gankern.compiler.guards import Held
from gankern.compiler.norms import SECOND_ORDER
from gankern.compiler.passes.effects import mark
from gankern.compiler.refusal import Refused
from gankern.ops.gradient_penalty.autograd import is_distributed, stock_penalty

_CONSTANTS = (type(None), bool, int, float, str)


_TENSOR: Any = Tensor
_GRADIENTS = (_TENSOR.grad.__get__, _TENSOR._grad.__get__)


class _Number:
    """What ``.item()`` gives, which is known when the plan runs: it can be returned, and nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Functions(Functions):
    """Also takes the backward passes."""

    _REFUSED = (*Functions._REFUSED, "retain_grad")

    def __init__(
        self,
        substitutes: Mapping[Any, Callable[..., Any]],
        backward: Callable[..., None],
        tensors: Sequence[Tensor],
        leaves: Sequence[Tensor],
    ) -> None:
        super().__init__(substitutes, tensors, leaves)
        self._backward = backward

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is Tensor.item:
            return _Number(args[0].detach().clone())
        if func in _GRADIENTS:
            raise Refused("it reads .grad, which is known when the plan runs")
        # As stock has it, bit by bit.
        if func in attention.SUBSTITUTES:
            return func(*args, **kwargs)
        return super()._call(func, *args, **kwargs)


class Opaque:
    """A call that runs as itself: of the object that an expression finds."""

    def __init__(self, place: int, name: str, args: Any, kwargs: Any) -> None:
        self.place, self.name, self.args, self.kwargs = place, name, args, kwargs
        self.grad_mode = torch.is_grad_enabled()


class Derivation:
    """Runs a step for its graph.

    Parameters
    ----------
    call : dict
        The step as ``critic``, its ``args`` and ``kwargs``.
    held : sequence of Held
        Tensors that it reads.
    opaque : sequence
        Optimizers and modules that have calls which run as themselves.
    substitutes : mapping
        Functions of gankern's by those of torch's, outside of penalties.

    Attributes
    ----------
    effects : list of list
        What comes after each segment of the graph: opaque calls, and of a backward pass the places of tensors with
        those of their gradients among the outputs.
    outputs : list of Tensor
        What the traced function returns.
    returned : tuple
        For each leaf of what the step returns how it is made, and the structure.
    checks : list of int
        Places of outputs that are finite where the plan is right.
    switched : list of tuple
        Place of a tensor, and whether it requires a gradient afterwards.
    """

    def __init__(
        self,
        call: dict[str, Any],
        held: Sequence[Held],
        opaque: Sequence[Any],
        substitutes: Mapping[Any, Callable[..., Any]],
    ) -> None:
        self._call, self._opaque, self._substitutes = call, opaque, substitutes
        self._models = [h.tensor for h in held]
        self._modules = [h.module for h in held if h.module is not None]
        self.effects: list[list[Opaque | list[tuple[int, int]]]] = [[]]
        self.outputs: list[Tensor] = []
        self.checks: list[int] = []
        self.switched: list[tuple[int, bool]] = []
        self.returned: tuple[list[tuple[Any, ...]], Any] = ([], None)
        self._leaves: list[Tensor] = []

    def trace(self) -> fx.GraphModule:
        for m in self._models:
            if m.requires_grad and not m.is_leaf:
                raise Refused("it is given a tensor that others are to get gradients through")
        return derive(self._run, [], [m.detach() for m in self._models], known=self._models)

    def _run(self, *tensors: Tensor) -> list[Tensor]:
        self._leaves = [leaf_like(t, model) for t, model in zip(tensors, self._models, strict=True)]
        token = compiler.penalty_in_step.set(self._penalty)
        try:
            with ExitStack() as stack:
                functions = _Functions(self._substitutes, self._backward, self._models, self._leaves)
                stack.enter_context(in_place_of(self._modules, functions))
                stack.enter_context(self._intercepted())
                stack.enter_context(_stock.forwards())
                result = self._call["critic"](*self._call["args"], **self._call["kwargs"])
        finally:
            compiler.penalty_in_step.reset(token)
        if any(leaf.grad is not None for leaf in self._leaves):
            raise Refused("a backward pass that is not a tensor's backward()")
        self.returned = self._describe(result)
        self.switched = [
            (i, leaf.requires_grad)
            for i, (leaf, model) in enumerate(zip(self._leaves, self._models, strict=True))
            if leaf.requires_grad != model.requires_grad
        ]
        return self.outputs

    @contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Opaque calls of this thread are noted, and marked in the graph."""
        owner = threading.get_ident()

        def stand_in(place: int, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != owner:
                    return own(*args, **kwargs)
                self._note(place, name, args, kwargs)
                return None

            return call

        put: list[Any] = []
        try:
            for place, thing in enumerate(self._opaque):
                for name, kinds in OPAQUE.items():
                    if isinstance(thing, kinds):
                        before = vars(thing).get(name, put)
                        put.append((thing, name, before))
                        vars(thing)[name] = stand_in(place, name, getattr(thing, name))
            yield
        finally:
            for thing, name, before in reversed(put):
                if before is put:
                    del vars(thing)[name]
                else:
                    vars(thing)[name] = before

    def _note(self, place: int, name: str, args: Any, kwargs: Any) -> None:
        if not all(isinstance(a, _CONSTANTS) for a in (*args, *kwargs.values())):
            raise Refused(f"{name} is called with more than constants")
        self.effects[-1].append(Opaque(place, name, args, kwargs))
        if name != "step":
            # Nothing in the graph reads gradients.
            return
        with torch.no_grad():
            # Any parameter may be among those of the optimizer by then.
            mark([leaf for leaf in self._leaves if leaf._is_param or leaf.requires_grad], len(self.effects))
        self.effects.append([])
        stepped = {id(p) for group in self._opaque[place].param_groups for p in group["params"]}
        # Stock's backward pass raises where it needs values from before.
        torch.autograd.graph.increment_version(
            [leaf for leaf, m in zip(self._leaves, self._models, strict=True) if id(m) in stepped]
        )

    def _output(self, tensor: Tensor) -> int:
        self.outputs.append(tensor)
        return len(self.outputs) - 1

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if create_graph or inputs is not None:
            raise Refused("backward with create_graph or inputs")
        wanted = [i for i, leaf in enumerate(self._leaves) if leaf.requires_grad]
        leaves = [self._leaves[i] for i in wanted]
        if not leaves:
            raise Refused("a backward pass that reaches nothing")
        with bilinear_convolutions():
            found = torch.autograd.grad(loss, leaves, gradient, retain_graph=bool(retain_graph), allow_unused=True)
        self.checks.append(self._output(loss.detach()))
        reached = [(place, grad) for place, grad in zip(wanted, found, strict=True) if grad is not None]
        self.effects[-1].append([(place, self._output(grad)) for place, grad in reached])

    def _penalty(
        self, critic: Any, points: Tensor, inputs: Any, kwargs: Any, options: tuple[float, float, bool, bool]
    ) -> Tensor:
        """The penalty by stock autograd, of which the graph holds both orders."""
        if is_distributed(critic):
            raise Refused("a critic in DistributedDataParallel")

        def scored(*args: Any, **more: Any) -> Tensor:
            with Functions(SECOND_ORDER, self._models, self._leaves), sdpa_kernel(SDPBackend.MATH):
                scores: Tensor = critic(*args, **more)
            self.checks.append(self._output(scores.detach()))
            return scores

        return stock_penalty(scored, points, inputs, kwargs, *options)

    def _describe(self, result: Any) -> tuple[list[tuple[Any, ...]], Any]:
        leaves, spec = pytree.tree_flatten(result)
        made: list[tuple[Any, ...]] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                place = next((i for i, m in enumerate(self._models) if m is leaf), None)
                if place is not None:
                    made.append(("given", place))
                    continue
                if leaf.requires_grad and not self._is_spent(leaf):
                    raise Refused("it returns a tensor that gradients can still go through: detach it")
                made.append(("made", self._output(leaf.detach()), leaf.requires_grad))
            elif type(leaf) in _CONSTANTS:
                made.append(("constant", leaf))
            elif type(leaf) is _Number:
                made.append(("number", self._output(leaf.tensor)))
            else:
                raise Refused(f"it returns a {type(leaf).__name__}")
        return made, spec

    def _is_spent(self, tensor: Tensor) -> bool:
        """Whether a backward pass has let go of what another one through a tensor would need."""
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad]
        try:
            with disable_proxy_modes_tracing():
                torch.autograd.grad(tensor, wanted, torch.ones_like(tensor), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            return "second time" in str(error)
        return False
