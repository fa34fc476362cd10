"""What dicts' versions answer for is looked at no more, and every change is still seen."""

from __future__ import annotations

import copy
import enum
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.compiler.guards import Guards, make_guards
from gankern.compiler.unchanged import IS_TOLD


class Act(enum.Enum):
    tanh = 0
    softplus = 1


class Settings:
    gain = 2.0

    def __init__(self) -> None:
        self.shift, self.slopes = 0.5, [0.1, {"last": 0.3}]

    @property
    def doubled(self) -> float:
        return 2 * self.shift


class Computed(nn.Module):
    """Has attributes that no dict holds under their names."""

    held: Any

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["held"][0] if name == "computed" else super().__getattr__(name)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.computed


def scaled(h: Tensor, by: float = 1.5) -> Tensor:
    return h * by


class Reader(nn.Module):
    times = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Identity()])
        self.register_buffer("shift", torch.ones(6))
        self.settings, self.act, self.sizes, self.names = Settings(), Act.tanh, (6, (6, 1)), {"tanh"}
        self.computed_layer = Computed()
        self.computed_layer.held = [0.7]
        self.none: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)) * self.times + self.shift
        for layer in self.layers:
            h = scaled(layer(h))
        h = h * self.settings.gain + self.settings.doubled + self.settings.slopes[0] + self.settings.slopes[1]["last"]
        h = torch.tanh(h) if self.act is Act.tanh else F.softplus(h)
        h = h.view(-1, self.sizes[1][0]) if "tanh" in self.names else h.sin()
        if self.none is not None:
            h = h * self.none
        return self.last(self.computed_layer(h))


class Other(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input.square()


class OtherReader(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def _rebound(critic: Reader) -> None:
    critic.first._parameters = OrderedDict((k, nn.Parameter(p + 1)) for k, p in critic.first._parameters.items())


CHANGES: dict[str, Callable[[Reader, pytest.MonkeyPatch], Any]] = {
    "class constant": lambda c, patch: patch.setattr(Reader, "times", 4.0),
    "constant of an object's class": lambda c, patch: patch.setattr(Settings, "gain", 4.0),
    "object's attribute": lambda c, patch: setattr(c.settings, "shift", 1.5),
    "object": lambda c, patch: setattr(c, "settings", Settings()),
    "property": lambda c, patch: patch.setattr(Settings, "doubled", property(lambda s: 5.0)),
    "item of a list": lambda c, patch: c.settings.slopes.__setitem__(0, 0.9),
    "item of a dict in a list": lambda c, patch: c.settings.slopes[1].update(last=0.9),
    "enum": lambda c, patch: setattr(c, "act", Act.softplus),
    "tuple": lambda c, patch: setattr(c, "sizes", (6, (3, 2))),
    "set": lambda c, patch: c.names.clear(),
    "none": lambda c, patch: setattr(c, "none", 2.0),
    "computed attribute": lambda c, patch: c.computed_layer.held.__setitem__(0, 0.9),
    "layer of a list": lambda c, patch: c.layers.__setitem__(1, nn.Tanh()),
    "layer appended": lambda c, patch: c.layers.append(nn.Tanh()),
    "class of a layer": lambda c, patch: setattr(c.layers[1], "__class__", Other),
    "class of the critic": lambda c, patch: setattr(c, "__class__", OtherReader),
    "dict of parameters": lambda c, patch: _rebound(c),
    "evaluation of one layer": lambda c, patch: c.norm.eval(),
    "momentum": lambda c, patch: setattr(c.norm, "momentum", 0.5),
    "buffer": lambda c, patch: setattr(c, "shift", torch.zeros(6)),
    "type of a buffer": lambda c, patch: setattr(c, "shift", torch.zeros(6, dtype=torch.float64)),
    "resized": lambda c, patch: c.shift.set_(torch.ones(1, 6)),
    "frozen": lambda c, patch: c.first.weight.requires_grad_(False),
    "default of a function": lambda c, patch: patch.setattr(scaled, "__defaults__", (2.5,)),
    "code of a function": lambda c, patch: patch.setattr(scaled, "__code__", (lambda h, by=1.5: h + by).__code__),
    "hook": lambda c, patch: c.layers[1].register_forward_hook(lambda m, i, o: o * 2),
    "hook on a parameter": lambda c, patch: c.first.weight.register_hook(lambda g: g * 2),
    "another module's function": lambda c, patch: patch.setattr(F, "linear", lambda x, w, b=None: x @ w.t()),
}
# Its like is found in its place.
_ALIKE = {"object", "buffer", "dict of parameters"}


def guarded(critic: nn.Module) -> tuple[Guards, dict[str, Any]]:
    x = torch.randn(5, 4)
    return make_guards(critic, x, (), {}), {"critic": critic, "x": x, "args": (), "kwargs": {}}


@pytest.mark.skipif(not IS_TOLD, reason="dicts do not tell of attributes")
def test_a_call_like_the_last_is_looked_at_shortly() -> None:
    critic = Reader()
    guards, call = guarded(critic)
    whole: list[Any] = []
    guards._check = lambda given, check=guards._check: whole.append(given) or check(given)  # type: ignore[misc]
    assert guards.fetch(call) is not None and not whole
    critic.shift.add_(1)
    critic.train()
    assert guards.fetch(call) is not None and not whole
    critic.unread = 1  # type: ignore[assignment]
    assert guards.fetch(call) is None or whole
    call["critic"] = copy.deepcopy(critic)
    guards.fetch(call)
    assert whole


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_calls_that_were_alike(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = Reader()
    guards, call = guarded(critic)
    for _ in range(3):
        assert guards.fetch(call) is not None
    CHANGES[change](critic, monkeypatch)
    found = guards.fetch(call)
    if found is not None:
        assert change in _ALIKE
        assert {id(t) for t in found} <= {id(t) for t in (*critic.parameters(), *critic.buffers())}


def test_a_layer_that_is_gone_is_let_go() -> None:
    critic = Reader()
    guards, call = guarded(critic)
    guards.take()
    assert guards.fetch(call) is not None
    gone = weakref.ref(critic.first.weight)
    critic.first = nn.Linear(4, 6)
    gc.collect()
    assert gone() is None
    found = guards.fetch(call)
    assert found is None or critic.first.weight in set(found)


def test_a_tensor_of_the_critic_as_its_argument() -> None:
    critic = Reader()
    critic.register_buffer("points", torch.randn(5, 4))
    guards, call = guarded(critic)
    assert guards.fetch(call) is not None
    call["x"] = critic.points
    assert guards.fetch(call) is not None
