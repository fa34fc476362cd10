"""Further arguments of the critic: labels, embeddings, masks, options."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import batch, both, gradients
from torch import Tensor, nn

from gankern import gradient_penalty, penalties
from gankern.ops.gradient_penalty import reference


class Conditional(nn.Module):
    """Takes class numbers, an embedding, a dict with a mask, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3, 1, 1)
        self.head = nn.Linear(4, 1)

    def forward(
        self, x: Tensor, labels: Tensor, embedding: Tensor, *, extra: dict[str, Any], slope: float = 0.2
    ) -> Tensor:
        y = nn.functional.leaky_relu(self.conv(x), slope).mean((2, 3)) * extra["masks"][0]
        y = torch.tanh(y * embedding + self.table(labels) * y)
        if extra["mode"] == "double":
            y = 2 * y
        return self.head(y)


def conditions(n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; the embedding and the mask require gradients."""
    embedding = torch.randn(n, 4, dtype=dtype).requires_grad_()
    mask = torch.rand(n, 4, dtype=dtype).requires_grad_()
    extra = {"masks": (mask, None), "mode": "double"}
    return (torch.randint(5, (n,)), embedding), {"extra": extra, "slope": 0.3}


def leaves(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [inputs[1], kwargs["extra"]["masks"][0]]


def with_inputs(critic: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Stock's way: a critic of the points alone."""
    return lambda x: critic(x, *inputs, **kwargs)


def all_gradients(critic: nn.Module, loss: Tensor, extras: list[Tensor]) -> list[Tensor]:
    for t in extras:
        t.grad = None
    found = gradients(critic, loss)
    return [*found, *(t.grad.clone() for t in extras if t.grad is not None)]


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_are_stocks(create_graph: bool) -> None:
    ours, stock = both(Conditional)
    real, fake, alpha = batch()
    inputs, kwargs = conditions()
    extras = leaves(inputs, kwargs)
    loss = gradient_penalty(
        ours, real, fake, *inputs, alpha=alpha, target=0.3, weight=3.0, create_graph=create_graph, **kwargs
    )
    got = all_gradients(ours, loss, extras)
    want_loss = reference.gradient_penalty(
        with_inputs(stock, inputs, kwargs), real, fake, alpha=alpha, target=0.3, weight=3.0
    )
    want = all_gradients(stock, want_loss, extras)
    assert len(want) == 7
    assert all(w.abs().max() > 0 for w in want[-2:])
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_third_derivatives_reach_the_inputs() -> None:
    critic = Conditional().double()
    real, fake, alpha = batch(2)
    (labels, embedding), kwargs = conditions(2)

    def penalty(e: Tensor) -> Tensor:
        return gradient_penalty(critic, real, fake, labels, e, alpha=alpha, create_graph=True, **kwargs)

    assert torch.autograd.gradgradcheck(penalty, (embedding,))


@pytest.mark.parametrize("name", ["r1", "r2", "dragan", "zero_centered"])
def test_the_family_hands_them_on(name: str) -> None:
    critic = Conditional().double()
    real, fake, alpha = batch()
    inputs, kwargs = conditions()
    points = {"r1": (real,), "r2": (fake,), "dragan": (real,), "zero_centered": (real, fake)}[name]
    options: dict[str, Any] = {"zero_centered": {"alpha": alpha}}.get(name, {})
    function = getattr(penalties, name)
    torch.manual_seed(1)
    got = all_gradients(critic, function(critic, *points, *inputs, **options, **kwargs), leaves(inputs, kwargs))
    torch.manual_seed(1)
    stock = function(
        with_inputs(critic, inputs, kwargs), *points, params=critic.parameters(), create_graph=True, **options
    )
    torch.testing.assert_close(got, all_gradients(critic, stock, leaves(inputs, kwargs)), rtol=1e-9, atol=1e-11)


def test_functional_critic() -> None:
    ours, stock = both(Conditional)
    real, fake, alpha = batch()
    inputs, kwargs = conditions()
    params = dict(ours.named_parameters())

    def critic(x: Tensor, *inputs: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(ours, params, (x, *inputs), kwargs)

    loss = gradient_penalty(critic, real, fake, *inputs, alpha=alpha, params=params.values(), **kwargs)
    got = all_gradients(ours, loss, leaves(inputs, kwargs))
    stock_loss = reference.gradient_penalty(with_inputs(stock, inputs, kwargs), real, fake, alpha=alpha)
    torch.testing.assert_close(got, all_gradients(stock, stock_loss, leaves(inputs, kwargs)), rtol=1e-9, atol=1e-11)


def test_autocast() -> None:
    ours, stock = both(Conditional, torch.float32)
    real, fake, alpha = batch(8, torch.float32)
    inputs, kwargs = conditions(8, torch.float32)
    results = []
    for critic in (ours, stock):
        with torch.autocast("cpu", torch.bfloat16):
            if critic is ours:
                loss = gradient_penalty(critic, real, fake, *inputs, alpha=alpha, **kwargs)
            else:
                points = (alpha * real + (1 - alpha) * fake).requires_grad_()
                scores = critic(points, *inputs, **kwargs)
                (grad,) = torch.autograd.grad(scores, points, torch.ones_like(scores), create_graph=True)
                loss = 10 * (torch.linalg.vector_norm(grad.flatten(1), dim=1) - 1).square().mean()
        results.append(all_gradients(critic, loss, leaves(inputs, kwargs)))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_whole_critic_loss_compiles_around_the_penalty() -> None:
    ours, stock = both(Conditional, torch.float32)
    real, fake, alpha = batch(dtype=torch.float32)
    inputs, kwargs = conditions(dtype=torch.float32)
    extras = leaves(inputs, kwargs)

    def loss(critic: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores = critic(fake, *inputs, **kwargs).mean() - critic(real, *inputs, **kwargs).mean()
        return scores + gradient_penalty(critic, real, fake, *inputs, alpha=alpha, **kwargs)

    want = {}
    for mode in ("double", "single"):
        kwargs["extra"]["mode"] = mode
        penalty = reference.gradient_penalty(with_inputs(stock, inputs, kwargs), real, fake, alpha=alpha)
        scores = stock(fake, *inputs, **kwargs).mean() - stock(real, *inputs, **kwargs).mean()
        want[mode] = all_gradients(stock, scores + penalty, extras)
    compiled = torch.compile(loss)
    # Back to the first: another constant must not take the place of a graph's own.
    for mode in ("double", "single", "double"):
        kwargs["extra"]["mode"] = mode
        got = all_gradients(ours, compiled(ours, inputs, kwargs), extras)
        torch.testing.assert_close(got, want[mode], rtol=1e-4, atol=1e-5)


def test_an_input_alone_requires_a_gradient() -> None:
    critic = Conditional().double().requires_grad_(False)
    real, fake, alpha = batch()
    inputs, kwargs = conditions()
    extras = leaves(inputs, kwargs)
    (got,) = torch.autograd.grad(gradient_penalty(critic, real, fake, *inputs, alpha=alpha, **kwargs), extras[:1])
    stock = reference.gradient_penalty(with_inputs(critic, inputs, kwargs), real, fake, alpha=alpha)
    torch.testing.assert_close(got, torch.autograd.grad(stock, extras[0])[0], rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        assert not gradient_penalty(critic, real, fake, *inputs, alpha=alpha, **kwargs).requires_grad


def test_gradients_reach_what_an_input_was_made_from() -> None:
    """An embedding computed in front of the critic, used twice, and a parameter of the critic as an argument."""
    critic = Conditional().double()
    table = nn.Embedding(5, 4).double()
    real, fake, alpha = batch()
    labels = torch.randint(5, (4,))
    results = []
    for function in (gradient_penalty, None):
        table.zero_grad()
        extra = {"masks": [table(labels)], "mode": "single"}
        inputs = (labels, table(labels) + critic.head.weight)
        if function is None:
            loss = reference.gradient_penalty(
                with_inputs(critic, inputs, {"extra": extra}), real, fake, alpha=alpha, weight=10.0
            )
        else:
            loss = function(critic, real, fake, *inputs, alpha=alpha, extra=extra)
        results.append([*gradients(critic, loss), table.weight.grad.clone()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_any_tree_of_arguments() -> None:
    Pair = namedtuple("Pair", "a b")
    seen: list[Any] = []

    def critic(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return x.square().sum(1)

    mask = torch.ones(3, dtype=torch.bool)
    args = (None, Pair(mask, "text"), [OrderedDict(k=mask), {}])
    gradient_penalty(
        critic, torch.ones(3, 2), torch.ones(3, 2), *args, params=[nn.Parameter(torch.ones(1))], option=(1, mask)
    )
    ((got, kwargs),) = seen
    assert got[0] is None
    assert type(got[1]) is Pair
    assert got[1].b == "text"
    assert type(got[2][0]) is OrderedDict
    assert got[2][1] == {}
    assert kwargs["option"][0] == 1
    for t in (got[1].a, got[2][0]["k"], kwargs["option"][1]):
        assert torch.equal(t, mask)


def test_an_unknown_keyword_is_the_critics_error() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(TypeError, match="wieght"):
        gradient_penalty(nn.Linear(2, 1), x, x, wieght=1.0)
