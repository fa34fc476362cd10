"""Attention by blocks of queries: derivatives of both orders against the plain products, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gankern.compiler import attention
from gankern.compiler.attention import scaled_dot_product_attention
from gankern.compiler.cache import Plans
from gankern.compiler.derive import Functions
from gankern.compiler.norms import SECOND_ORDER
from tests.compiler.test_penalty_plan import R1, planned, same, stock


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=["kept", "heads", "rows"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block or in several."""
    kept, scores = {"kept": (1 << 16, 1 << 20), "heads": (1 << 16, 160), "rows": (10, 17)}[request.param]
    monkeypatch.setattr(attention, "_KEPT", kept)
    monkeypatch.setattr(attention, "_SCORES", scores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def twice(function: Callable[..., Tensor], tensors: list[Tensor], wanted: list[int], **options: Any) -> list[Any]:
    """A result, its gradients, and theirs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    given = [leaves[i] for i in wanted]
    output = function(*leaves, **options)
    cotangent = output.detach().sin().requires_grad_()
    first = torch.autograd.grad(output, given, cotangent, create_graph=True)
    weighted = sum((g * g.detach().cos()).sum() for g in first)
    second = torch.autograd.grad(weighted, [cotangent, *leaves], allow_unused=True)
    return [output, *first, *second]


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "scale": lambda: {"scale": -0.3},
    "boolean": lambda: {"attn_mask": torch.rand(11, 7) > 0.4},
    "hidden": lambda: {"attn_mask": (torch.arange(11) != 3)[:, None].expand(11, 7)},
    "of keys": lambda: {"attn_mask": torch.rand(2, 1, 1, 7) > 0.3},
    "one row": lambda: {"attn_mask": random(7)},
    "added": lambda: {"attn_mask": random(2, 3, 11, 7).masked_fill(torch.rand(11, 7) > 0.6, -torch.inf)},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mask", MASKS)
def test_both_orders_are_those_of_the_plain_products(mask: str) -> None:
    options = MASKS[mask]()
    tensors = [random(2, 3, 11, 4), random(2, 3, 7, 4), random(2, 3, 7, 5)]
    got = twice(scaled_dot_product_attention, tensors, [0, 1, 2], **options)
    want = twice(F.scaled_dot_product_attention, tensors, [0, 1, 2], **options)
    assert "_Attention" in got[0].grad_fn.name()
    assert got[0].stride() == want[0].stride()
    same(got, want)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(9, 4), (3, 9, 4), (2, 1, 2, 9, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_shapes(shape: tuple[int, ...], causal: bool) -> None:
    tensors = [random(*shape[:-2], 4, shape[-1]), random(*shape), random(*shape)]
    got = twice(scaled_dot_product_attention, tensors, [0, 1, 2], is_causal=causal)
    want = twice(F.scaled_dot_product_attention, tensors, [0, 1, 2], is_causal=causal)
    assert got[0].stride() == want[0].stride()
    same(got, want)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_some_gradients(wanted: list[int]) -> None:
    tensors = [random(11, 2, 4).transpose(0, 1), random(2, 7, 4), random(2, 7, 5)]
    got, want = (twice(f, tensors, wanted) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    zero = torch.zeros((), dtype=torch.float64)
    for g, w in zip(got, want, strict=True):
        g, w = (zero if t is None else t for t in (g, w))
        torch.testing.assert_close(*torch.broadcast_tensors(g, w), rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("small")
def test_float32_is_as_near_as_the_plain_products() -> None:
    tensors = [5 * random(2, 3, 11, 4), random(2, 3, 7, 4), random(2, 3, 7, 5)]
    exact = twice(F.scaled_dot_product_attention, tensors, [0, 1, 2])
    single = [t.float() for t in tensors]
    got, want = (twice(f, single, [0, 1, 2]) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    for g, w, e in zip(got, want, exact, strict=True):
        assert (g - e).norm() < 2 * (w - e).norm() + 4e-7 * e.norm()


def left(options: dict[str, Any]) -> bool:
    q = options.pop("q", random(2, 4, 8).requires_grad_())
    kv = options.pop("kv", random(2, 4, 8))
    output = scaled_dot_product_attention(q, kv, kv, **options)
    return "_Attention" not in str(output.grad_fn)


@pytest.mark.usefixtures("small")
def test_what_is_left_to_stock() -> None:
    assert not left({})
    assert left({"dropout_p": 0.5})
    assert left({"attn_mask": random(4, 4).requires_grad_()})
    assert left({"q": random(2, 4, 8).half().requires_grad_(), "kv": random(2, 4, 8).half()})
    assert left({"q": random(2, 4, 4, 8).requires_grad_(), "kv": random(2, 2, 4, 8), "enable_gqa": True})
    assert left({"q": random(3, 2, 4, 8).requires_grad_(), "kv": random(2, 4, 8)})
    with torch.autocast("cpu"):
        assert left({})
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        assert left({})
    with pytest.raises(RuntimeError, match="is_causal"):
        left({"attn_mask": random(4, 4), "is_causal": True})
    with pytest.raises(RuntimeError):
        left({"kv": random(2, 4, 9)})


def test_weights_are_computed_as_stock_has_them_where_no_second_derivative_is_asked_for() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), random(3, 6, 8).requires_grad_()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]), Functions(SECOND_ORDER, (), ()):
        output, _ = layer(x, x, x)
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.by_size
def test_few_scores_are_left_to_stock() -> None:
    assert left({}) and not left({"q": random(2, 256, 8).requires_grad_(), "kv": random(2, 128, 8)})


class Tokens(nn.Module):
    """A layer over tokens, and a head."""

    def __init__(self, layer: nn.Module, mask: Tensor | None = None, under: str = "", **options: Any) -> None:
        super().__init__()
        self.layer, self.head, self.under, self.options = layer, nn.Linear(8, 1), under, options
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        masked = {self.under: self.mask} if self.under else {}
        return self.head(self.layer(x, **self.options, **masked)).mean(1)


class SelfAttention(nn.MultiheadAttention):
    reads_weights = False

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        h, weights = super().forward(x, x, x, **options)
        return h * weights.mean(-1, keepdim=True).square() if self.reads_weights else x + h


class ReadsWeights(SelfAttention):
    reads_weights = True


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


def attended(kind: type[SelfAttention] = SelfAttention, *, mask: bool = False, **options: Any) -> nn.Module:
    layer = kind(8, 2, batch_first=True)
    if not mask:
        return Tokens(layer, **options)
    hidden = torch.arange(6).expand(3, 6) >= torch.tensor([[5], [3], [4]])
    return Tokens(layer, hidden, "key_padding_mask", **options)


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "weights": attended,
    "no weights": lambda: attended(need_weights=False),
    "weights, masked": lambda: attended(mask=True),
    "weights, read": lambda: attended(ReadsWeights),
    "no weights, masked": lambda: attended(mask=True, need_weights=False),
    "zero attention": lambda: Tokens(SelfAttention(8, 2, batch_first=True, add_zero_attn=True, add_bias_kv=True)),
    "encoder": lambda: Tokens(encoder(dropout=0.0)),
    "encoder, dropout": lambda: Tokens(encoder()),
    "encoder, eval": lambda: Tokens(encoder(norm_first=True)).eval(),
    "encoders": lambda: Tokens(nn.TransformerEncoder(encoder(dropout=0.0), 2, enable_nested_tensor=False)).eval(),
    "encoder, masked": lambda: Tokens(encoder(dropout=0.0), torch.ones(6, 6).tril() == 0, "src_mask"),
}
#: Whose attention, and whose weights, are left to stock.
LEFT = {"weights, masked", "encoder, dropout"}
READ = {"weights, read"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", CRITICS)
def test_critics_of_attention(name: str) -> None:
    critic, x = CRITICS[name]().double(), random(3, 6, 8)
    params, plans = list(critic.parameters()), Plans()
    torch.manual_seed(3)
    want = stock(critic, x, (), params, R1)
    after = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(3)
        same(planned(plans, critic, x, (), params, R1), want)
        assert torch.equal(torch.get_rng_state(), after)
    targets = {node.target for node in plans.plans[0].graph.graph.nodes}
    assert targets.isdisjoint(attention.MASKED) == (name in LEFT)
    # Plain products for weights that nobody reads are not there beside.
    plain = {torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default}
    assert targets.isdisjoint(plain) == (name not in LEFT | READ)


MEMORY = """
import resource, torch
from torch import nn
from gankern import penalties
from gankern.compiler.cache import known_plans

class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 1)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0]).mean(1)

def penalty(tokens):
    penalties.r1(critic, torch.randn(1, tokens, 64)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
critic = Critic()
before = penalty(256)
print(penalty(4096) - before, *(bool(plan.given_up) for plan in known_plans(critic).plans))
"""


def test_memory_is_that_of_a_block() -> None:
    """Scores of 4,096 tokens and four heads take 256 MiB a copy, of which the plain products hold ten and more."""
    env = os.environ | {"GANKERN_PLAN": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    mebibytes, *failed = done.stdout.split()
    assert failed == ["False", "False"]
    assert float(mebibytes) < 64
