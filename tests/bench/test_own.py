"""Networks of the user's own: critics of kinds that gankern does not have, stock and fused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from gankern import cli
from gankern.arguments import UsageError
from gankern.bench import own
from gankern.bench.cases.own import fusion_notes, own_cases
from gankern.bench.measure import run_case
from gankern.bench.results import Report
from gankern.bench.stock import ResidualCritic

EAGER = ("eager", "channels_last", "func_grad")


def patch() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(4, 8, 4, 2, 1),
        nn.InstanceNorm2d(8),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(8, 1, 3, 1, 1),
    )


def points() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


class Projection(nn.Module):
    """A score of the image, and a product with its class's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.3))
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.features(x)).sum((2, 3))
        return self.head(h).flatten() + (self.embedding(y) * h).sum(1)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.embedding = nn.ConvTranspose2d(6, 4, 4), nn.Embedding(10, 6)
        self.rest = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.rest(self.up(z * self.embedding(y)[:, :, None, None]))


def spectral_norm_critic() -> nn.Module:
    """By hooks, which leave a tensor of its graph on each module."""
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1)]
    return nn.Sequential(*(spectral_norm(m) if hasattr(m, "weight") else m for m in layers))


def images() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3 * 64), nn.Unflatten(1, (3, 8, 8)), nn.Tanh())


SUBJECTS = {
    "residual": (lambda: ResidualCritic(3, 4, 8), images, (3, 8, 8), None),
    "patch": (patch, images, (3, 8, 8), None),
    "points": (points, lambda: nn.Linear(7, 2), (2,), None),
    "projection": (Projection, Conditional, (3, 8, 8), 10),
    "spectral norm": (spectral_norm_critic, images, (3, 8, 8), None),
}


def subject(name: str, loss: str) -> own.Subject:
    critic, generator, shape, labels = SUBJECTS[name]
    return own.Subject(critic(), generator(), shape, labels=labels, loss=loss)


@pytest.mark.parametrize("loss", own.LOSSES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_stock_and_fused_steps_agree(name, loss):
    made = subject(name, loss)
    made.check(4)
    for case in own_cases(made):
        result = run_case(case, tiny=True, against=EAGER, repeat=1, budget=0.0)
        assert result.status == "ok", (case.name, result.message)
        assert "eager" in result.sides


def test_a_wrong_step_is_seen(monkeypatch):
    from gankern import penalties

    monkeypatch.setattr("gankern.gradient_penalty", lambda critic, real, fake, **_: penalties.r1(critic, real))
    result = run_case(own_cases(subject("points", "wgan-gp"))[0], against=["eager"])
    assert (result.status, result.sides) == ("wrong", {})


def test_latents_are_found_or_asked_for():
    assert [subject(name, "gan").latent for name in ("patch", "points", "projection")] == [(5,), (7,), (6, 1, 1)]
    with pytest.raises(UsageError, match="argument --latent: needed"):
        own.Subject(points(), nn.Identity(), (2,))


def test_notes_tell_what_is_fused():
    notes = fusion_notes(subject("projection", "wgan-gp"))
    assert any("fused" in line for line in notes["fuse(critic)"])
    assert set(notes) == {"fuse(critic)", "fuse(generator)", "gradient_penalty"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 9)}, "argument --critic: called with (4, 3, 9) (see --shape and --labels): RuntimeError"),
        ({"generator": nn.Linear(7, 3)}, "argument --generator: expected samples of shape (4, 2), got (4, 3)"),
        ({"latent": (3,)}, "argument --generator: called with (4, 3) (see --latent and --labels): RuntimeError"),
        (
            {"critic": nn.Flatten()},
            "argument --critic: expected a Tensor that depends on the parameters, got",
        ),
    ],
)
def test_networks_that_do_not_fit(change, message):
    given = {"critic": points(), "generator": None if "shape" in change else nn.Linear(7, 2), "shape": (2,)} | change
    with pytest.raises(UsageError) as error:
        own.Subject(**given).check(4)
    assert str(error.value).startswith(message)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    source = """
from torch import nn
def make_critic(): return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
def make_generator(): return nn.Linear(3, 2)
def broken(): raise RuntimeError("no weights\\nhere")
number = 3
"""
    (tmp_path / "own_networks.py").write_text(source)
    yield "own_networks"
    sys.modules.pop("own_networks", None)


def test_the_command_compares_own_networks(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gankern.bench.ceilings.measure", lambda device: {})
    argv = ["bench", "--critic", f"{module}:make_critic", "--generator", f"{module}:make_generator", "--shape", "2"]
    assert cli.main([*argv, "--quick", "--against", "eager", "--out", "out", "--batch", "8"]) == 0
    report = Report.load(tmp_path / "out" / "bench.json")
    assert [case.name for case in report.cases] == ["own.critic_step", "own.generator_step", "own.training_step"]
    assert all(case.size == {"batch": 8} for case in report.cases)
    assert "gradient_penalty: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_networks", "expected MODULE:FACTORY, got 'own_networks'"),
        ("nowhere:f", "nowhere:f: ModuleNotFoundError: No module named 'nowhere'"),
        ("own_networks:f", "own_networks:f: AttributeError: module 'own_networks' has no attribute 'f'"),
        ("own_networks:broken", "own_networks:broken: RuntimeError: no weights"),
        ("own_networks:number", "own_networks:number: TypeError: 'int' object is not callable"),
        ("own_networks:nn.ReLU.__name__", "'str' object is not callable"),
        ("own_networks:nn.ModuleList.__len__", "TypeError"),
    ],
)
def test_a_bad_factory_is_one_line(module, spec, message, capsys):
    assert cli.main(["bench", "--critic", spec, "--shape", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gankern bench: error: argument --critic: ") and message in error
    assert error.count("\n") == 1
