"""What a plan depends on, checked at each call.

Dynamo traces the critic's forward and guards whatever that reads in Python: attributes, globals, closures, layers, the
tensors' metadata, torch's global state. Its graph is not used. :class:`_World` checks what Dynamo's guards leave out:
hooks, functions and methods that were replaced, and the environment.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards, dict_version
from torch._ops import HigherOrderOperator
from torch.nn.modules import module as module_hooks
from torch.nn.parameter import is_lazy

from gankern.compiler import origins
from gankern.compiler.derive import lock
from gankern.compiler.refusal import Refused
from gankern.compiler.unchanged import IS_TOLD, Unchanged, dict_of

_GLOBAL_HOOKS = [
    value
    for name, value in vars(module_hooks).items()
    if name.startswith("_global_") and name.endswith("hooks") and isinstance(value, dict)
]
# Py_TPFLAGS_HEAPTYPE: classes of Python's.
_CAN_BE_PATCHED = 1 << 9
# Values that a forward reads are constants of its graph, guarded each.
_CONFIG = {"specialize_float": True, "specialize_int": True, "skip_nnmodule_hook_guards": False}
_ENVIRONMENT: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _NotTraced(Exception):
    pass


def _call(critic: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
    # Where Dynamo is off or gives up it runs the code itself: the critic must not run for nothing.
    if not torch.compiler.is_compiling():
        raise _NotTraced
    return critic(x, *args, **kwargs)


def is_hooked() -> bool:
    """Whether a hook is on all modules, which sees what runs."""
    return any(_GLOBAL_HOOKS)


class _Namespace:
    """The functions and descriptors of a class or module; what else it has Dynamo guards where the forward reads it."""

    def __init__(self, owner: Any) -> None:
        now: dict[str, Any] = dict_of(owner) if isinstance(owner, type) else vars(owner)
        self.now, self._names = now, list(now)
        self._version = dict_version(now)
        functions = [name for name, value in now.items() if callable(value) or hasattr(value, "__get__")]
        # All have a docstring, if None; not all have functions.
        self._read = itemgetter("__doc__", *functions)
        self._then = self._read(now)
        # IPython's autoreload puts new code into functions that are there.
        given = [getattr(now[name], "fget", getattr(now[name], "__func__", now[name])) for name in functions]
        own = (f for f in given if isinstance(f, types.FunctionType) and not str(f.__module__).startswith("torch."))
        self.codes = [(f, f.__code__) for f in own]

    def holds(self) -> bool:
        version = dict_version(self.now)
        if version != self._version:
            if [*self.now] != self._names or self._read(self.now) != self._then:
                return False
            self._version = version
        return all(f.__code__ is code for f, code in self.codes)


class _Names:
    """The names in a module's dict, as long as there is the module."""

    def __init__(self, module: nn.Module) -> None:
        now = vars(module)
        self._then, self._version = set(now), dict_version(now)
        # The dict has the layers and tensors, which plans must not keep alive.
        self._now = now_ = [now]
        self._module = weakref.ref(module, lambda _: now_.clear())

    def hold(self) -> bool:
        for now in self._now:
            version = dict_version(now)
            if version != self._version or not IS_TOLD:
                if now.keys() != self._then:
                    return False
                self._version = version
        return True


def _environment() -> dict[bytes, bytes]:
    """The environment without what Inductor and Triton leave there when they first compile something."""
    return {
        k: v for k, v in _ENVIRONMENT.items() if not k.startswith((b"TORCHINDUCTOR_", b"_TORCHINDUCTOR_", b"TRITON_"))
    }


class _World:
    """What the forward runs, hooks on its modules and tensors, facts about these, and the environment.

    Parameters
    ----------
    modules : sequence of nn.Module
    objects : sequence
        What else the forward reads: methods are looked up in classes, which Dynamo does not guard.
    tensors : sequence of Tensor
    """

    def __init__(self, modules: Sequence[nn.Module], objects: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        for m in modules:
            # A function that stands in an instance shadows a method.
            for name, value in vars(m).items():
                if callable(value) and not isinstance(value, type) and hasattr(type(m), name):
                    raise Refused(f"{name} was replaced on {type(m).__name__}")
        types_of = {value if isinstance(value, type) else type(value) for value in (*modules, *objects)}
        classes = {base for found in types_of for base in found.__mro__ if base.__flags__ & _CAN_BE_PATCHED}
        self._namespaces = [_Namespace(owner) for owner in (F, *({Tensor} | classes))]
        self._instances = [_Names(m) for m in modules]
        self._environment, self._version = _environment(), dict_version(_ENVIRONMENT)
        #: Dicts that are empty as long as there are no hooks.
        self.hooks: list[Any] = [*_GLOBAL_HOOKS, *(vars(m)[name] for m in modules for name in _MODULE_HOOKS)]
        if any(self.hooks) or any(map(_is_hooked, tensors)):
            raise Refused("a hook on one of its modules or parameters")
        #: Dicts whose versions tell whether anything has changed, but for hooks and code.
        self.dicts: list[dict[Any, Any]] = [_ENVIRONMENT, *(namespace.now for namespace in self._namespaces)]
        self.codes = [pair for namespace in self._namespaces for pair in namespace.codes]

    def holds(self) -> bool:
        return (
            self._environment_holds()
            and not any(self.hooks)
            and all(namespace.holds() for namespace in self._namespaces)
            and all(names.hold() for names in self._instances)
        )

    def _environment_holds(self) -> bool:
        version = dict_version(_ENVIRONMENT)
        if version != self._version:
            if _environment() != self._environment:
                return False
            self._version = version
        return True


class _Tensors:
    """What the graph takes for granted of its tensors; Dynamo of torch 2.8 does not see one frozen."""

    def __init__(self, x: Tensor, tensors: Sequence[Tensor]) -> None:
        self._check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self._different = len({id(x), *map(id, tensors)})

    def hold(self, x: Tensor, tensors: Sequence[Tensor]) -> bool:
        return (
            self._check(*tensors)
            and not any(map(_is_hooked, tensors))
            and len({id(x), *map(id, tensors)}) == self._different
        )


def _is_hooked(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


class Held(NamedTuple):
    """A tensor that the forward reads, the expression that finds it, and the module that has it, if one has."""

    source: str
    tensor: Tensor
    module: nn.Module | None


def modules_of(critic: Any, held: Sequence[Held]) -> dict[str, nn.Module]:
    """Modules by the names that reports have for them: in the critic, or of a function's those that have tensors."""
    if isinstance(critic, nn.Module):
        return dict(critic.named_modules())
    return {_IN_MODULE.sub(r"\1", h.source): h.module for h in held if h.module is not None}


class Guards:
    """When a plan may run, and where its tensors are.

    Attributes
    ----------
    held : list of Held
        Tensors that the forward read when the guards were made, the points left out; until somebody takes them.
    objects : list
        What else it read; so long, too.
    """

    def __init__(
        self,
        critic: Any,
        function: types.FunctionType,
        tree: Any,
        call: dict[str, Any],
        held: list[Held],
        objects: Sequence[Any],
    ) -> None:
        # The guards live as long as the function that they belong to.
        self._function = function
        self._check: Callable[[Any], bool] = tree.check
        code = f"lambda L, G: ({''.join(h.source + ', ' for h in held)})"
        self._fetch: Callable[[Any, Any], tuple[Tensor, ...]] = eval(code, {"__builtins__": {}})
        roots = [critic, *(h.module for h in held), *objects]
        modules = {m: None for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        tensors = [h.tensor for h in held]
        self._world = world = _World(list(modules), objects, tensors)
        self._tensors = _Tensors(call["x"], tensors)
        scope = {"L": call, "G": function.__globals__}
        self._unchanged = Unchanged(tree, critic, scope, list(modules), world.dicts, world.hooks, tensors)
        self._then: Any = None
        self.held = held
        self.objects = list(objects)

    def take(self) -> list[Held]:
        """The tensors of `held`, once: plans keep nothing alive."""
        held, self.held, self.objects = self.held, [], []
        return held

    def fetch(self, call: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """The tensors of `held` as they are now; None where the plan is not for this call."""
        now = self._unchanged.now(call["critic"])
        same = now is not None and now == self._then and all(f.__code__ is code for f, code in self._world.codes)
        if not (self._unchanged.check if same else self._check)(call):
            return None
        # A default device is a mode, which would see each look at a tensor.
        with torch._C.DisableTorchFunction():
            tensors = self._fetch(call, self._function.__globals__)
            if not self._tensors.hold(call["x"], tensors):
                return None
        if not same and not self._world.holds():
            # Another thread that derives has methods of its own in classes, until it lets go.
            with lock:
                if not self._world.holds():
                    return None
        self._then = now
        return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Traced(Exception):
    pass


_number = itertools.count()


def _lasting_change(classes: Iterable[type]) -> str | None:
    """What the forward of classes that Dynamo is tracing changes besides tensors: a replay would not."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    output: Any = InstructionTranslator.current_tx().output
    if output.random_calls:
        return "the forward draws from Python's random numbers"
    effects = output.side_effects
    if effects.tensor_hooks:
        return "the forward registers a hook on a tensor"
    for changed in effects._get_modified_vars():
        if not isinstance(changed.mutation_type, AttributeMutationExisting | ValueMutationExisting):
            continue
        # The derivation sees whether a module's buffers are others afterwards.
        if getattr(changed.source, "member", None) not in ("_buffers", "_parameters"):
            names = effects.store_attr_mutations.get(changed, {})
            where = origins.at_store(classes, names)
            return f"the forward changes {', '.join(names) or 'a value'} of something that outlives it{where}"
    return None


# Of such a tuple Dynamo's guard keeps the very list that is in it, and sees no change (torch 2.13).
_OPEN_TUPLE = re.compile(r" == \(.*[\[{]")


def _name(source: Any) -> str:
    """The expression of a source or guard, a method up to torch 2.9."""
    return source.name if isinstance(source.name, str) else source.name()


def _guarded() -> Iterator[str]:
    """Expressions for what the forward that Dynamo is tracing has read."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output: Any = InstructionTranslator.current_tx().output
    return map(_name, output.guards)


# How Dynamo writes the way to a module's parameter or buffer.
_IN_MODULE = re.compile(r"(.*)\._(?:parameters|buffers)\['[^']*'\]")


def _holder(source: str, call: dict[str, Any], scope: dict[str, Any]) -> nn.Module | None:
    match = _IN_MODULE.fullmatch(source)
    module = eval(match[1], {"L": call, "G": scope}) if match else None
    return module if isinstance(module, nn.Module) else None


def _values(sources: set[str], scope: dict[str, Any]) -> Iterator[Any]:
    for source in sources:
        # Of some Dynamo guards that they are not there, and up to torch 2.11 names what it only looked for.
        with suppress(AttributeError, KeyError, IndexError):
            yield eval(source, scope)


def make_guards(
    critic: Any,
    x: Any,
    args: Any,
    kwargs: Any,
    *,
    run: types.FunctionType = _call,  # type: ignore[assignment]
    followed: AbstractContextManager[Any] | None = None,
) -> Guards:
    """Guards for calls like this one.

    Parameters
    ----------
    critic, x, args, kwargs
        What is called, its first argument and the others.
    run : function, optional
        Makes the call. Another one may read tensors from anywhere.
    followed : context manager, optional
        In which Dynamo traces.

    Raises
    ------
    Refused
        Where Dynamo cannot follow the forward, the forward changes something in Python, or somebody has hooks on it.
    """
    from torch._dynamo import eval_frame
    from torch._dynamo.exc import TorchDynamoException

    if isinstance(critic, nn.Module) and any(map(is_lazy, itertools.chain(critic.parameters(), critic.buffers()))):
        raise Refused("it has parameters whose shapes its first forward finds")
    # A code object of its own: Dynamo keeps its entries there, and a limited number of them.
    name = f"gankern_plan_{next(_number)}"
    function = types.FunctionType(run.__code__.replace(co_name=name), dict(run.__globals__), name)
    call = {"critic": critic, "x": x, "args": args, "kwargs": kwargs}
    held: list[Held] = []
    names: set[str] = set()
    reasons: list[str] = []

    # Dynamo keeps the backend, which must not keep the critic.
    kinds = [type(m) for m in critic.modules()] if isinstance(critic, nn.Module) else []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        reason = _lasting_change(kinds)
        if reason is not None:
            reasons.append(reason)
        names.update(_guarded())
        for node in graph.graph.nodes:
            if isinstance(node.target, HigherOrderOperator) and node.target.name() != "autograd_function_apply":
                # A checkpoint, say: it runs again in the backward pass, with the random numbers of before.
                reasons.append(f"the forward calls {node.target.name()}")
            if getattr(getattr(node.target, "f", None), "__module__", "") == "torch._numpy.random":
                reasons.append("the forward draws from numpy's random numbers")
            argument = node.meta.get("grapharg") if node.op == "placeholder" else None
            if argument is None:
                continue
            source = _name(argument.source)
            if not isinstance(argument.example, Tensor):
                reasons.append(f"the forward computes with {source}, which is no tensor")
            elif source != "L['x']":
                held.append(Held(source, argument.example, _holder(source, call, function.__globals__)))

        def stop(*flat: Any) -> Any:
            raise _Traced

        return stop

    try:
        # Dynamo looks at gradients of tensors that are no leaves, say.
        with torch._dynamo.config.patch(_CONFIG), _quiet(), followed or nullcontext():
            torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(critic, x, args, kwargs)
    except _Traced:
        pass
    except _NotTraced:
        raise Refused("Dynamo is switched off, or finds no operator of torch in its forward") from None
    except TorchDynamoException as error:
        told = f"its forward cannot be guarded: {str(error).splitlines()[0]}"
        raise Refused(told + origins.at(error)) from None
    else:
        raise Refused("its forward computes nothing that a graph could hold")
    if reasons:
        raise Refused(reasons[0])
    for h in held:
        if type(h.tensor) not in (Tensor, nn.Parameter):
            raise Refused(f"{h.source} is a {type(h.tensor).__name__}")
        if run is _call and h.module is None and not h.source.startswith(("L['args']", "L['kwargs']")):
            raise Refused(f"{h.source} is no parameter, buffer or argument")
    (entry,) = eval_frame._debug_get_cache_entry_list(function.__code__)
    for part in entry.guard_manager.code_parts:
        if _OPEN_TUPLE.search(part):
            raise Refused(f"the forward reads a tuple that holds what can be changed in place: {part}")
    scope = {"L": call, "G": function.__globals__, **(entry.guard_manager.closure_vars or {})}
    objects = list(_values(names - {""}, scope))
    for value in objects:
        # Dynamo looks through the cache, in which other calls leave what no guard knows.
        if isinstance(value, functools._lru_cache_wrapper) and not f"{value.__module__}.".startswith("torch."):
            raise Refused(f"the forward calls {value.__name__}, which functools.lru_cache remembers results of")
    guards = Guards(critic, function, entry.guard_manager.root, call, list(held), objects)
    if guards.fetch(call) is None:
        raise Refused("its guards do not hold for the call that they were made for")
    # Dynamo keeps the backend.
    held.clear()
    call.clear()
    return guards
