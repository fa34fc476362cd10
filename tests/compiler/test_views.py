"""What is turned there and back is not turned, unless a result would become another's tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gankern.compiler.passes import views

aten = torch.ops.aten

# With how many turns are left.
FORWARDS: dict[str, tuple[Callable[[Tensor], Tensor | list[Tensor]], int]] = {
    "t": (lambda x: x.t().t() + 1, 0),
    "transposes": (lambda x: x.view(2, 3, 4).transpose(0, -1).transpose(2, 0) * 2, 0),
    "permutes": (lambda x: x.view(2, 3, 4).permute(1, 2, 0).permute(-1, 0, 1) * 2, 0),
    "another way back": (lambda x: x.view(2, 3, 4).permute(1, 2, 0).permute(1, 2, 0) * 2, 2),
    "t and transpose": (lambda x: torch.transpose(x.t(), 1, 0).t() @ x, 1),
    "an argument": (lambda x: x.t().t(), 2),
    "two results": (lambda x: [y := x + 1, y.t().t()], 2),
    "changed": (lambda x: (y := x + 1).t().t().mul_(2) + y, 2),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_turns_there_and_back(name: str) -> None:
    forward, left = FORWARDS[name]
    x = torch.arange(24.0).view(6, 4).contiguous()
    x = torch.arange(24.0).view(6, 4)[: 4 if name == "t and transpose" else 6]
    traced = make_fx(forward, tracing_mode="fake")(x.clone())
    views.turn_back(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    turns = (aten.t.default, aten.transpose.int, aten.permute.default)
    assert sum(node.target in turns for node in traced.graph.nodes) == left
    got, want = traced(x.clone()), forward(x.clone())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert [g.stride() for g in got] == [w.stride() for w in want]
