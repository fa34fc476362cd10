"""Planned steps with kernels in them leave what the plain function leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import gankern
from gankern import backends
from gankern._layout import like_layout
from gankern.compiler import choice, planning
from gankern.compiler import step as step_plan
from gankern.compiler.strict import differences
from gankern.ops.conv_act import reference

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")

LATENT, SIZE = 8, 16


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with planning(True), choice.everywhere():
        yield


class Generator(nn.Module):
    """Transposed convolutions, and of a picture that is learned, which updates change, what depends on nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.seen = nn.Conv2d(16, 4, 3, 1, 1, groups=2)
        self.stem = nn.Sequential(nn.ConvTranspose2d(LATENT, 28, 4), nn.BatchNorm2d(28), nn.ReLU(inplace=True))
        self.rest = nn.Sequential(
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2)),
            *(nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()),
        )

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem(z[:, :, None, None])
        return self.rest(torch.cat([h, self.seen(self.picture).expand(len(z), -1, -1, -1)], 1))


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(LATENT, 32 * 16)
        self.first = nn.Conv2d(32, 16, 3, 1, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.shuffled = nn.Conv2d(16, 12, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(F.interpolate(self.dense(z).view(-1, 32, 4, 4), scale_factor=2))))
        return torch.tanh(F.pixel_shuffle(self.shuffled(h), 2))


def critic(*layers: nn.Module, norm: Callable[[int], nn.Module] = lambda _: nn.Identity()) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)),
        *(nn.Conv2d(16, 32, 4, 2, 1), norm(32), nn.LeakyReLU(0.2), *layers),
        *(nn.Flatten(), nn.Linear(32 * 16, 1)),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.norm, self.side, self.head = (
            nn.InstanceNorm2d(16, affine=True),
            nn.Conv2d(16, 16, 1, groups=2),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = F.avg_pool2d(self.conv(F.relu(self.norm(h))), 2) + self.side(F.avg_pool2d(h, 2))
        return self.head(F.softplus(h).mean((2, 3)))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


class Tied(nn.Module):
    """One convolution twice, and a transposed one of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv(F.leaky_relu(self.conv(self.stem(x)), 0.1)), 0.1)
        return self.head(F.conv_transpose2d(h, self.conv.weight, padding=1).amax((2, 3)))


def spectral() -> nn.Module:
    net = critic()
    spectral_norm(net[2])
    return net


def weight_normed() -> nn.Module:
    net = critic()
    weight_norm(net[2])
    return net


def partly_frozen() -> nn.Module:
    net = critic(norm=nn.BatchNorm2d)
    net[2].requires_grad_(False)
    net[3].eval()
    return net


def in_channels_last() -> nn.Module:
    net: Any = critic()
    return net.to(memory_format=torch.channels_last)


class Gan:
    def __init__(self, critic: Callable[[], nn.Module], generator: Callable[[], nn.Module] = Generator) -> None:
        torch.manual_seed(0)
        self.critic, self.generator = critic(), generator()
        self.of_critic = torch.optim.SGD(self.critic.parameters(), 1e-2, momentum=0.9)
        self.of_generator = torch.optim.Adam(self.generator.parameters(), 1e-3, eps=1e-3)

    def fake(self, real: Tensor) -> Tensor:
        return self.generator(torch.randn(len(real), LATENT, dtype=real.dtype))

    def wgan_gp(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.fake(real)
        loss = self.critic(fake).mean() - self.critic(real).mean() + gankern.gradient_penalty(self.critic, real, fake)
        self.of_critic.zero_grad()
        loss.backward()
        self.of_critic.step()
        return loss.detach()

    def r1(self, real: Tensor) -> Tensor:
        """By hand."""
        points = real.detach().requires_grad_(True)
        scores = self.critic(points)
        (grad,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
        loss = F.softplus(-scores).mean() + F.softplus(self.critic(self.fake(real).detach())).mean()
        loss = loss + grad.square().flatten(1).sum(1).mean()
        self.of_critic.zero_grad()
        loss.backward()
        self.of_critic.step()
        gankern.clip_weights_(self.critic, 0.2)
        return loss.detach()

    def both(self, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The generator's images cross an update of the critic's."""
        self.of_critic.zero_grad()
        of_real = F.softplus(-self.critic(real)).mean()
        of_real.backward()
        fake = self.fake(real)
        of_fake = F.softplus(self.critic(fake.detach())).mean()
        of_fake.backward()
        self.of_critic.step()
        self.of_generator.zero_grad()
        loss = F.softplus(-self.critic(fake)).mean()
        loss.backward()
        self.of_generator.step()
        return (of_real + of_fake).detach(), loss.detach(), fake.detach()

    def twice(self, real: Tensor) -> Tensor:
        """Two updates of a generator, whose images the second makes anew."""
        for _ in range(2):
            loss = -self.critic(self.fake(real)).mean()
            self.of_generator.zero_grad()
            loss.backward()
            self.of_generator.step()
        return loss.detach()

    def left(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in (("critic", self.critic), ("generator", self.generator)):
            found |= {f"{name} {key}": value.clone() for key, value in module.state_dict().items()}
            found |= {f"{name} {key}.grad": p.grad for key, p in module.named_parameters()}
        for name, optimizer in (("critic", self.of_critic), ("generator", self.of_generator)):
            for key, state in optimizer.state_dict()["state"].items():
                found |= {f"{name} {key} {entry}": value for entry, value in state.items()}
        return found


def named(results: Any) -> dict[Any, Any]:
    if isinstance(results, dict):
        return results
    return dict(enumerate(results if isinstance(results, tuple) else (results,)))


def near(got: Any, want: Any, tolerance: float) -> None:
    got, want = named(got), named(want)
    assert got.keys() == want.keys()
    assert not differences(got, want, tolerance)
    for name, value in want.items():
        if isinstance(value, Tensor):
            assert (got[name].stride(), got[name].dtype) == (value.stride(), value.dtype), name


CRITICS: list[Any] = [
    *(critic, lambda: critic(norm=nn.BatchNorm2d), lambda: critic(nn.Dropout2d(0.3), nn.Dropout(0.3))),
    *(lambda: critic(norm=lambda c: nn.GroupNorm(1, c)), lambda: critic(nn.LayerNorm([32, 4, 4]))),
    *(Residual, Attentive, Tied, spectral, partly_frozen, in_channels_last, weight_normed),
]
NAMES = [
    "plain",
    "batch",
    "dropout",
    "group",
    "layer",
    "residual",
    "attention",
    "tied",
    "spectral",
    "frozen",
    "last",
    "weight norm",
]


class Doubles:
    """Stands for the kernels, which know no float64: the same functions, that leave images in channels_last."""

    takes_conv = staticmethod(lambda x, weight, options: options.groups == 1)
    refuse = staticmethod(lambda *_: None)

    @staticmethod
    def conv(x: Tensor, weight: Tensor, bias: Any, options: Any, act: str, slope: float) -> Tensor:
        y = reference.activate(reference.conv(x, weight, bias, options), act, slope)
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def conv_input_grad(grad: Tensor, weight: Tensor, x: Tensor, options: Any, act: str, slope: float) -> Tensor:
        dx = reference.activate_backward(reference.conv_input_grad(grad, weight, x, options), x, act, slope)
        return dx.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def conv_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, options: Any) -> Tensor:
        return like_layout(reference.conv_weight_grad(grad, x, weight, options), weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(backends.select("critic_layers", torch.ones(1)), name)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(op: str, *tensors: Tensor) -> Any:
        return Doubles() if op == "critic_layers" else backends.select(op, *tensors)

    monkeypatch.setattr(step_plan, "backends", SimpleNamespace(select=select, requested=backends.requested))


def compare(
    method: str, make: Callable[[], Gan], dtype: torch.dtype, tolerance: float, order: Any = torch.contiguous_format
) -> Any:
    """Run a step as it is and planned, on twins; the step."""
    plain, planned = make(), make()
    for net in (plain.critic, plain.generator, planned.critic, planned.generator):
        net.to(dtype)
    step: Any = gankern.step(getattr(Gan, method))
    # Torch's fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for call in range(4):
            torch.manual_seed(call)
            x = torch.randn(6, 3, SIZE, SIZE, dtype=dtype).contiguous(memory_format=order)
            state = torch.get_rng_state()
            with planning(False):
                want = getattr(plain, method)(x)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            got = step(planned, x)
            assert torch.equal(torch.get_rng_state(), after)
            near(got, want, tolerance)
            near(planned.left(), plain.left(), tolerance)
    assert step.explain().chosen == "plan" and step._plans.hits == 3, str(step.explain())
    return step


METHODS = ["wgan_gp", "r1", "both", "twice"]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(
    ("method", "make"),
    [
        pytest.param(method, make, id=f"{method} {name}")
        for method in METHODS
        for make, name in zip(CRITICS, NAMES, strict=True)
        if method in ("wgan_gp", "both") or name in ("plain", "batch", "residual")
    ],
)
def test_exact(method: str, make: Callable[[], nn.Module]) -> None:
    step = compare(method, lambda: Gan(make), torch.float64, 1e-9)
    assert {call.kernel.partition(" ")[0] for call in step._plans.calls} >= {"conv", "conv_weight_grad"}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_a_generator_that_resizes(method: str) -> None:
    compare(method, lambda: Gan(critic, Upsampled), torch.float64, 1e-9)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS)
def test_images_in_channels_last(method: str) -> None:
    compare(method, lambda: Gan(lambda: critic(norm=nn.BatchNorm2d)), torch.float64, 1e-9, order=torch.channels_last)


@pytest.mark.parametrize("make", CRITICS[:4], ids=NAMES[:4])
@pytest.mark.parametrize("method", METHODS)
def test_kernels(method: str, make: Callable[[], nn.Module]) -> None:
    """Where rounding turns the sign of an activation, its derivative is another."""
    step = compare(method, lambda: Gan(make), torch.float32, 1e-2)
    found = {call.kernel.partition(" ")[0] for call in step._plans.calls if call.by == "cpu"}
    assert found >= {"conv", "conv_weight_grad"}


class Cast(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize("method", ["both", "twice"])
def test_inside_autocast(method: str) -> None:
    compare(method, lambda: Gan(lambda: Cast(critic())), torch.float32, 1e-1)
