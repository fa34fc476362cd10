"""Planned steps leave what the plain function leaves, call for call, whatever is changed between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.compiler import choice, planning
from gankern.compiler import step as step_plan

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with planning(True), choice.everywhere():
        yield


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()


def conv(*layers: nn.Module) -> nn.Sequential:
    head = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), *layers, nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), head, nn.Flatten(), nn.Linear(16, 1)).double()


class Gan:
    """A user's training code."""

    def __init__(self, critic: Callable[[], nn.Module] = mlp, optimizer: Callable[..., Any] = torch.optim.Adam) -> None:
        torch.manual_seed(0)
        self.critic = critic()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
        self.critic_optimizer = optimizer(self.critic.parameters(), lr=1e-2)
        self.generator_optimizer = optimizer(self.generator.parameters(), lr=1e-2)
        self.weight = 10.0
        self.clip: float | None = None
        self.count = 0
        self.set_to_none = True

    def latent(self, real: Tensor) -> Tensor:
        return torch.randn(real.size(0), 2, dtype=real.dtype, device=real.device)

    def wgan_gp(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.generator(self.latent(real))
        loss = self.critic(fake).mean() - self.critic(real).mean()
        loss = loss + gankern.gradient_penalty(self.critic, real, fake, weight=self.weight)
        self.critic_optimizer.zero_grad(set_to_none=self.set_to_none)
        loss.backward()
        self.critic_optimizer.step()
        if self.clip is not None:
            gankern.clip_weights_(self.critic, self.clip)
        return loss.detach()

    def own_penalty(self, real: Tensor) -> dict[str, Tensor]:
        """As people write it."""
        self.critic.zero_grad()
        fake = self.generator(self.latent(real)).detach()
        alpha = torch.rand(real.size(0), 1, dtype=real.dtype, device=real.device)
        x = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
        scores = self.critic(x)
        (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True, retain_graph=True)
        penalty = ((grad.flatten(1).norm(2, dim=1) - 1) ** 2).mean() * self.weight
        real_score, fake_score = self.critic(real).mean(), self.critic(fake).mean()
        loss = fake_score - real_score + penalty
        loss.backward()
        self.critic_optimizer.step()
        return {"loss": loss, "distance": real_score.detach() - fake_score.detach()}

    def generate(self, real: Tensor) -> Tensor:
        loss = -self.critic(self.generator(self.latent(real))).mean()
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()
        return loss

    def dcgan(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks in one step; two backward passes of the critic's."""
        ones = torch.ones(real.size(0), 1, dtype=real.dtype, device=real.device)
        self.critic.zero_grad()
        of_real = F.binary_cross_entropy_with_logits(self.critic(real), ones)
        of_real.backward()
        fake = self.generator(self.latent(real))
        of_fake = F.binary_cross_entropy_with_logits(self.critic(fake.detach()), 1 - ones)
        of_fake.backward()
        self.critic_optimizer.step()
        self.generator.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self.critic(fake), ones)
        loss.backward()
        self.generator_optimizer.step()
        return (of_real + of_fake).detach(), loss.detach()

    def clipped(self, real: Tensor) -> Tensor:
        self.critic_optimizer.zero_grad()
        loss = self.critic(self.generator(self.latent(real)).detach()).mean() - self.critic(real).mean()
        loss.backward()
        self.critic_optimizer.step()
        for p in self.critic.parameters():
            p.data.clamp_(-0.1, 0.1)
        return loss.detach()

    def state(self) -> list[Any]:
        found: list[Any] = []
        for module in (self.critic, self.generator):
            found += [module.state_dict(), [p.grad for p in module.parameters()]]
            found += [[p.requires_grad for p in module.parameters()]]
        return [*found, self.critic_optimizer.state_dict(), self.generator_optimizer.state_dict()]


def same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.requires_grad, got.stride()) == (want.requires_grad, want.stride())
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, equal_nan=True)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            same(g, w)
    else:
        assert got == want


def real(n: int = 6) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def agree(
    method: str,
    *changes: Callable[[Gan], Any],
    make: Callable[[], Gan] = Gan,
    inputs: Callable[[], Tensor] = real,
    calls: int = 3,
) -> gankern.Step[..., Any]:
    """Run a step as it is and planned, on twins, with changes to both before calls; the step."""
    plain, planned = make(), make()
    step: Any = gankern.step(getattr(Gan, method))
    for number, change in enumerate((None, *changes)):
        if change is not None:
            change(plain), change(planned)
        for call in range(calls):
            torch.manual_seed(10 * number + call)
            x = inputs()
            before = torch.get_rng_state()
            with planning(False):
                want = getattr(plain, method)(x)
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            got = step(planned, x)
            assert torch.equal(torch.get_rng_state(), after)
            same(got, want)
            same(planned.state(), plain.state())
    return step


def runs_by_plan(step: gankern.Step[..., Any]) -> None:
    found = step.explain()
    assert found.chosen == "plan", str(found)


def rmsprop(params: Any, lr: float) -> Any:
    return gankern.optim.RMSprop(params, lr=lr, clip=0.05)


def sgd(params: Any, lr: float) -> Any:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, rmsprop, sgd, torch.optim.AdamW])
@pytest.mark.parametrize("method", ["wgan_gp", "generate"])
def test_optimizers(method: str, optimizer: Any) -> None:
    runs_by_plan(agree(method, make=lambda: Gan(optimizer=optimizer)))


@pytest.mark.parametrize(
    "critic",
    [
        lambda: mlp(nn.Dropout(0.5)),
        lambda: mlp(nn.BatchNorm1d(8)),
        lambda: mlp(nn.LayerNorm(8)),
        lambda: conv(),
        lambda: conv(nn.BatchNorm2d(4)),
        lambda: conv(nn.InstanceNorm2d(4, affine=True), nn.Dropout2d(0.3)),
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 1)
        ).double(),
    ],
    ids=["dropout", "batch", "layer", "conv", "conv batch", "conv instance", "spectral"],
)
@pytest.mark.parametrize("method", ["wgan_gp", "own_penalty", "generate", "dcgan", "clipped"])
def test_critics(method: str, critic: Callable[[], nn.Module]) -> None:
    runs_by_plan(agree(method, make=lambda: Gan(critic, sgd)))


def set_lr(gan: Gan) -> None:
    for group in gan.critic_optimizer.param_groups:
        group["lr"] = 3e-3


def other_weights(gan: Gan) -> None:
    gan.critic.load_state_dict({k: v + 0.1 for k, v in gan.critic.state_dict().items()})


def assigned_weights(gan: Gan) -> None:
    gan.critic.load_state_dict({k: v + 0.1 for k, v in gan.critic.state_dict().items()}, assign=True)
    gan.critic_optimizer = torch.optim.Adam(gan.critic.parameters(), lr=1e-2)


def other_state(gan: Gan) -> None:
    state = gan.critic_optimizer.state_dict()
    state["state"] = {k: {n: 2 * t for n, t in own.items()} for k, own in state["state"].items()}
    gan.critic_optimizer.load_state_dict(state)


def frozen(gan: Gan) -> None:
    gan.critic[0].weight.requires_grad_(False)


def grads_of_zero(gan: Gan) -> None:
    gan.set_to_none = False


def no_grads(gan: Gan) -> None:
    for p in gan.critic.parameters():
        p.grad = None


def own_grads(gan: Gan) -> None:
    """Left by somebody else, one in another order of memory."""
    for p in gan.critic.parameters():
        p.grad = torch.ones_like(p)
    gan.critic[0].weight.grad = torch.ones(4, 8, dtype=torch.float64).t()


def other_layer(gan: Gan) -> None:
    gan.critic[1] = nn.Tanh()


def other_critic(gan: Gan) -> None:
    torch.manual_seed(1)
    gan.critic = mlp(nn.ReLU())
    gan.critic_optimizer = torch.optim.Adam(gan.critic.parameters())


def data_swapped(gan: Gan) -> None:
    gan.critic[0].weight.data = gan.critic[0].weight.data.t().contiguous().t() * 2


def forward_hook(gan: Gan) -> None:
    gan.critic[0].register_forward_hook(lambda module, args, output: 2 * output)


def tensor_hook(gan: Gan) -> None:
    gan.critic[0].weight.register_hook(lambda grad: 2 * grad)


def accumulate_hook(gan: Gan) -> None:
    def triple(p: Tensor) -> None:
        p.grad *= 3  # type: ignore[operator]

    gan.critic[0].weight.register_post_accumulate_grad_hook(triple)


def optimizer_hook(gan: Gan) -> None:
    def scale(optimizer: Any, args: Any, kwargs: Any) -> None:
        gan.weight *= 0.5

    gan.critic_optimizer.register_step_post_hook(scale)


def patched_step(gan: Gan) -> None:
    own = gan.critic_optimizer.step

    def step() -> None:
        gan.weight += 1
        own()

    gan.critic_optimizer.step = step


def scheduled(gan: Gan) -> None:
    torch.optim.lr_scheduler.StepLR(gan.critic_optimizer, 1)


CHANGES = [
    *(set_lr, other_weights, assigned_weights, other_state, frozen, grads_of_zero, no_grads, own_grads, other_layer),
    *(other_critic, data_swapped, forward_hook, tensor_hook, accumulate_hook, optimizer_hook, patched_step, scheduled),
    *(lambda gan: gan.critic.eval(), lambda gan: gan.generator.eval(), lambda gan: setattr(gan, "weight", 3.0)),
    *(lambda gan: setattr(gan, "clip", 0.02), lambda gan: gan.critic_optimizer.param_groups[0].update(maximize=True)),
    lambda gan: setattr(gan, "critic_optimizer", sgd(gan.critic.parameters(), 1e-2)),
    lambda gan: gan.critic_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: Callable[[Gan], Any]) -> None:
    step = agree("wgan_gp", change, make=lambda: Gan(lambda: mlp(nn.Dropout(0.5))), calls=2)
    assert step._plans.made >= 1


def test_shapes() -> None:
    plain, planned, step = Gan(), Gan(), gankern.step(Gan.wgan_gp)
    for call, n in enumerate((6, 3, 2, 6, 3, 2)):
        torch.manual_seed(call)
        x = real(n)
        state = torch.get_rng_state()
        with planning(False):
            want = plain.wgan_gp(x)
        torch.set_rng_state(state)
        same(step(planned, x), want)
        same(planned.state(), plain.state())
    assert (step._plans.made, step._plans.hits) == (3, 3)


def test_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that runs what was captured again, on what lies where it lay then."""
    captured: list[Any] = []

    def record(work: Callable[[], list[Tensor]], stream: Any) -> Any:
        with torch.random.fork_rng():
            outputs = work()
        captured.append(outputs)

        def replay() -> None:
            for kept, now in zip(outputs, work(), strict=True):
                kept.copy_(now)

        return SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(step_plan, "record", record)
    monkeypatch.setattr(step_plan, "can_capture", lambda device: True)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (("Stream", lambda device: stream), ("current_stream", lambda device: stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())

    def make() -> Gan:
        gan = Gan(optimizer=sgd)
        # Where work runs once more to be recorded, statistics would be written once more.
        gan.generator.eval()
        return gan

    step = agree("dcgan", set_lr, grads_of_zero, data_swapped, own_grads, make=make, calls=6)
    graphs = [s.graph for p in step._plans.plans for s in p._segments if s.graph is not None]
    assert any(g.is_captured for g in graphs)
    assert len(captured) > len(step._plans.plans)
