"""Networks that people had trouble with, as programs: what the fuzzer's check must see, and finds no fault with."""

from __future__ import annotations

from typing import Any

import pytest

from fuzz.checks import Options, check
from fuzz.program import HEADER

pytestmark = pytest.mark.by_size

#: Lines of Net.__init__, of its forward, what stands before and behind it, and the options.
REPORTED: dict[str, dict[str, Any]] = {
    "bias of the image": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)", "self.m = nn.Linear(3, 4)", "self.c = nn.Conv2d(4, 1, 2)"],
        "forward": ["return self.c(F.conv2d(x, self.a.weight, self.m(x.mean((0, 2, 3))), 1, 1))"],
    },
    "norm's weight of the image": {
        "init": ["self.m = nn.Linear(3, 3)", "self.c = nn.Conv2d(3, 2, 3)"],
        "forward": ["return self.c(F.instance_norm(x, weight=self.m(x.mean((0, 2, 3))))).square()"],
    },
    "one convolution three times": {
        "init": [
            "c = nn.Conv2d(3, 3, 3, 1, 1)",
            "self.s = nn.Sequential(c, nn.LeakyReLU(0.2), c, nn.LeakyReLU(0.2), c)",
        ],
        "forward": ["return self.s(x)"],
        "options": {"check": "fuse twice differentiated", "dtype": "float32", "again": True},
    },
    "own Function that ends in ReLU": {
        "top": """
class Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y
    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)
""",
        "init": ["self.a = nn.Conv2d(3, 4, 3)", "self.b = nn.Conv2d(4, 4, 2)", "self.d = nn.Conv2d(3, 4, 4)"],
        "forward": ["return self.b(Relu.apply(self.a(x))).tanh() + self.d(x).square().mean()"],
    },
    "conv2d_act of a weight of the image": {
        "init": ["self.w = nn.Parameter(torch.randn(4, 3, 3, 3))"],
        "forward": ["return ops.conv2d_act(x, self.w * x.mean(), None)"],
        "options": {"check": "fuse twice differentiated", "dtype": "float32"},
    },
    "detach_": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)", "self.b = nn.Conv2d(4, 4, 1)", "self.d = nn.Conv2d(3, 4, 3)"],
        "forward": ["h = F.relu(self.a(x))", "h.detach_()", "return self.b(h) * self.d(x).square()"],
    },
    "data.add_": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)", "self.b = nn.Conv2d(4, 4, 1)"],
        "forward": ["h = F.leaky_relu(self.a(x), 0.2)", "h.data.add_(-0.3)", "return self.b(h).square()"],
    },
    "patched _conv_forward": {
        "init": ["self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())"],
        "forward": ["return self.s(x)"],
        "setup": ["c = net.s[0]", "c._conv_forward = lambda h, w, b, f=c._conv_forward: f(2 * h, w, b)"],
        "options": {"check": "fuse"},
    },
    "patched forward of an activation": {
        "init": ["self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())"],
        "forward": ["return self.s(x)"],
        "setup": ["net.s[2].forward = lambda h: h.sin()"],
        "options": {"check": "fuse"},
    },
    "change after leaky ReLU": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)"],
        "forward": ["h = F.leaky_relu(self.a(x), 0.2)", "h *= 2**0.5", "return h.square()"],
    },
    "change after a fused leaky ReLU": {
        "init": ["self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2))"],
        "forward": ["h = self.s(x)", "h *= 2**0.5", "return h"],
        "options": {"check": "fuse", "dtype": "float32", "layout": "channels_last"},
    },
    "weights cached over loss and penalty": {
        "init": ["self.a = parametrizations.spectral_norm(nn.Linear(48, 4))", "self.b = nn.Linear(4, 1)"],
        "forward": ["return self.b(self.a(x.flatten(1)).tanh())"],
        "options": {"check": "shared graph", "seed": 1},
    },
    "traced": {
        "init": ["self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Tanh())"],
        "forward": ["return self.s(x)"],
        "options": {"check": "fuse traced", "dtype": "float32"},
    },
    "gradient inside": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)", "self.b = nn.Conv2d(4, 4, 1)"],
        "forward": [
            "h = F.leaky_relu(self.a(x), 0.2)",
            "y = self.b(h)",
            "(g,) = torch.autograd.grad(y.sum(), h, create_graph=True)",
            "return (y + g * h).square()",
        ],
    },
    "vmap inside": {
        "init": ["self.a = nn.Linear(4, 4)"],
        "forward": ["return torch.vmap(lambda t: self.a(t).square())(x).sum((1, 2, 3))"],
    },
    "meta device": {
        "init": ["self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())"],
        "forward": ["return self.s(x)"],
        "options": {"check": "meta", "seed": 1},
    },
    "momentum as a tensor": {
        "init": ["self.s = nn.Sequential(nn.BatchNorm2d(3, momentum=torch.tensor(0.2)), nn.ReLU())"],
        "forward": ["return self.s(x)"],
        "options": {"check": "fuse"},
    },
    "slope as a tensor": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)"],
        "forward": ["return F.leaky_relu(self.a(x), torch.tensor(0.2))"],
    },
    "hook on a parameter": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)"],
        "forward": ["return self.a(x).square()"],
        "setup": ["net.a.weight.register_hook(lambda g: 3 * g)"],
    },
    "explain where a forward writes a parameter": {
        "init": ["self.a = nn.Linear(4, 4)", "self.u = nn.Parameter(torch.ones(4))"],
        "forward": ["self.u.data = self.u.data * 0.9", "return self.a(x * self.u)"],
        "options": {"check": "explain"},
    },
    "checkpoint": {
        "init": ["self.a = nn.Linear(4, 4)"],
        "forward": ["return checkpoint(self.a, x, use_reentrant=False).square()"],
    },
    "layer norm of sliced points": {
        "init": ["self.a = nn.Linear(3, 1)"],
        "forward": ["return self.a(F.layer_norm(x, (3,)))"],
        "options": {"shape": (3,), "layout": "sliced"},
    },
    "layer norm of sliced points in a chain": {
        "init": ["self.n = nn.LayerNorm(3)", "self.a = nn.Linear(3, 1)"],
        "forward": ["return self.a(self.n(x))"],
        "setup": ["net = nn.Sequential(net.n, net.a)"],
        "options": {"shape": (3,), "layout": "sliced"},
    },
    "dropout of transposed points": {
        "init": ["self.a = nn.Linear(48, 1)"],
        "forward": ["return self.a(F.dropout(x, 0.3).flatten(1)).square()"],
        "options": {"check": "gp", "layout": "transposed"},
    },
    "change of a linear layer's output": {
        "init": ["self.a = nn.Linear(4, 4)"],
        "forward": ["h = self.a(x)", "h *= 1.5", "return h.square()"],
    },
    "change of a view in channels_last": {
        "init": ["self.a = nn.Conv2d(3, 4, 3)"],
        "forward": ["h = self.a(x)", "F.relu_(h[:, :1])", "return h.square()"],
        "options": {"module_layout": "channels_last"},
    },
}


def source(init: list[str], forward: list[str], top: str = "", setup: tuple[str, ...] = (), **_: Any) -> str:
    lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += (
        ["        " + line for line in init] + ["    def forward(self, x):"] + ["        " + line for line in forward]
    )
    return "\n".join(
        [HEADER, top, *lines, "def build():", "    net = Net()", *("    " + s for s in setup), "    return net"]
    )


@pytest.mark.parametrize("name", REPORTED)
def test_reported_networks_are_as_stock(name: str) -> None:
    program = REPORTED[name]
    word, failure = check(source(**program), Options(**program.get("options", {})))
    assert failure is None, failure.facts
    assert word in ("same", "right where stock raises")
