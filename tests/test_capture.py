"""Steps as CUDA graphs: on a GPU for real; without one, what is done by the host, with torch.cuda's calls recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern._capture import CapturedStep, record


class Recorded:
    """torch.cuda without a GPU: a graph's replay runs what was captured again."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.current = self.Stream(None)
        #: Of the default generator and those of a capture: whether they draw for graphs only.
        self.capturing = False

    def Stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("wait"), device="cpu")

    def current_stream(self, device: Any = None) -> Any:
        return self.current

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append("aside")
        yield

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(
            replay=lambda: self.calls.append("replay"),
            register_generator_state=lambda generator: self.calls.append(("generator", generator)),
        )

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        """Left by an error as torch leaves it: neither the stream nor the generators are as before."""
        self.calls.append("capture")
        before, self.current, self.capturing = self.current, stream, True
        yield
        self.current, self.capturing = before, False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    for name in ("Stream", "current_stream", "set_stream", "stream", "device", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(recorded, name))
    return recorded


def test_every_call_is_one_step(cuda: Recorded) -> None:
    seen: list[Tensor] = []

    def step(x: Tensor) -> Tensor:
        seen.append(x)
        return x + 1

    generator = torch.Generator()
    step_ = CapturedStep(step, [torch.zeros(3)], warmup=2, generators=[generator])
    for value in range(2):
        assert torch.equal(step_(torch.full((3,), float(value))), torch.full((3,), value + 1.0))
        assert not step_.captured
    assert cuda.calls == ["wait", "aside", "wait"] * 2
    cuda.calls.clear()
    step_(torch.full((3,), 5.0))
    assert step_.captured
    assert cuda.calls == [("generator", generator), "capture", "replay"]
    step_(torch.full((3,), 7.0))
    assert cuda.calls[3:] == ["replay"]
    assert len(seen) == 3, "Python runs until the step is captured"
    assert all(x is seen[0] for x in seen), "one buffer"
    assert seen[0].tolist() == [7.0] * 3


def test_inputs_that_differ(cuda: Recorded) -> None:
    step = CapturedStep(lambda x, y: x, [torch.zeros(3), torch.zeros(2, dtype=torch.int64)], 1, ())
    with pytest.raises(TypeError, match="2 tensors; got 1"):
        step(torch.zeros(3))
    with pytest.raises(ValueError, match=r"inputs\[0\] must be \(3,\).*got \(4,\)"):
        step(torch.zeros(4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs\[1\].*int64.*float32"):
        step(torch.zeros(3), torch.zeros(2))
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a Tensor"):
        step(torch.zeros(3), 2)  # type: ignore[arg-type]


def test_a_step_that_waits_is_refused(cuda: Recorded) -> None:
    def step(x: Tensor) -> None:
        if "capture" in cuda.calls:
            raise RuntimeError("operation not permitted when stream is capturing")

    step_ = CapturedStep(step, [torch.zeros(3)], 1, ())
    step_(torch.zeros(3))
    with pytest.raises(gankern.CaptureError, match=r"not permitted[\s\S]*\.item\(\)"):
        step_(torch.zeros(3))
    assert not step_.captured


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_a_failed_capture_stream_and_generators_are_as_before(cuda: Recorded, error: Any) -> None:
    """A generator in the state of a capture raises at the next draw, and so do graphs that draw from it."""
    generator, before = torch.Generator(), cuda.current_stream()

    def step() -> None:
        raise error

    with pytest.raises(error):
        record(step, cuda.Stream(None), [generator])
    assert cuda.current_stream() is before
    assert not cuda.capturing
    assert cuda.calls == [("generator", generator), "capture"] * 2


def test_pinned_inputs_are_copied_before_the_call_returns(monkeypatch: pytest.MonkeyPatch, cuda: Recorded) -> None:
    pinned, pageable = torch.zeros(3), torch.zeros(3)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor is pinned)
    copied: list[bool] = []
    monkeypatch.setattr(Tensor, "copy_", lambda kept, given, non_blocking: copied.append(non_blocking))
    CapturedStep(lambda x, y: x, [torch.zeros(3), torch.zeros(3)], 1, ())(pinned, pageable)
    assert copied == [False, True]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1,), {}, TypeError, "step must be callable"),
        ((print, torch.zeros(2)), {}, ValueError, r"inputs\[0\] must be on a CUDA device.*got cpu"),
        ((print, 3), {}, TypeError, r"inputs\[0\] must be a Tensor; got int"),
        ((print,), {"warmup": 0}, ValueError, "warmup must be at least 1; got 0"),
        ((print,), {"warmup": True}, TypeError, "warmup must be an int"),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gankern.capture(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_critic_step_on_a_gpu() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 64, 1)).cuda()
    lr = torch.tensor(0.0, device="cuda")
    optimizer = gankern.optim.RMSprop(critic.parameters(), lr=lr, clip=0.1, capturable=True)

    def step(real: Tensor, fake: Tensor) -> Tensor:
        optimizer.zero_grad()
        penalty = gankern.gradient_penalty(critic, real, fake)
        (critic(fake).mean() - critic(real).mean() + penalty).backward()
        optimizer.step()
        return penalty

    images = [torch.randn(4, 3, 16, 16, device="cuda") for _ in range(2)]
    captured = gankern.capture(step, *images)
    found = [captured(*images).clone() for _ in range(6)]
    assert captured.captured
    assert len({p.item() for p in found[3:]}) == 3, "alpha is drawn at every replay"
    before = critic[0].weight.detach().clone()
    lr.fill_(0.01)
    captured(*images)
    assert not torch.equal(critic[0].weight, before), "the graph reads the learning rate"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waiting_on_a_gpu_is_refused() -> None:
    x = torch.ones(3, device="cuda")
    step = gankern.capture(lambda x: x.sum().item(), x, warmup=1)
    step(x)
    here = torch.cuda.current_stream()
    with pytest.raises(gankern.CaptureError, match="cannot be captured"):
        step(x)
    assert torch.cuda.current_stream() == here
    assert torch.rand(3, device="cuda").isfinite().all(), "random numbers can be drawn"
