"""Stock's whole step, compiled: right, told apart where it is wrong, its compile time measured and limited."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from bench.fakes import Clock, case
from bench.test_own import Projection, images
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from gankern.bench import own, stock
from gankern.bench.alarm import TooLong, time_limit
from gankern.bench.cases import CASES, Case
from gankern.bench.cases.own import own_cases
from gankern.bench.check import Results
from gankern.bench.measure import run_case
from gankern.bench.report import case_row
from gankern.bench.results import CaseResult

NAME = stock.COMPILE_STEP
# Torch 2.11 has the flag, but compiles no requires_grad_.
compiles = pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 13), reason="torch compiles no penalty before 2.13")


@pytest.fixture(autouse=True)
def captured_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is said here of capturing holds whatever compiles the graph then, and Inductor takes half a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{"backend": "aot_eager"} | kwargs))


def measured(case: Case, dtype: torch.dtype = torch.float32) -> CaseResult:
    return run_case(case, dtype=dtype, tiny=True, against=[NAME], repeat=1, budget=0.0)


@compiles
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gradient_penalty.conv", torch.bfloat16),
        ("critic_step.dcgan", torch.float32),
        ("training_step.wgan-gp", torch.float32),
    ],
)
def test_steps_are_right_and_faster_than_their_first_two_calls(name, dtype):
    result = measured(CASES[name], dtype)
    assert (result.status, result.best, result.left_out) == ("ok", NAME, {}), result.message
    side = result.sides[NAME]
    assert side.compile_seconds > 10 * side.seconds.median
    assert case_row(result)[2] == (f"{side.compile_seconds:.1f}",)
    assert not torch._dynamo.config.trace_autograd_ops


@compiles
def test_own_networks_have_it_with_dropout_and_labels():
    subject = own.Subject(Projection(), images(), (3, 8, 8), labels=10)
    result = measured(own_cases(subject)[0])
    assert set(result.sides) == {NAME, "gankern", "gankern channels_last"}, (result.message, result.left_out)


class _Square(torch.autograd.Function):
    """Torch 2.13 loses its derivative of the second order, without a word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class _OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Square.apply(self.first(x)))


@compiles
def test_where_it_is_wrong_it_is_left_out_and_said_to_be():
    result = run_case(
        own_cases(own.Subject(_OwnFunction(), None, (2,)))[0], tiny=True, against=["eager", NAME], repeat=1, budget=0.0
    )
    assert (result.status, result.best) == ("ok", "eager")
    assert result.left_out[NAME].startswith("Wrong: ")


def test_torch_without_the_flag_says_so(monkeypatch):
    monkeypatch.delitem(torch._dynamo.config._config, "trace_autograd_ops", raising=False)
    subject = own.Subject(nn.Linear(2, 1), None, (2,), loss="gan")
    for found in (own_cases(subject)[0], CASES["critic_step.wgan"], CASES["gradient_penalty.conv"]):
        assert "compiles no torch.autograd.grad" in found.setup(found.tiny, torch.float32, "cpu").left_out[NAME]


def test_what_compiles_too_long_is_left_out():
    def compiling() -> Results:
        for _ in range(3):
            try:
                time.sleep(60)
            except Exception:
                pytest.fail("taken for an error of the compiler's")
        return {}

    clock = Clock()
    fake = case(clock, eager=clock.work("eager", 3.0), compile_step=compiling)
    begin = time.monotonic()
    result = run_case(fake, compile_seconds=0.2, clock=clock)
    assert time.monotonic() - begin < 30
    assert (result.best, result.left_out[NAME]) == (
        "eager",
        "takes more than 0.2 s to compile; --compile-seconds sets the limit",
    )


def test_a_limit_outlasts_what_swallows_it_and_ends_with_its_block():
    begin = time.monotonic()
    with pytest.raises(TooLong), time_limit(0.1):
        try:
            time.sleep(60)
        except TooLong:
            time.sleep(60)
    assert time.monotonic() - begin < 30
    with time_limit(0.1):
        pass
    time.sleep(0.3)


def test_compile_seconds_are_those_above_two_calls():
    clock = Clock()
    calls = iter([7.0, 3.0])

    def compiled() -> Results:
        clock.now += next(calls, 2.0)
        return {"output": [torch.ones(3)]}

    result = run_case(case(clock, compile_step=compiled), repeat=2, clock=clock)
    assert result.sides[NAME].compile_seconds == 6.0
    assert result.sides["gankern"].compile_seconds is None
