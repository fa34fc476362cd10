"""Plans of fused modules: outputs, gradients and buffers are stock's, and so is whatever a plan is not for."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.compiler import choice
from gankern.compiler.forward import ForwardPlan
from gankern.compiler.fused import plans_of


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with choice.everywhere():
        yield


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 4, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 4, 2, 1)
        self.last = nn.Conv2d(4, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.down(x)), 0.2, inplace=True)
        h = torch.cat([torch.relu(self.up(h)), x], 1)
        return torch.tanh(self.last(F.interpolate(h, scale_factor=2.0)))


def generator() -> nn.Module:
    layers = [nn.Unflatten(1, (3, 1, 1)), nn.ConvTranspose2d(3, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1, True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh())


def critic() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.3), nn.BatchNorm2d(4, 0.8)]
    layers += [nn.Conv2d(4, 6, 3, 1, 1, groups=2), nn.InstanceNorm2d(6, affine=True), nn.ELU(True), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 1))


def deep() -> nn.Module:
    """Norms and activations between convolutions, in each order."""
    layers: list[nn.Module] = []
    for act in (nn.LeakyReLU(0.2, True), nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.1)):
        layers += [nn.Conv2d(2 if not layers else 16, 16, 3, 1, 1), nn.BatchNorm2d(16), act]
    layers += [nn.Conv2d(16, 16, 3, 1, 1), nn.LeakyReLU(0.3), nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 16, 3, 1, 1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1))


class Equalised(nn.Module):
    """Convolutions of functions, of weights that are scaled in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.blur = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.rand(4, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(F.conv2d(x, self.weight * 0.3, padding=1), 0.2) * 1.4
        return F.conv2d(F.pad(h, (1, 2, 1, 2)), self.blur / self.blur.sum(), groups=4)


class Rewrites(nn.Module):
    """Writes into a norm's input behind autograd's back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        y = torch.relu(self.norm(h))
        h.data.mul_(1.3)
        return self.last(y)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "skips": (Skips, (3, 2, 8, 8)),
    "generator": (generator, (5, 3)),
    "critic": (critic, (3, 2, 8, 8)),
    "deep": (deep, (3, 2, 6, 6)),
    "rewrites": (Rewrites, (3, 2, 6, 6)),
    "equalised": (Equalised, (3, 2, 6, 6)),
}


def step(net: nn.Module, x: Tensor, weight: Tensor | None, *args: Any) -> dict[str, Tensor | None]:
    """Output and all that a step changes."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_(x.requires_grad)
    output = net(x, *args)
    found: dict[str, Tensor | None] = {"output": output.detach()}
    if output.requires_grad and weight is not None:
        (output * weight).sum().backward()
        found |= {n: p.grad for n, p in net.named_parameters()} | {"x": x.grad}
        for p in net.parameters():
            p.grad = None
    return found | {n: b.clone() for n, b in net.named_buffers()} | {"random": torch.get_rng_state()}


def same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        found = got[name]
        assert (found is None) == (value is None), name
        if found is not None and value is not None:
            rtol, atol = (1e-9, 1e-11) if value.dtype == torch.float64 else (2e-3, 5e-4)
            torch.testing.assert_close(found, value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
            assert found.stride() == value.stride(), name


def agrees(net: nn.Module, x: Tensor, *args: Any, hits: int = 2) -> nn.Module:
    ours = gankern.fuse(copy.deepcopy(net))
    weight = torch.randn_like(copy.deepcopy(net)(x, *args))
    for _ in range(2):
        same(step(ours, x, weight, *args), step(net, x, weight, *args))
    plans = plans_of(ours)
    assert plans.made == 1 and plans.hits == hits - 1, str(plans.kinds)
    return ours


@pytest.mark.parametrize("wants", [False, True], ids=["leaf", "wants"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["float64", "float32", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_module_computes_stocks_values(name: str, training: bool, wants: bool, kind: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    # Of float64 in channels_last stock's strides are others than fake tensors have; convolutions have no kernel for it.
    dtype, channels_last = torch.float64 if kind == "float64" else torch.float32, kind == "channels_last"
    net, x = make().to(dtype).train(training), torch.randn(shape, dtype=dtype)
    if channels_last and len(shape) == 4:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    agrees(net, x.requires_grad_(wants))
    if not wants:
        with torch.no_grad():
            agrees(net, x)


@pytest.mark.parametrize("spectral", [False, True])
def test_what_somebody_differentiates_twice_is_stocks(spectral: bool) -> None:
    torch.manual_seed(0)
    net = critic().double()
    if spectral:
        nn.utils.parametrizations.spectral_norm(net[0])
    ours = gankern.fuse(copy.deepcopy(net))
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)

    def penalty(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        points = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        loss = (grad.flatten(1).norm(2, 1) - 1).square().mean()
        params = list(net.parameters())
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        found = [grad.detach(), loss.detach(), *(torch.zeros(()) if g is None else g for g in grads)]
        return found + [b.clone() for b in net.buffers()] + [torch.get_rng_state()]

    for turn in range(3):
        for got, want in zip(penalty(ours), penalty(net), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        assert plans_of(ours).hits == 0 or turn == 0
    assert "differentiated" in str(plans_of(ours).kinds)


ENDS: dict[str, Callable[[], list[nn.Module]]] = {
    "norm, relu": lambda: [nn.BatchNorm2d(4), nn.ReLU()],
    "norm, tanh": lambda: [nn.BatchNorm2d(4), nn.Tanh()],
    "norm, leaky relu": lambda: [nn.BatchNorm2d(4), nn.LeakyReLU(0.2)],
    "norm, leaky relu in place": lambda: [nn.BatchNorm2d(4), nn.LeakyReLU(0.2, True)],
    "norm": lambda: [nn.BatchNorm2d(4)],
    "relu": lambda: [nn.ReLU()],
    "leaky relu": lambda: [nn.LeakyReLU(0.2)],
    "sigmoid, flat": lambda: [nn.Sigmoid(), nn.Flatten()],
    "tanh, squares": lambda: [nn.Tanh(), nn.Softmax(1)],
}


def test_a_weight_of_one_channel_in_channels_last_is_differentiated_twice() -> None:
    stock = nn.Sequential(nn.Conv2d(4, 1, 3), nn.Flatten()).double().to(memory_format=torch.channels_last)
    fused = gankern.fuse(copy.deepcopy(stock))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for net in (stock, fused):
        grads = torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    same(found[1], found[0])


def test_an_input_that_was_changed_meanwhile_is_not_differentiated_twice() -> None:
    fused = gankern.fuse(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)).double())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    output = fused(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between its forward"):
        torch.autograd.grad(output.sum(), list(fused.parameters()), create_graph=True)


class Inner(nn.Module):
    """Differentiates its fused part in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        points = x.clone()
        h = self.part(points)
        (grad,) = torch.autograd.grad(h.sum(), points, create_graph=True)
        return h + grad.mean((1, 2, 3), keepdim=True)


def test_a_gradient_inside_of_a_forward_that_is_differentiated_twice() -> None:
    stock = Inner().double()
    fused = gankern.fuse(copy.deepcopy(stock))
    found = []
    for net in (stock, fused):
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 3, 4, 4).requires_grad_()
        wanted = [x, *net.parameters()]
        grads = torch.autograd.grad(net(x).square().sum(), wanted, create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
        found.append({str(i): t.grad for i, t in enumerate(wanted)})
    same(found[1], found[0])


def ending(name: str, dtype: torch.dtype, training: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, bias=False), *ENDS[name]()).to(dtype).train(training)
    return net, gankern.fuse(copy.deepcopy(net)), torch.randn(5, 4, 6, 6, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ENDS)
def test_what_is_written_behind_autograds_back(name: str, training: bool, dtype: torch.dtype) -> None:
    """Stock's backward pass reads what somebody has left of the output."""
    found = []
    nets = ending(name, dtype, training)
    for net in nets[:2]:
        x = nets[2].clone().requires_grad_()
        output = net(x)
        output.data.mul_(1.3).add_(0.7)
        (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum().backward()
        found.append({"x": x.grad, **{n: p.grad for n, p in net.named_parameters()}})
    same(found[1], found[0])
    assert plans_of(nets[1]).made == 1 or "in place" in name, str(plans_of(nets[1]).kinds)


@pytest.mark.parametrize("name", ENDS)
def test_derivatives_of_a_gradient_come_to_hooks_on_the_output(name: str) -> None:
    for hook in (lambda g: g * 1.7, lambda g: g + 0.1):
        for power in (1, 2):
            found = []
            nets = ending(name, torch.float64)
            for net in nets[:2]:
                x = nets[2].clone().requires_grad_()
                output = net(x)
                weight = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output).requires_grad_()
                output.retain_grad()
                output.register_hook(hook)
                wanted = [x, *net.parameters()]
                grads = torch.autograd.grad((output.pow(power) * weight).sum(), wanted, create_graph=True)
                sum(g.square().sum() for g in grads).backward()  # type: ignore[union-attr]
                given = {"x": x, "output": output, "weight": weight, **dict(net.named_parameters())}
                found.append({n: t.grad for n, t in given.items()})
            same(found[1], found[0])
            assert plans_of(nets[1]).made == 1 or "in place" in name


@pytest.mark.parametrize("name", ENDS)
def test_gradients_to_be_differentiated_of_a_module_that_runs_on_its_own_output(name: str) -> None:
    if "flat" in name:
        pytest.skip("its output is no input")
    found = []
    nets = ending(name, torch.float64)
    for net in nets[:2]:
        x = nets[2].clone().requires_grad_()
        weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
        wanted = [x, *net.parameters()]
        grads = torch.autograd.grad((net(net(x)) * weight).sum(), wanted, create_graph=True)
        sum(g.square().sum() for g in grads).backward()  # type: ignore[union-attr]
        tensors = {"x": x, **dict(net.named_parameters())}
        found.append({n: t.grad for n, t in tensors.items()})
        found[-1] |= {f"first {n}": g.detach() for n, g in zip(tensors, grads, strict=True)}
    same(found[1], found[0])


def test_where_a_replay_fails_stock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Skips().double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    weight = torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def fails(*args: Any) -> Any:
        raise RuntimeError("planted")

    for name in ("_forward", "_backward"):
        ours = gankern.fuse(copy.deepcopy(net))
        with monkeypatch.context() as patch:
            made = ForwardPlan.__init__

            def broken(plan: ForwardPlan, *args: Any, made: Any = made, name: str = name) -> None:
                made(plan, *args)
                setattr(plan, name, fails)

            patch.setattr(ForwardPlan, "__init__", broken)
            same(step(ours, x, weight), step(copy.deepcopy(net), x, weight))


def test_changes_are_seen() -> None:
    torch.manual_seed(0)
    net = Skips().double()
    ours = agrees(net, torch.randn(3, 2, 8, 8, dtype=torch.float64))
    x, weight = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def both(change: Callable[[Any], Any]) -> None:
        change(net), change(ours)
        for _ in range(2):
            same(step(ours, x, weight), step(net, x, weight))

    both(lambda m: m.load_state_dict({n: v * 1.1 for n, v in m.state_dict().items()}))
    both(
        lambda m: (
            setattr(m, "down", nn.Conv2d(2, 4, 4, 2, 1, bias=False).double().requires_grad_(False))
            or (torch.manual_seed(2) and m.down.weight.data.normal_())
        )
    )
    both(lambda m: m.eval())
    both(lambda m: m.norm.train())
    both(lambda m: setattr(m.norm, "eps", 0.3))
    both(lambda m: m.last.weight.data.mul_(2))
    both(lambda m: m.up.register_forward_hook(lambda module, given, output: output * 2))
    both(lambda m: setattr(m, "forward", lambda x, m=m: type(m).forward(m, x) * 3))


def test_errors_of_stock_are_raised() -> None:
    net, x = gankern.fuse(critic().double()), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    output = net(x)
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    for last in (nn.Tanh(), nn.Sequential(nn.Tanh(), nn.Flatten(0))):
        ending = gankern.fuse(nn.Sequential(nn.Conv2d(2, 1, 3), last).double())
        output = ending(x)
        output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    output = net(x)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.randn(3, 5, 8, 8, dtype=torch.float64))


def test_the_first_calls_of_a_kind_are_stocks() -> None:
    with choice.everywhere():
        pass
    net = gankern.fuse(critic().double())
    choice._everywhere.set(False)
    for _ in range(2):
        net(torch.randn(3, 2, 8, 8, dtype=torch.float64))
    assert plans_of(net).made == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_sees_no_more_of_a_plan_than_of_a_module(device: str) -> None:
    seen = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal seen
        seen += event == "call" and frame.f_code.co_name == "__torch_function__"

    net, x = gankern.fuse(deep()), torch.randn(3, 2, 6, 6)
    with torch.device(device):
        want = step(gankern.unfuse(copy.deepcopy(net)), x, None)
        for _ in range(3):
            got = step(copy.deepcopy(net), x, None)
        same(got, want)
        net(x)
        try:
            sys.setprofile(count)
            net(x)
        finally:
            sys.setprofile(None)
    assert plans_of(net).hits == 1 and seen < 20
