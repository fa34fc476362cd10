"""Penalties of every kind against stock's formula, on critics of the kinds that gankern once computed wrongly.

Values, gradients of parameters and points, which of them are None, buffers, attributes, calls of hooks and the random
state, in float64 to 1e-9; with ``create_graph`` the next derivative too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from critics import CRITICS as ORDINARY
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gankern
from gankern import gradient_penalty, penalties

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 8


def stock_norms(critic: Callable[..., Tensor], points: Tensor) -> Tensor:
    x = points if points.requires_grad else points.detach().requires_grad_()
    scores = critic(x)
    (grad,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
    return grad.flatten(1)


def two_sided(critic: Any, real: Tensor, fake: Tensor, sided: Callable[[Tensor], Tensor] = lambda e: e) -> Tensor:
    alpha = torch.rand(real.size(0), dtype=real.dtype).view(-1, 1, 1, 1)
    points = alpha * real + (1 - alpha) * fake
    return 7 * sided(stock_norms(critic, points).norm(2, dim=1) - 0.3).square().mean()


def noisy(critic: Any, real: Tensor) -> Tensor:
    points = real + 0.5 * real.detach().std(correction=0) * torch.rand(real.shape, dtype=real.dtype)
    return 10 * (stock_norms(critic, points).norm(2, dim=1) - 1).square().mean()


def between(critic: Any, real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand(real.size(0), dtype=real.dtype).view(-1, 1, 1, 1)
    return 10 * stock_norms(critic, alpha * real + (1 - alpha) * fake).square().sum(1).mean()


#: By name: gankern's, and stock's as everyone writes it.
KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "two-sided": (lambda c, r, f, **o: gradient_penalty(c, r, f, weight=7, target=0.3, **o), two_sided),
    "one-sided": (
        lambda c, r, f, **o: gradient_penalty(c, r, f, weight=7, target=0.3, one_sided=True, **o),
        lambda c, r, f: two_sided(c, r, f, lambda e: e.clamp_min(0)),
    ),
    "r1": (
        lambda c, r, f, **o: penalties.r1(c, r, **o),
        lambda c, r, f: 5 * stock_norms(c, r).square().sum(1).mean(),
    ),
    "r2": (
        lambda c, r, f, **o: penalties.r2(c, f, weight=4, **o),
        lambda c, r, f: 2 * stock_norms(c, f).square().sum(1).mean(),
    ),
    "dragan": (lambda c, r, f, **o: penalties.dragan(c, r, **o), lambda c, r, f: noisy(c, r)),
    "zero-centred": (penalties.zero_centered, between),
}


class Base(nn.Module):
    """Two convolutions and a head; `middle` is what a kind of critic does in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.c, self.m = nn.Conv2d(4, 1, 4), nn.Linear(3, 4)
        self.seen: list[Tensor] = []

    def note(self, grad: Tensor) -> None:
        self.seen.append(grad.detach().clone())

    def middle(self, h: Tensor, x: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.leaky_relu(self.b(self.middle(self.a(x), x)), 0.2)).flatten()


def critic_of(middle: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: type("Critic", (Base,), {"middle": middle})()


class ReluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x * 1.5)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 1.5 * grad * (y > 0) + 0.1 * grad * y


class LeakyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class ScaledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum()


def changed(h: Tensor, how: Callable[[Tensor], Any]) -> Tensor:
    how(h)
    return h


def hooked_after_use(self: Any, h: Tensor, x: Tensor) -> Tensor:
    y = F.relu(h)
    h.register_hook(lambda g: 2 * g)
    return y + h


def node_hook(self: Any, h: Tensor, x: Tensor) -> Tensor:
    y = F.leaky_relu(h, 0.2)
    y.grad_fn.register_prehook(lambda grads: tuple(3 * g for g in grads))
    y.grad_fn.register_hook(lambda ins, outs: tuple(None if g is None else g * 0.5 for g in ins))
    return y


def inner_gradient(self: Any, h: Tensor, x: Tensor) -> Tensor:
    y = F.relu(self.m(h.permute(0, 2, 3, 1)[..., :3])).permute(0, 3, 1, 2)
    (grad,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
    return y + grad


def watched_by_notes(self: Any, h: Tensor, x: Tensor) -> Tensor:
    h.register_hook(self.note)
    y = F.leaky_relu(h, 0.1)
    y.register_hook(self.note)
    return y


def kept_gradient(self: Any, h: Tensor, x: Tensor) -> Tensor:
    y = F.relu(h)
    y.retain_grad()
    return y


def writes_data(self: Any, h: Tensor, x: Tensor) -> Tensor:
    self.m.bias.data = self.m.bias.data * 0.9 + 0.01
    return h * F.tanh(self.m.bias)[None, :, None, None]


#: What a critic does to an activation `h`, given its input `x`.
MIDDLES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "bias of the image": lambda s, h, x: F.conv2d(x, s.a.weight, s.m(x.mean((0, 2, 3))), 1, 1),
    "weight of the image": lambda s, h, x: F.conv2d(
        h, s.b.weight * s.m(x.mean((0, 2, 3)))[:, None, None, None], None, 1, 1
    ),
    "transposed weight of the image": lambda s, h, x: F.conv_transpose2d(h, s.b.weight * x.mean(), None, 1, 1),
    "linear weight of the image": lambda s, h, x: F.linear(h, s.b.weight[:, :, 0, 0].tile(2, 2) * x.mean()),
    "adaptive instance norm": lambda s, h, x: F.instance_norm(
        h, weight=s.m(x.mean((0, 2, 3))), bias=s.m(x.amax((0, 2, 3)))
    ),
    "group norm of the image": lambda s, h, x: F.group_norm(h, 2, s.m(x.mean((0, 2, 3)))),
    "layer norm of the image": lambda s, h, x: F.layer_norm(h, (8,), x[0, 0, 0], x[0, 1, 1]),
    "slope of the image": lambda s, h, x: F.prelu(h, x.mean().reshape(1)),
    "function ends in relu": lambda s, h, x: ReluFunction.apply(h),
    "function ends in leaky relu": lambda s, h, x: LeakyFunction.apply(h) + h,
    "function with a weight": lambda s, h, x: ScaledFunction.apply(h, s.m.bias.sum()),
    "detach_": lambda s, h, x: changed(F.relu(h), Tensor.detach_) + h,
    "detached copy": lambda s, h, x: F.relu(h).detach() * h,
    "data.add_": lambda s, h, x: changed(F.leaky_relu(h, 0.2), lambda t: t.data.add_(0.3)),
    "data assigned": lambda s, h, x: changed(F.relu(h), lambda t: setattr(t, "data", t.data + 0.1)) * h,
    "in place after leaky relu": lambda s, h, x: changed(F.leaky_relu(h, 0.2), lambda t: t.mul_(2**0.5)),
    "in place after layer norm": lambda s, h, x: changed(F.layer_norm(h, (8, 8)), lambda t: t.add_(h)),
    "in place on a view": lambda s, h, x: changed(h.clone(), lambda t: t[:, 1].mul_(2)) + F.relu(h),
    "in place on two views": lambda s, h, x: changed(F.avg_pool2d(h, 1), lambda t: (t[0].add_(1), t.T[1].neg_())),
    "written to": lambda s, h, x: changed(F.leaky_relu(h, 0.3), lambda t: t.__setitem__((slice(None), 2), h[:, 0])),
    "relu on itself": lambda s, h, x: h + F.relu_(h),
    "relu_ then leaky_relu": lambda s, h, x: F.leaky_relu(F.relu_(h), 0.2) * h,
    "hook before use": lambda s, h, x: changed(h, lambda t: t.register_hook(lambda g: 2 * g)).relu() + h,
    "hook after use": hooked_after_use,
    "hook on a node": node_hook,
    "hook that notes": watched_by_notes,
    "retained gradient": kept_gradient,
    "gradient inside": inner_gradient,
    "data of a parameter": writes_data,
    "split and cat": lambda s, h, x: torch.cat([F.relu(t) * i for i, t in enumerate(h.split(1, 1), 1)][::-1], 1),
    "permute": lambda s, h, x: F.relu(h.permute(0, 1, 3, 2)).transpose(2, 3).contiguous(),
    "the same layer thrice": lambda s, h, x: F.relu(
        F.conv2d(F.relu(F.conv2d(h, s.b.weight, None, 1, 1)), s.b.weight, None, 1, 1)
    ),
    "half": lambda s, h, x: F.leaky_relu(h.float(), 0.2).double(),
    "checkpoint": lambda s, h, x: checkpoint(lambda t: F.relu(s.b(F.relu(t))), h, use_reentrant=False).tile(1, 1, 2, 2),
    "reentrant checkpoint": lambda s, h, x: checkpoint(lambda t: F.relu(t), h, use_reentrant=True),
    "vmap": lambda s, h, x: torch.vmap(lambda t: F.relu(F.conv2d(t[None], s.b.weight, None, 1, 1))[0])(h),
    "torch.func.grad": lambda s, h, x: torch.func.grad(lambda t: F.leaky_relu(t * s.m.bias.sum(), 0.2).pow(3).sum())(h),
    "attention": lambda s, h, x: F.scaled_dot_product_attention(*(h.flatten(2).transpose(1, 2)[:, None],) * 3)[
        :, 0
    ].mT.unflatten(2, (8, 8)),
    "max and sort": lambda s, h, x: h.sort(1)[0] * F.max_pool2d(h, 3, 1, 1),
    "where": lambda s, h, x: torch.where(h > 0, h, 0.1 * h * x.mean()),
    "random": lambda s, h, x: F.dropout(F.relu(h), 0.4) + 0.1 * torch.randn_like(h),
    "unused parameters": lambda s, h, x: F.relu(h).detach().sign() * h,
    "without gradients": lambda s, h, x: (torch.no_grad()(s.b)(h).mean() + 1) * F.relu(h),
    "saved on the way": lambda s, h, x: torch.autograd.graph.save_on_cpu()(lambda: 0) or F.relu(h),
}


def linear_chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 6), *layers, nn.Linear(6, 1))


def conv_chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), *layers, nn.Conv2d(4, 1, 3), nn.Flatten())


def repeated() -> nn.Module:
    conv, act, norm = nn.Conv2d(3, 3, 3, 1, 1), nn.LeakyReLU(0.2), nn.GroupNorm(1, 3)
    return nn.Sequential(conv, act, conv, norm, act, conv, act, norm, conv)


def tied_biases() -> nn.Module:
    critic = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
    )
    critic[3].bias = critic[5].bias = critic[1].bias
    critic[5].weight = critic[3].weight
    critic[4].weight = critic[4].bias
    return critic


def with_(critic: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    change(critic)
    return critic


def hook_thrice(p: nn.Parameter, counts: list[int]) -> None:
    p.register_hook(lambda g: (counts.append(1), 3 * g)[1])


def hooked_parameters(critic: nn.Module) -> None:
    critic.seen = []
    for p in critic.parameters():
        hook_thrice(p, critic.seen)
        p.register_post_accumulate_grad_hook(lambda p: critic.seen.append(2))
    torch.autograd.graph.register_multi_grad_hook(list(critic.parameters())[:2], lambda grads: critic.seen.append(3))


def plain_weight(conv: nn.Conv2d) -> None:
    weight = conv.weight
    del conv.weight
    conv.source = weight
    conv.register_forward_pre_hook(lambda m, args: setattr(m, "weight", m.source * 1.5))
    conv.weight = weight * 1.5


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Sequential):
    pass


class Wider(nn.Parameter):
    pass


def own_parameter(critic: Any) -> None:
    critic[0].weight = Wider(critic[0].weight.detach())


class Squares(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.square() - 0.1


#: Chains and what may be done to them.
CHAINS: dict[str, Callable[[], nn.Module]] = {
    "repeated": repeated,
    "tied biases": tied_biases,
    "activations in a row": lambda: conv_chain(nn.LeakyReLU(0.2), nn.ReLU(True), nn.LeakyReLU(0.1)),
    "activation of a view in place": lambda: conv_chain(
        nn.LeakyReLU(0.2), nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.ReLU(True)
    ),
    "in place after norms": lambda: conv_chain(
        nn.LayerNorm([4, 8, 8]), nn.ReLU(True), nn.AvgPool2d(2), nn.LeakyReLU(0.2, True)
    ),
    "dropout in place": lambda: conv_chain(nn.LeakyReLU(0.2), nn.Dropout(0.3, inplace=True)),
    "dropout in place, eval": lambda: conv_chain(nn.LeakyReLU(0.2), nn.Dropout(0.3, inplace=True)).eval(),
    "dropout": lambda: linear_chain(nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Dropout(0.0)),
    "dropout, eval": lambda: conv_chain(nn.Dropout2d(0.3), nn.LeakyReLU(0.2), nn.Dropout(0.3)).eval(),
    "alpha dropout": lambda: linear_chain(nn.SELU(), nn.AlphaDropout(0.3)),
    "smooth": lambda: conv_chain(nn.Tanh(), nn.GELU(), nn.Softplus(), nn.SiLU(), nn.ELU(), nn.Sigmoid()),
    "smooth in place": lambda: conv_chain(nn.LeakyReLU(0.2), nn.SiLU(True), nn.ELU(inplace=True)),
    "no bias bends": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 1)),
    "pools bend": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.AvgPool2d(2), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1)
    ),
    "adaptive pool bends": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.AdaptiveAvgPool2d(3), nn.Conv2d(4, 2, 2)),
    "mean pool": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
    ),
    "max pool": lambda: conv_chain(nn.MaxPool2d(2), nn.LeakyReLU(0.2)),
    "prelu": lambda: conv_chain(nn.PReLU(4), nn.ReLU6(), nn.Hardtanh()),
    "slope below zero": lambda: conv_chain(nn.LeakyReLU(-0.5)),
    "slope zero": lambda: conv_chain(nn.LeakyReLU(0.0)),
    "slope above one": lambda: conv_chain(nn.LeakyReLU(1.5)),
    "slope a tensor": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: setattr(c[1], "negative_slope", torch.tensor(0.3).item())
    ),
    "first in place": lambda: nn.Sequential(nn.LeakyReLU(0.2, True), nn.Conv2d(3, 1, 3)),
    "activation first": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Tanh()),
    "instance norm, running": lambda: conv_chain(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU()
    ),
    "batch norms": lambda: conv_chain(
        nn.BatchNorm2d(4), nn.LeakyReLU(0.2, True), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4, affine=False)
    ),
    "batch norm, eval": lambda: conv_chain(nn.BatchNorm2d(4), nn.LeakyReLU(0.2)).eval(),
    "no parameters": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Tanh()),
    "identity": lambda: nn.Sequential(),
    "one linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 1)),
    "a convolution": lambda: nn.Conv2d(3, 2, 4, 2),
    "nested": lambda: nn.Sequential(nn.Sequential(conv_chain(nn.ReLU()), nn.Identity()), nn.Tanh()),
    "transposed, strided": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, groups=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3, 2)
    ),
    "patches": lambda: conv_chain(
        nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect")
    ),
    "hooked parameters": lambda: with_(conv_chain(nn.LeakyReLU(0.2)), hooked_parameters),
    "frozen": lambda: with_(conv_chain(nn.LeakyReLU(0.2)), lambda c: c[0].weight.requires_grad_(False)),
    "all frozen": lambda: conv_chain(nn.LeakyReLU(0.2)).requires_grad_(False),
    "frozen head": lambda: with_(conv_chain(nn.LeakyReLU(0.2)), lambda c: c[2].requires_grad_(False)),
    "spare parameters": lambda: with_(critic_of(lambda s, h, x: h)(), lambda c: setattr(c, "spare", nn.Linear(3, 3))),
    "weights in channels_last": lambda: conv_chain(nn.LeakyReLU(0.2)).to(memory_format=torch.channels_last),
    "transposed weight": lambda: with_(
        linear_chain(nn.ReLU()),
        lambda c: setattr(c[1], "weight", nn.Parameter(c[1].weight.detach().t().contiguous().t())),
    ),
    "a parameter's subclass": lambda: with_(conv_chain(nn.LeakyReLU(0.2)), own_parameter),
    "_conv_forward": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)),
        lambda c: setattr(
            c[0], "_conv_forward", lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w * w, b)
        ),
    ),
    "forward of an instance": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: setattr(c[1], "forward", lambda x: x * torch.tanh(x))
    ),
    "forward of the critic": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: setattr(c, "forward", lambda x: c[2](c[1](c[0](x))).square())
    ),
    "forward hook": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: c[0].register_forward_hook(lambda m, i, o: o * o)
    ),
    "forward pre-hook": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: c[1].register_forward_pre_hook(lambda m, i: (i[0].sin(),))
    ),
    "hook of the critic": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: c.register_forward_hook(lambda m, i, o: o.square())
    ),
    "full backward hook": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)),
        lambda c: c[0].register_full_backward_hook(lambda m, i, o: tuple(2 * g for g in i)),
    ),
    "full backward pre-hook": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)),
        lambda c: c[2].register_full_backward_pre_hook(lambda m, o: tuple(3 * g for g in o)),
    ),
    "subclass of a layer": lambda: nn.Sequential(Doubled(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)),
    "subclass of Sequential": lambda: Renamed(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Conv2d(4, 1, 3)),
    ),
    "spectral norm, old": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), nn.utils.spectral_norm(nn.Conv2d(4, 1, 3))
    ),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
    "weight norm, old": lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
    "orthogonal": lambda: nn.Sequential(
        nn.Flatten(), parametrizations.orthogonal(nn.Linear(192, 4)), nn.ReLU(), nn.Linear(4, 1)
    ),
    "own parametrization": lambda: with_(
        conv_chain(nn.LeakyReLU(0.2)), lambda c: parametrize.register_parametrization(c[0], "weight", Squares())
    ),
    "fused": lambda: gankern.fuse(conv_chain(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(True))),
    "fused, batch norm": lambda: gankern.fuse(
        conv_chain(nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 1, 1))
    ),
    "fused, own forward": lambda: gankern.fuse(critic_of(lambda s, h, x: F.relu(h) + h)()),
    "fused, checkpoint": lambda: gankern.fuse(critic_of(MIDDLES["checkpoint"])()),
    "gated recurrent": lambda: nn.Sequential(nn.Flatten(2), nn.GRU(64, 4, batch_first=True), First()),
    "transformer": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 8, 0.0, batch_first=True), nn.Flatten(), nn.Linear(192, 1)
    ),
    "minibatch discrimination": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), gankern.nn.MinibatchDiscrimination(6, 3, 2), nn.Linear(9, 1)
    ),
    "scripted": lambda: torch.jit.script(conv_chain(nn.LeakyReLU(0.2))),
}


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0].sum((1, 2))


EVERY = {**ORDINARY, **CHAINS, **{name: critic_of(middle) for name, middle in MIDDLES.items()}}


class Result:
    """All that a penalty gives and leaves behind; an error where it raises one."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        penalty: Callable[..., Tensor],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        needs: tuple[bool, bool] = (False, False),
        higher: bool = False,
        layout: torch.memory_format = torch.contiguous_format,
        n: int = 3,
        stock: bool = False,
    ) -> None:
        torch.manual_seed(1)
        self.critic = make().double()
        if stock:
            gankern.unfuse(self.critic)
        points = torch.randn(2, n, 3, SIZE, SIZE, dtype=torch.float64)
        real, fake = (
            p.contiguous(memory_format=layout).requires_grad_(need) for p, need in zip(points, needs, strict=True)
        )
        self.error: Exception | None = None
        self.tensors: dict[str, Tensor | None] = {}
        try:
            with around():
                loss = penalty(self.critic, real, fake)
                self.random = torch.get_rng_state()
                params = list(self.critic.parameters())
                if higher:
                    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
                    loss = loss + sum((g.square().sum() for g in grads if g is not None), torch.zeros(()).double())
                if loss.requires_grad:
                    loss.backward()
        except (RuntimeError, ValueError, TypeError) as error:
            self.error = error
            return
        self.tensors = {"loss": loss.detach(), "real": real.grad, "fake": fake.grad}
        for name, p in self.critic.named_parameters():
            self.tensors |= {f"gradient of {name}": p.grad, name: p.detach()}
        self.tensors |= dict(self.critic.named_buffers())
        self.seen = getattr(self.critic, "seen", [])

    def assert_is(self, stock: Result, tolerance: float = 1e-9) -> None:
        if stock.error is not None:
            # Where stock fails, ours may.
            return
        assert self.error is None, self.error
        assert torch.equal(self.random, stock.random), "random state"
        assert self.tensors.keys() == stock.tensors.keys()
        for name, want in stock.tensors.items():
            got = self.tensors[name]
            assert (got is None) == (want is None), f"{name}: None from {'stock' if want is None else 'gankern'} alone"
            if got is not None and want is not None:
                torch.testing.assert_close(
                    got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert len(self.seen) == len(stock.seen), "calls of hooks"
        for s, w in zip(self.seen, stock.seen, strict=True):
            torch.testing.assert_close(s, w)


def assert_exact(
    make: Callable[[], nn.Module], kinds: Iterable[str] = KINDS, create_graph: bool = False, **options: Any
) -> None:
    for kind in kinds:
        ours, stock = KINDS[kind]
        want = Result(make, stock, stock=True, **options)
        got = Result(make, functools.partial(ours, create_graph=create_graph), **options)
        try:
            got.assert_is(want)
        except AssertionError as error:
            raise AssertionError(f"{kind}, {options}: {error}") from error


def runs_layers(critic: nn.Module) -> bool:
    found: Any = gankern.explain(gradient_penalty, critic, *torch.randn(2, 3, 3, SIZE, SIZE, dtype=torch.float64))
    return found.reason is None


@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
@pytest.mark.parametrize("name", EVERY)
def test_every_critic(name: str, create_graph: bool) -> None:
    assert_exact(EVERY[name], create_graph=create_graph)
    assert_exact(EVERY[name], create_graph=create_graph, layout=torch.channels_last, n=1)
    assert_exact(EVERY[name], ["two-sided", "dragan", "zero-centred"], create_graph, needs=(True, True))
    if create_graph:
        assert_exact(EVERY[name], ["two-sided", "r1"], create_graph, higher=True)


def test_plain_critics_run_gankerns_layers() -> None:
    """Else the tests above would compare stock with stock."""
    plain = {name for name, make in CHAINS.items() if runs_layers(make().double())}
    assert plain == {
        *("repeated", "tied biases", "activations in a row", "activation of a view in place", "in place after norms"),
        *("dropout, eval", "smooth", "no bias bends", "pools bend", "adaptive pool bends", "mean pool"),
        *("activation first", "no parameters", "one linear", "a convolution", "nested", "transposed, strided"),
        *("hooked parameters", "frozen", "all frozen", "frozen head", "weights in channels_last"),
        *("transposed weight", "fused", "slope a tensor"),
    }


class DoubledFunctions(TorchFunctionMode):
    """Doubles what ReLU makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func in (F.relu, F.leaky_relu) else result


class DoubledOperators(TorchDispatchMode):
    """Doubles what convolutions make."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.ops.aten.convolution.default else result


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def global_hook(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


PLAIN_CONV = F.conv2d
MODULE_CALL = nn.Module.__call__

AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": DoubledFunctions,
    "dispatch mode": DoubledOperators,
    "counter of operations": lambda: FlopCounterMode(display=False),
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 1.5 * t),
    "mutation of saved tensors": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "default device": lambda: torch.device("cpu"),
    "forward of a class": lambda: patched(nn.LeakyReLU, "forward", lambda self, x: torch.tanh(x)),
    "call of a class": lambda: patched(nn.Conv2d, "__call__", lambda self, x: 2 * MODULE_CALL(self, x)),
    "_conv_forward of a class": lambda: patched(
        nn.Conv2d, "_conv_forward", lambda self, x, w, b: F.conv2d(x, w * w, b, 1, 1)
    ),
    "conv2d": lambda: patched(F, "conv2d", lambda *args: 2 * PLAIN_CONV(*args)),
    "leaky_relu": lambda: patched(F, "leaky_relu", lambda x, *args: torch.tanh(x)),
    "hook on every module": lambda: global_hook(
        nn.modules.module.register_module_forward_hook, lambda m, i, o: o * o if isinstance(m, nn.Conv2d) else None
    ),
    "backward hook on every module": lambda: global_hook(
        nn.modules.module.register_module_full_backward_hook,
        lambda m, i, o: tuple(None if g is None else 2 * g for g in i),
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_watches_or_changes_torch(name: str) -> None:
    make = lambda: conv_chain(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(True))  # noqa: E731
    assert_exact(make, around=AROUND[name])
    assert_exact(critic_of(MIDDLES["in place after leaky relu"]), around=AROUND[name])


def test_a_graph_that_the_rest_of_the_loss_shares() -> None:
    """A8, and an encoder in front of the critic."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_chain(nn.LeakyReLU(0.2))
            self.scale = nn.Linear(1, 1)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.scale(torch.ones(1, dtype=x.dtype)).tanh()
            return self.body(x * self.kept)

    def cached(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
            with parametrize.cached():
                return (
                    critic(fake).mean()
                    - critic(real).mean()
                    + penalty(critic, real, fake)
                    + penalty(critic, fake, real)
                )

        return loss

    makers = [EVERY["spectral norm"], EVERY["own parametrization"], EVERY["weight norm"], Shared, EVERY["repeated"]]
    for make in makers:
        for ours, stock in KINDS.values():
            Result(make, cached(ours)).assert_is(Result(make, cached(stock)))


def test_two_backward_passes() -> None:
    def twice(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
            value = penalty(critic, real, fake)
            value.backward(retain_graph=True)
            return value * 3

        return loss

    for name in ("repeated", "hooked parameters", "bias of the image", "spectral norm"):
        ours, stock = KINDS["two-sided"]
        Result(EVERY[name], twice(ours)).assert_is(Result(EVERY[name], twice(stock)))


@pytest.mark.parametrize("name", ["repeated", "bias of the image", "spectral norm", "batch norms", "dropout"])
def test_without_gradients(name: str) -> None:
    def quiet(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda c, r, f: torch.no_grad()(penalty)(c, r, f).detach()

    def stock(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return KINDS["two-sided"][1](critic, real, fake).detach()

    Result(EVERY[name], quiet(KINDS["two-sided"][0])).assert_is(Result(EVERY[name], stock))


def test_between_two_calls() -> None:
    """Hooks, weights, layers and modes that come and go."""
    critic, stock = (conv_chain(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()).double() for _ in range(2))
    stock.load_state_dict(critic.state_dict())
    real, fake = torch.randn(2, 3, 3, SIZE, SIZE, dtype=torch.float64)

    def check(layers: bool) -> None:
        assert runs_layers(critic) == layers
        found = []
        for c, penalty in ((critic, KINDS["two-sided"][0]), (stock, KINDS["two-sided"][1])):
            torch.manual_seed(5)
            c.zero_grad()
            penalty(c, real, fake).backward()
            found.append({name: p.grad for name, p in c.named_parameters()})
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)

    check(True)
    handles = [c[0].register_forward_hook(lambda m, i, o: o * 2) for c in (critic, stock)]
    check(False)
    for handle in handles:
        handle.remove()
    check(True)
    state = {name: t * 1.5 for name, t in critic.state_dict().items()}
    for c in (critic, stock):
        c.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)
    check(True)
    for c in (critic, stock):
        c[2] = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
        torch.manual_seed(0)
        for p in c.parameters():
            nn.init.normal_(p, std=0.2)
    check(False)
    for c in (critic, stock):
        c[2] = nn.Identity()
        c[0].weight.data = c[0].weight.data * 2
        c[1].negative_slope = 0.7
    check(True)


def test_other_arguments() -> None:
    """An alpha that wants a gradient, points that have hooks, inference tensors, meta tensors, one dimension."""
    critic = conv_chain(nn.LeakyReLU(0.2)).double()
    real, fake = torch.randn(2, 3, 3, SIZE, SIZE, dtype=torch.float64)
    alpha = torch.rand(3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(gradient_penalty(critic, real, fake, alpha=alpha), alpha)
    points = alpha * real + (1 - alpha) * fake
    (want,) = torch.autograd.grad(10 * (stock_norms(critic, points).norm(2, dim=1) - 1).square().mean(), alpha)
    torch.testing.assert_close(got, want)
    for hook in (lambda t: t.register_hook(lambda g: 3 * g), lambda t: (t * 1).retain_grad()):
        leaves = [real.clone().requires_grad_() for _ in range(2)]
        for leaf in leaves:
            hook(leaf)
        curved = nn.Sequential(*critic, nn.Tanh())
        losses = penalties.r1(curved, leaves[0]), 5 * stock_norms(curved, leaves[1]).square().sum(1).mean()
        torch.testing.assert_close(*losses)
        (losses[0] + losses[1]).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    with torch.inference_mode():
        frozen = real.clone()
    a = alpha.detach()
    torch.testing.assert_close(
        gradient_penalty(critic, frozen, fake, alpha=a), gradient_penalty(critic, real, fake, alpha=a)
    )
    meta = copy.deepcopy(critic).to("meta")
    loss = gradient_penalty(meta, real.to("meta"), fake.to("meta"))
    loss.backward()
    assert loss.device.type == meta[0].weight.grad.device.type == "meta"
    line = nn.Linear(5, 1).double()
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(penalties.r1(line, x), 5 * line.weight.square().sum(1).sum() / 5)


def test_negative_views_odd_weights_and_batched_gradients() -> None:
    critic = conv_chain(nn.LeakyReLU(0.2)).double()
    real, fake = torch.randn(2, 3, 3, SIZE, SIZE, dtype=torch.float64)
    negative = torch.complex(fake, -real).conj().imag
    assert negative.is_neg()
    for function in (
        lambda x: penalties.r1(critic, x),
        lambda x: penalties.r1(nn.Sequential(nn.LeakyReLU(0.2), nn.Flatten(), nn.Tanh()), x),
        lambda x: gradient_penalty(critic, x, fake, alpha=torch.rand(3)),
    ):
        torch.manual_seed(2)
        want = function(real)
        torch.manual_seed(2)
        torch.testing.assert_close(function(negative), want)
    for weight in (
        torch.randn(1, 3, 3, 3).double().expand(4, 3, 3, 3),
        torch.randn(4, 3, 6, 3).double()[:, :, ::2],
        torch.complex(torch.ones(4, 3, 3, 3).double(), torch.randn(4, 3, 3, 3).double()).conj().imag,
    ):
        critic[0].weight = nn.Parameter(weight)
        points = real.clone()
        got = torch.autograd.grad(penalties.r1(critic, points), [critic[0].weight, critic[2].weight])
        stock = 5 * stock_norms(critic, points).square().sum(1).mean()
        torch.testing.assert_close(got, torch.autograd.grad(stock, [critic[0].weight, critic[2].weight]))
    none = nn.Sequential(nn.Flatten(), nn.Linear(192, 0)).double()
    torch.testing.assert_close(penalties.r1(none, real), 5 * stock_norms(none, real).square().sum(1).mean())
    critic[0].weight = nn.Parameter(torch.randn(4, 3, 3, 3).double())
    factors = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loss = gradient_penalty(critic, real, fake, alpha=torch.rand(3))
    (once,) = torch.autograd.grad(loss, critic[0].weight, retain_graph=True)
    (batched,) = torch.autograd.grad(loss, critic[0].weight, factors, is_grads_batched=True)
    torch.testing.assert_close(batched, once * factors.view(2, 1, 1, 1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("name", ["repeated", "activations in a row", "smooth", "in place after norms", "nested"])
def test_what_is_not_finite(name: str, value: float) -> None:
    def with_value(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
            points = real.detach().clone()
            points[0, :, 2:4, 3] = value
            return penalty(critic, points, fake)

        return loss

    ours, stock = KINDS["r1"]
    Result(EVERY[name], with_value(ours)).assert_is(Result(EVERY[name], with_value(stock)))
