"""Programs as text: what writes them, and what a program is.

One integer is one program, in any process. A program is a list of steps, each the name of an ingredient and a seed for
its choices; an ingredient writes lines for the shape that it meets. So any step can be left out, and the rest is still
a program: that is how a failure is made small.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Most values of a sample's activation.
_MOST = 300

HEADER = """\
import math, types
import torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, parametrizations
from torch.utils.checkpoint import checkpoint
"""


class Draw:
    """Choices by a seed; the plainest of each where they are to be plain, which is the first one, or no."""

    def __init__(self, seed: int, plain: bool = False) -> None:
        self._random = random.Random(seed)
        self._plain = plain

    def one(self, *options: Any) -> Any:
        drawn = self._random.choice(options)
        return options[0] if self._plain else drawn

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability and not self._plain

    def seed(self) -> int:
        return self._random.randrange(1 << 30)

    def weighted(self, weights: dict[str, float]) -> str:
        return self._random.choices(list(weights), list(weights.values()))[0]


@dataclass(frozen=True)
class Step:
    """One ingredient, its choices and the steps inside it."""

    name: str
    seed: int
    plain: bool = False
    inner: tuple[Step, ...] = ()

    def names(self) -> Iterator[str]:
        yield self.name
        for step in self.inner:
            yield from step.names()


class Unfit(Exception):
    """An ingredient that cannot be used on the shape that it meets."""


@dataclass
class Written:
    """What all forwards of a program share."""

    tops: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    blocks: int = 0


class Writer:
    """Lines of one class, as far as they are written.

    Attributes
    ----------
    shape : tuple of int
        Of a sample of ``h``, the current activation.
    kept : list of (str, tuple of int)
        Earlier activations that have names.
    modules : list of (str, tuple of int, str)
        Attributes that are modules, the shape of their input and what they are.
    is_input : bool
        Whether ``h`` is still the input itself.
    extras : tuple of str
        Further arguments of the forward: "y" are labels, "z" is a vector.
    """

    def __init__(self, shape: tuple[int, ...], extras: tuple[str, ...], path: str, shared: Written) -> None:
        self.shape, self.extras, self.path, self.shared = shape, extras, path, shared
        self.init: list[str] = []
        self.body: list[str] = []
        self.kept: list[tuple[str, tuple[int, ...]]] = []
        self.modules: list[tuple[str, tuple[int, ...], str]] = []
        self.is_input = True
        self.indent = ""
        self._count = 0

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count - 1}"

    def line(self, *lines: str) -> None:
        self.body += [self.indent + line for line in lines]

    def top(self, name: str, text: str) -> str:
        self.shared.tops[name] = text
        return name

    def module(self, expression: str, stem: str = "m") -> str:
        name = self.name(stem)
        self.init.append(f"self.{name} = {expression}")
        self.modules.append((name, self.shape, expression))
        return name

    def parameter(self, *shape: int) -> str:
        name = self.name("p")
        self.init.append(f"self.{name} = nn.Parameter(torch.randn({shape}))")
        return f"self.{name}"

    def namespace(self) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(HEADER, names)
        for text in self.shared.tops.values():
            exec(text, names)
        return names

    def probe(self, expression: str, module: bool = False) -> tuple[int, ...]:
        """Shape of a sample that an expression of ``h`` alone gives, or a module of ``h``."""
        h = torch.linspace(-1, 1, 2 * torch.Size(self.shape).numel()).reshape(2, *self.shape)
        try:
            with warnings.catch_warnings(), torch.random.fork_rng([]), torch.no_grad():
                warnings.simplefilter("ignore")
                made = eval(expression, {**self.namespace(), "h": h})
                result = made.eval()(h) if module else made
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError) as error:
            raise Unfit(str(error)) from None
        shape = tuple(result.shape[1:])
        if result.dim() < 2 or result.size(0) != 2 or not 0 < torch.Size(shape).numel() <= _MOST or not shape:
            raise Unfit(f"shape {tuple(result.shape)}")
        return shape

    def call(self, name: str) -> None:
        self.line(f"h = self.{name}(h)")
        self.is_input = False

    def own(self) -> None:
        """Let ``h`` be something else than the input, which stock lets nobody change in place."""
        if self.is_input:
            self.line("h = h.clone()")
            self.is_input = False

    def _used_init(self) -> list[str]:
        """Without the parameters and small layers that an ingredient made and did not choose."""
        rest = "\n".join((*self.init, *self.body, *self.shared.setup))

        def used(line: str) -> bool:
            made = re.match(r"self\.([pl]\d+) = ", line)
            return made is None or len(re.findall(rf"\b{made[1]}\b", rest)) > 1

        return [line for line in self.init if used(line)]

    def text(self, name: str, signature: str) -> str:
        lines = [f"class {name}(nn.Module):"]
        init = self._used_init()
        if init:
            lines += ["    def __init__(self):", "        super().__init__()", *("        " + i for i in init)]
        lines += [f"    def forward(self, {signature}):", *("        " + line for line in self.body)]
        return "\n".join(lines) + "\n"


Ingredient = Callable[[Writer, Draw, tuple[Step, ...]], None]
INGREDIENTS: dict[str, Ingredient] = {}
#: How often each is drawn, and how many steps it has inside.
WEIGHTS: dict[str, float] = {}
INNER: dict[str, int] = {}
#: Those that networks have that nothing is special about.
USUAL: set[str] = set()


def ingredient(weight: float, *, inner: int = 0, usual: bool = False) -> Callable[[Ingredient], Ingredient]:
    def register(function: Ingredient) -> Ingredient:
        name = function.__name__
        INGREDIENTS[name], WEIGHTS[name] = function, weight
        if inner:
            INNER[name] = inner
        if usual:
            USUAL.add(name)
        return function

    return register


def write(steps: tuple[Step, ...], writer: Writer) -> None:
    """Let each step write its lines; those that do not fit write none."""
    for step in steps:
        lines = [len(part) for part in (writer.init, writer.body, writer.kept, writer.modules, writer.shared.setup)]
        state = writer.shape, writer.is_input, writer.indent
        try:
            INGREDIENTS[step.name](writer, Draw(step.seed, step.plain), step.inner)
            writer.shared.names.add(step.name)
        except Unfit:
            parts = (writer.init, writer.body, writer.kept, writer.modules, writer.shared.setup)
            for part, length in zip(parts, lines, strict=True):
                del part[length:]
            writer.shape, writer.is_input, writer.indent = state


@dataclass(frozen=True)
class Program:
    """A network and what is tried on it.

    Attributes
    ----------
    seed : int
        What it was drawn by; numbers of its inputs and weights too.
    steps : tuple of Step
        Its forward.
    head : Step
        What makes scores of the last activation.
    options : dict
        How it is run: see :class:`fuzz.checks.Options`.
    """

    seed: int
    steps: tuple[Step, ...]
    head: Step
    options: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.options["shape"]

    @property
    def extras(self) -> tuple[str, ...]:
        return self.options["extras"]

    def written(self) -> tuple[str, set[str]]:
        """The source, and the names of its ingredients."""
        shared = Written()
        writer = Writer(self.shape, self.extras, "net", shared)
        write((*self.steps, self.head), writer)
        signature = ", ".join(("x", *self.extras))
        writer.body = ["h = x", *writer.body]
        if not writer.body[-1].startswith("return"):
            writer.body.append("return h")
        net = writer.text("Net", signature)
        setup = [*shared.setup, *_as_chain(writer.body)]
        build = "\n".join(["def build():", "    net = Net()", *("    " + s for s in setup), "    return net"])
        parts = [HEADER, *shared.tops.values(), net, build + "\n"]
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n", shared.names

    @property
    def source(self) -> str:
        return self.written()[0]

    def smaller(self) -> Iterator[Program]:
        """Programs with one step less, or a plainer one."""
        for steps in _smaller(self.steps):
            yield replace(self, steps=steps)
        if not self.head.plain:
            yield replace(self, head=replace(self.head, plain=True))


def _as_chain(body: list[str]) -> list[str]:
    """The line that makes a forward of nothing but modules' calls a chain of them, which is what gankern runs whole."""
    chain = []
    for line in body[1:]:
        if line == "h = h.clone()":
            continue
        called = re.fullmatch(r"(?:h = |return )self\.(\w+)\((h|h\.flatten\(1\))\)", line)
        if called is None and line != "return h":
            return []
        if called is not None:
            chain += ["nn.Flatten(1)"] * (called[2] != "h") + [f"net.{called[1]}"]
    return [f"net = nn.Sequential({', '.join(chain)})"] if chain else []


def _smaller(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    half = len(steps) // 2
    if half > 1:
        yield steps[:half]
        yield steps[half:]
    for i, step in enumerate(steps):
        before, after = steps[:i], steps[i + 1 :]
        yield before + after
        if step.inner:
            yield before + step.inner + after
        for inner in _smaller(step.inner):
            yield (*before, replace(step, inner=inner), *after)
        if not step.plain:
            yield (*before, replace(step, plain=True), *after)
        elif step.seed:
            yield (*before, replace(step, seed=0), *after)


def draw_step(draw: Draw, weights: dict[str, float], depth: int = 0) -> Step:
    name = draw.weighted(weights)
    while name in INNER and depth > 1:
        name = draw.weighted(weights)
    inner = tuple(
        draw_step(draw, weights, depth + 1) for _ in range(draw.one(*range(1, INNER[name] + 1)) if name in INNER else 0)
    )
    return Step(name, draw.seed(), inner=inner)


__all__ = ["HEADER", "INGREDIENTS", "F", "nn", "torch"]
