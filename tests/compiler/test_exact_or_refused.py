"""What a capture by Dynamo alone gets wrong or leaves out: a plan follows it, or stock runs, and a step is stock's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern import penalties
from gankern.compiler import planning, strict
from gankern.compiler.cache import Plans, known_plans
from tests.compiler.test_penalty_plan import Alpha, Custom, conv_critic, images


class Pair:
    """One critic twice: its penalty by a plan where there is one, in strict mode, and by stock."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.critics = []
        for _ in range(2):
            torch.manual_seed(1)
            self.critics.append(make().double())

    def change(self, change: Callable[[Any], Any]) -> None:
        for critic in self.critics:
            change(critic)

    def agrees(self, x: Tensor, times: int = 2, **options: Any) -> None:
        tolerance = 2e-2 if options.get("autocast") else 1e-9
        for _ in range(times):
            got, want = (self._step(critic, x, i == 0, **options) for i, critic in enumerate(self.critics))
            assert not strict.differences(got, want, tolerance)

    def _step(
        self, critic: nn.Module, x: Tensor, plan: bool, autocast: bool = False, grad: bool = True
    ) -> dict[str, Any]:
        torch.manual_seed(3)
        with (
            planning("strict" if plan else False),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            loss = penalties.r1(critic, x)
        if grad:
            loss.backward()
        found: dict[str, Any] = {"loss": loss.detach(), "random state": torch.get_rng_state()}
        found |= {f"gradient of {name}": p.grad for name, p in critic.named_parameters()}
        found |= {name: b.clone() for name, b in critic.named_buffers()}
        critic.zero_grad()
        return found

    @property
    def plans(self) -> Plans:
        plans = known_plans(self.critics[0])
        assert plans is not None
        return plans


@pytest.fixture(autouse=True)
def reports(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    records = [r for r in caplog.get_records("call") if r.name == "gankern.compiler"]
    assert not [r.getMessage() for r in records if r.levelno >= logging.ERROR]


def vectors(n: int = 5) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


class Images(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = conv_critic(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_custom_function() -> None:
    pair = Pair(Custom)
    pair.agrees(vectors())
    assert pair.plans.made == 1


def _triple(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad *= 3


HOOKS: dict[str, Callable[[Any], Any]] = {
    "of a weight": lambda c: c.a.weight.register_hook(lambda g: 3 * g),
    "after accumulation": lambda c: c.a.weight.register_post_accumulate_grad_hook(_triple),
    "forward": lambda c: c.act.register_forward_hook(lambda m, i, o: o.square()),
    "forward pre": lambda c: c.a.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "backward": lambda c: c.act.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "backward pre": lambda c: c.act.register_full_backward_pre_hook(lambda m, o: (2 * o[0],)),
    "on the critic": lambda c: c.register_forward_hook(lambda m, i, o: o.square()),
}


@pytest.mark.parametrize("planned_before", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook(hook: str, planned_before: bool) -> None:
    pair, x = Pair(Alpha), vectors()
    if planned_before:
        pair.agrees(x)
    made = int(planned_before)
    pair.change(HOOKS[hook])
    pair.agrees(x)
    assert pair.plans.made == made and "hook" in str(pair.plans)


@pytest.mark.parametrize("patched", [nn.LeakyReLU, Images])
def test_a_class_patched_before_and_after(patched: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = Pair(Images), images()
    pair.agrees(x)
    forward: Any = patched.forward
    monkeypatch.setattr(patched, "forward", lambda self, x: forward(self, x).square())
    pair.agrees(x)
    assert pair.plans.made == 2


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_norms_of_weights_by_hooks(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """They write an attribute in each forward: stock runs, and the vectors are iterated as often."""

    class Wrapped(Alpha):
        def __init__(self) -> None:
            super().__init__()
            wrap(self.a)

    pair = Pair(Wrapped)
    pair.agrees(vectors(), times=3)
    assert not pair.plans.made and "changes weight" in str(pair.plans)


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Dropout(0.4),
        lambda: nn.Dropout2d(0.4),
        lambda: nn.RReLU(),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    ],
    ids=["dropout", "dropout2d", "rrelu", "batch norm", "spectral norm"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_layers_draw_and_write(layer: Callable[[], nn.Module], autocast: bool) -> None:
    pair = Pair(lambda: Images(layer()))
    x = images()
    if autocast:
        pair.change(lambda critic: critic.float())
        x = x.float()
    pair.agrees(x, times=3, autocast=autocast)
    assert pair.plans.made == 1 and pair.plans.hits == 2


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
def test_all_kinds_of_calls_in_one_process() -> None:
    pair = Pair(lambda: Images(nn.GroupNorm(2, 4), nn.Dropout(0.3)))
    kinds: list[tuple[Tensor, dict[str, Any]]] = [(images(n), {}) for n in (8, 7, 1)]
    kinds += [(images(4).to(memory_format=torch.channels_last), {}), (images(4, size=16)[:, :, ::2, ::2], {})]
    kinds += [(images(8), {"grad": False}), (images(8), {"autocast": True})]

    def every() -> None:
        for x, options in kinds:
            pair.agrees(x, times=1, **options)
        for switch in (lambda c: c.eval(), lambda c: c.body[0].requires_grad_(False)):
            pair.change(switch)
            pair.agrees(images(4), times=1)
        pair.change(lambda c: c.train().requires_grad_(True))

    every()
    made = pair.plans.made
    every()
    assert (
        pair.plans.made == made == 9 and pair.plans.hits == 9 and not any(k.reason for k in pair.plans.kinds.values())
    )
