"""The profiler of any loop: what it attributes to which phase, and what it leaves alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import gankern
from gankern import _phases
from gankern.profile import recorder
from gankern.profile import trace as traces
from gankern.profile.meters import OTHER


class Clock:
    """A clock that only `pause` moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> tuple[float, int]:
        return self.now, 0

    def between(self, first: tuple[float, int], second: tuple[float, int]) -> tuple[float, float]:
        return second[0] - first[0], 0.0

    def pause(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder, "CpuClock", lambda: clock)
    return clock


def test_phases_are_exclusive_and_add_up_to_the_step(clock: Clock) -> None:
    with gankern.profile.critic_steps(warm_up=0) as prof:
        for number in range(5 + 6):
            clock.pause(50)
            with prof.step():
                with prof.phase("data"):
                    clock.pause(2 + number)
                clock.pause(1)
                with prof.phase("penalty"):
                    clock.pause(1)
                    with prof.phase("tail"):
                        clock.pause(3)
                    clock.pause(1)
    found = prof.profile()
    assert found.steps == 6
    milliseconds = {p.name: p.seconds * 1e3 for p in found.phases}
    # Of the steps 5 to 10 the shortest and the longest are left out.
    assert milliseconds == pytest.approx({"data": 2 + 7.5, "penalty": 2, "penalty/tail": 3, OTHER: 1})
    assert found.mean_seconds == pytest.approx(15.5e-3)
    assert found.seconds.median == pytest.approx(15.5e-3)
    assert {name: p.seconds * 1e3 for name, p in found.grouped().items()} == pytest.approx(
        {"data": 9.5, "penalty": 5, "penalty/tail": 3, "penalty/rest": 2, OTHER: 1}
    )


def test_statements_do_as_blocks_do(clock: Clock) -> None:
    with gankern.profile.critic_steps(warm_up=1) as prof:
        for _ in range(6 + 3):
            prof.phase("data")
            clock.pause(1)
            prof.phase("real forward")
            clock.pause(2)
            prof.step()
    found = prof.profile()
    assert found.steps == 3
    assert {p.name: p.seconds * 1e3 for p in found.phases} == pytest.approx({"data": 1, "real forward": 2, OTHER: 0})


@pytest.fixture
def critic() -> nn.Module:
    conv = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(128, 1))


def penalty_steps(critic: nn.Module, prof: gankern.profile.CriticSteps, count: int) -> None:
    real, fake = torch.randn(2, 4, 3, 16, 16).unbind()
    for _ in range(count):
        with prof.step():
            with prof.phase("real forward"):
                critic(real)
            with prof.phase("penalty"):
                gankern.gradient_penalty(critic, real, fake).backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_penalty_marks_and_counts_its_passes(critic: nn.Module, backend: str) -> None:
    with gankern.backend(backend), gankern.profile.critic_steps(steps=2) as prof:
        penalty_steps(critic, prof, 9)
    flops = {p.name: p.flops for p in prof.profile().phases}
    forward = flops["real forward"]
    assert forward == 4 * 2 * (8 * 8 * 8 * 3 * 16 + 8 * 4 * 4 * 8 * 16 + 128)
    assert flops["penalty/inner forward"] == forward
    assert flops["penalty/inner gradient"] == forward
    assert flops["penalty/weight gradient"] == forward
    # The gradient of the scores with respect to themselves is one, so that the last layer has no tangent.
    assert flops["penalty/tangent"] == forward - 4 * 2 * 128
    calls = {p.name: p.calls for p in prof.profile().phases}
    assert calls["real forward"] >= 5
    assert {"penalty/interpolation", "penalty/tail"} <= calls.keys()


def test_counting_leaves_results_as_they_are(critic: nn.Module) -> None:
    def gradients(steps: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        critic.zero_grad()
        with gankern.profile.critic_steps(warm_up=0, enabled=steps > 0) as prof:
            penalty_steps(critic, prof, max(steps, 4))
        return [p.grad.clone() for p in critic.parameters() if p.grad is not None]

    for plain, profiled in zip(gradients(0), gradients(4), strict=True):
        assert torch.equal(plain, profiled)


def test_a_compiled_penalty_is_counted_and_timed(critic: nn.Module) -> None:
    def penalty(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return gankern.gradient_penalty(critic, real, fake)

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    real, fake = torch.randn(2, 4, 3, 16, 16).unbind()
    with gankern.profile.critic_steps(steps=2) as prof:
        for _ in range(9):
            with prof.step(), prof.phase("penalty"):
                compiled(real, fake).backward()
    found = prof.profile().grouped()
    assert found["penalty/inner forward"].flops == found["penalty/weight gradient"].flops
    assert found["penalty/inner forward"].seconds > 0


def test_off_and_after_the_block_nothing_is_watched(critic: nn.Module) -> None:
    with gankern.profile.critic_steps(enabled=False) as prof:
        penalty_steps(critic, prof, 8)
    with pytest.raises(RuntimeError, match="the profiler is off"):
        prof.profile()
    with gankern.profile.critic_steps(warm_up=0) as prof, pytest.raises(ZeroDivisionError):
        for number in range(10):
            with prof.step(), prof.phase("data"):
                assert _phases.hook is not None or number == 4
                1 / (8 - number)
    assert prof.profile().steps == 3
    assert _phases.hook is None
    assert not _phases.inline


def test_the_trace_names_the_phases(critic: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a" / "trace.json"
    with gankern.profile.critic_steps(trace=path) as prof:
        penalty_steps(critic, prof, 8)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"phase: real forward", "phase: penalty", "phase: penalty/tangent"} <= names
    assert prof.profile().phase("real forward").allocated > 4 * 8 * 64 * 4


class Slow(torch.autograd.Function):
    """Python takes 20 ms, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return grad_output * 1


def test_python_is_where_no_operator_runs() -> None:
    matrix, x = torch.randn(1500, 1500), torch.ones(2, requires_grad=True)
    with gankern.profile.critic_steps(warm_up=0, steps=1) as prof:
        for _ in range(6):
            with prof.step():
                time.sleep(0.02)
                with prof.phase("forward"):
                    y = Slow.apply(x)
                with prof.phase("backward"):
                    y.sum().backward()
                with prof.phase("product"):
                    torch.mm(matrix, matrix)
                time.sleep(0.02)
    found = {phase.name: phase for phase in prof.profile().phases}
    shares = {name: (phase.python_seconds or 0.0) / phase.seconds for name, phase in found.items()}
    assert min(shares["forward"], shares["backward"], shares[OTHER]) > 0.5 > shares["product"]
    assert max(shares.values()) <= 1


def test_python_is_the_median_share_of_the_traced_steps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    # The profiler made the phase ten times as long as it is, and once something else ran meanwhile.
    found = iter([0.004, 0.016, 0.019])
    monkeypatch.setattr(
        traces, "read", lambda events: {"data": traces.Traced(seconds=0.02, python_seconds=next(found))}
    )
    with gankern.profile.critic_steps(warm_up=0) as prof:
        for _ in range(5 + 1):
            with prof.step(), prof.phase("data"):
                clock.pause(2)
    (data,) = (phase for phase in prof.profile().phases if phase.name == "data")
    assert data.python_seconds == pytest.approx(0.8 * data.seconds)


def event(name: str, start: float, end: float) -> SimpleNamespace:
    """One of torch's profiler, in microseconds."""
    return SimpleNamespace(
        name=name, device_type=DeviceType.CPU, time_range=SimpleNamespace(start=start, end=end), kernels=[]
    )


def test_python_of_operators_that_overlap_or_hold_phases() -> None:
    events = [
        event("phase: a", 0, 100),
        event("phase: a/b", 40, 60),
        event("gankern::penalty", 10, 90),  # made of others
        event("aten::mm", 10, 20),
        event("aten::mm", 15, 30),
        event("Function", 0, 40),
        event("autograd::engine::X", 0, 40),
        event("aten::add", 42, 57),
        event("aten::add", 95, 99),
    ]
    found = {name: traced.python_seconds * 1e6 for name, traced in traces.read(events).items()}
    assert found == {"a": pytest.approx(80 - 20 - 4), "a/b": pytest.approx(5)}


def test_a_report_prints_and_saves(critic: nn.Module, tmp_path: Path) -> None:
    with gankern.profile.critic_steps(steps=2) as prof:
        penalty_steps(critic, prof, 9)
    report = prof.report("my critic")
    text = str(report)
    assert "my critic" in text
    assert "· weight gradient" in text
    report.save(tmp_path / "a.json")
    report.save_page(tmp_path / "a.html")
    assert json.loads((tmp_path / "a.json").read_text())["sides"]["loop"]["steps"] == 2
    assert "inner gradient" in (tmp_path / "a.html").read_text()


def test_the_penalty_is_tried_on_a_copy(critic: nn.Module) -> None:
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    advice = gankern.profile.try_penalty(critic, *torch.randn(2, 4, 3, 16, 16).unbind(), rounds=5)
    assert advice.saves_seconds is not None
    assert "gankern.gradient_penalty was measured to" in advice.text
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())
    assert all(p.grad is None for p in critic.parameters())


def test_no_step_is_said() -> None:
    with pytest.warns(UserWarning, match="saw no step"), gankern.profile.critic_steps():
        pass


@pytest.mark.parametrize("options", [{"steps": 0}, {"warm_up": -1}, {"steps": 2.0}, {"device": "meta"}])
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        gankern.profile.critic_steps(**options)
