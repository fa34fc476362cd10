from __future__ import annotations

import pytest
import torch
from torch import nn

from gankern.bench import stock
from gankern.bench.cases import CASES, TOLERANCE, minibatch_discrimination, select
from gankern.bench.measure import checked, run_case

EAGER = ("eager", "channels_last", "cdist", "foreach", "func_grad", "autocast")


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, case in CASES.items() for d in case.dtypes], ids=str)
def test_every_side_of_every_case_is_right(name, dtype):
    case = CASES[name]
    result = run_case(case, dtype=dtype, tiny=True, against=EAGER, repeat=1, budget=0.0)
    assert result.status == "ok", result.message
    unavailable = {variant for variant, why in result.left_out.items() if "Wrong" in why}
    assert not unavailable, result.left_out


def test_names_are_group_and_mode():
    assert all(name == case.name and case.group and "." in name for name, case in CASES.items())


def test_select():
    assert [case.name for case in select(["clip_weights.step"])] == ["clip_weights.step"]
    assert {case.group for case in select(["l1_distance", "gradient_penalty"])} == {"l1_distance", "gradient_penalty"}
    assert all(case.is_op for case in select([]))
    with pytest.raises(KeyError, match="nothing"):
        select(["nothing"])


def test_tolerances_grow_as_the_dtypes_shrink():
    assert TOLERANCE[torch.float64] < TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("critic", [stock.ConvCritic, stock.ResidualCritic])
def test_the_stock_penalties_are_one_function(critic):
    net = critic(2, 4, 8).double()
    real, fake, alpha = (*torch.randn(2, 3, 2, 8, 8).double(), torch.rand(3, 1, 1, 1).double())
    first = torch.autograd.grad(stock.gradient_penalty(net, real, fake, alpha), net[0].weight)
    second = torch.autograd.grad(stock.gradient_penalty_func(net, real, fake, alpha), net[0].weight)
    torch.testing.assert_close(first, second)


def test_the_stock_pair_functions_are_one_function():
    m = torch.randn(5, 3, 2).double()
    torch.testing.assert_close(stock.l1_distance(m), stock.l1_distance_cdist(m))
    torch.testing.assert_close(stock.minibatch_discrimination(m), stock.minibatch_discrimination_cdist(m))


def test_torch_compile_still_refuses_double_backward():
    net = torch.compile(nn.Linear(2, 1), backend="aot_eager")
    x = torch.randn(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_many_samples_are_right_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["minibatch_discrimination.training"]
    for name, value in (("_MOST_SAMPLES", 3), ("_ROWS", 4)):
        monkeypatch.setattr(minibatch_discrimination, name, value)
    sides = case.setup(case.tiny, torch.float32, "cpu")
    assert sides.reference()["gradient of m"][0].shape[0] == 4
    runs, error, left_out, _ = checked(sides, without={"compile": "takes long"})
    assert set(runs) == {"eager", "cdist", "gankern"} and error < 1e-5, left_out
    assert case.needs({**case.size, "batch": 4096}, torch.float32)["reference"] == 0
