"""`gankern profile` as a user runs it, on critics that are not in the package."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from gankern.bench import ceilings, stock, timing
from gankern.cli import main

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def beside_the_critics_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setitem(ceilings._COPIED, "cpu", 1 << 22)
    monkeypatch.setitem(ceilings._SIDES, "cpu", (256,))
    monkeypatch.setattr(sys, "path", list(sys.path))


def profile(out: Path, *args: str, compiled: str = "--no-compile") -> dict[str, object]:
    assert main(["profile", *args, compiled, "--batch", "4", "--steps", "5", "--out", str(out)]) == 0
    return json.loads((out / "profile.json").read_text())


CRITICS = {
    "residual": ("--shape", "3,16,16"),
    "patch_gan": ("--shape", "3,32,32"),
    "points": ("--shape", "2", "--generator", "profiled_critics:plane_generator"),
    "projection": ("--shape", "3,16,16", "--labels", "10"),
}


@pytest.mark.parametrize("critic", CRITICS)
def test_phases_add_up_on_any_critic(critic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = profile(tmp_path, "--critic", f"profiled_critics:{critic}", *CRITICS[critic])
    text = capsys.readouterr().out
    for name, side in report["sides"].items():
        total = sum(phase["seconds"] for phase in side["phases"])
        assert total == pytest.approx(side["mean_seconds"])
        phases = {phase["name"]: phase for phase in side["phases"]}
        assert {"data", "generator forward", "real forward", "fake forward", "backward", "optimizer"} <= phases.keys()
        assert {
            f"penalty/{part}" for part in ("interpolation", "inner forward", "inner gradient", "tail")
        } <= phases.keys()
        assert phases["real forward"]["flops"] == phases["penalty/inner forward"]["flops"] > 0
        assert name in text
    # One backward pass of the whole loss is parted where the penalty's share of it ends.
    stock, ours = ({p["name"]: p["flops"] for p in side["phases"]} for side in report["sides"].values())
    assert 3 * stock["real forward"] < stock["backward"] == ours["backward"] < 4 * stock["real forward"]
    trace = json.loads((tmp_path / "trace-gankern.json").read_text())
    assert any(event.get("name") == "phase: real forward" for event in trace["traceEvents"])
    assert report["advice"]
    assert "was measured to" in text
    assert "<svg" in (tmp_path / "profile.html").read_text()


def test_stocks_step_compiled_whole_is_timed_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{"backend": "aot_eager"} | kwargs))
    arguments = ("--critic", "profiled_critics:points", "--shape", "2")
    found = profile(tmp_path, *arguments, compiled="--compile-seconds=600")["variants"][stock.COMPILE_STEP]
    text, page = capsys.readouterr().out, (tmp_path / "profile.html").read_text()
    missing = TorchVersion(torch.__version__) < (2, 13)
    if missing:
        assert found["left_out"]
    else:
        assert found["compile_seconds"] > 10 * found["seconds"]["median"] > 0
        assert found["left_out"] == ""
    line = next(line for line in text.splitlines() if line.startswith("stock, compile_step: "))
    assert ("left out: " if missing else f"{found['ratio']['median']:.2f} times gankern's") in line
    assert "stock, compile_step: " in page


def test_a_compiled_step_that_is_wrong_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Halved(stock.CompiledGradients):
        def __init__(self, *args: object) -> None:
            self._of = args

        def __call__(self) -> torch.Tensor:
            loss, params, _ = self._of
            value = loss()
            (value / 2).backward(inputs=list(params))
            return value.detach()

    monkeypatch.setattr(stock, "CompiledGradients", Halved)
    monkeypatch.setattr(stock, "without_compile_step", dict)
    found = profile(tmp_path, "--critic", "profiled_critics:points", "--shape", "2", compiled="--compile-seconds=600")
    assert found["variants"][stock.COMPILE_STEP]["left_out"].startswith("Wrong: gradients: relative error 5")
    assert found["variants"][stock.COMPILE_STEP]["seconds"] is None


def test_a_reference_gan_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(tmp_path, "wgan", "--shape", "1,16,16")
    assert "Weights are clipped tensor by tensor" in capsys.readouterr().out


# It warns once in a process.
@pytest.mark.filterwarnings("ignore:the critic has batch norm")
def test_batch_norm_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(tmp_path, "--critic", "profiled_critics:patch_gan_batch_norm", "--shape", "3,32,32")
    assert "the penalty couples the samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "argument MODEL: expected MODEL or --critic MODULE:FACTORY, got neither"),
        (("wgan", "--critic", "a:b"), "argument MODEL: expected MODEL or --critic MODULE:FACTORY, got both"),
        (("wgan", "--labels", "3"), "argument --labels: needs --critic; wgan has its own networks"),
        (("wgan", "--shape", "3,30,30"), "argument --shape: image_size"),
        (("--critic", "profiled_critics:points"), "argument --shape: needed by --critic"),
        (("--critic", "critics", "--shape", "2"), "argument --critic: expected MODULE:FACTORY, got 'critics'"),
        (
            ("--critic", "profiled_critics:none", "--shape", "2"),
            "argument --critic: profiled_critics:none: AttributeError",
        ),
        (
            ("--critic", "profiled_critics:not_a_module", "--shape", "2"),
            "argument --critic: profiled_critics:not_a_module: expected",
        ),
        (
            ("--critic", "profiled_critics:constant", "--shape", "2"),
            "argument --critic: expected a Tensor that depends",
        ),
        (("--critic", "profiled_critics:points", "--shape", "3"), "argument --critic: called with (64, 3)"),
        (("wgan", "--device", "mars"), "argument --device: expected a device of this machine, got 'mars'"),
    ],
)
def test_bad_arguments_are_named_in_one_line(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *args]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gankern profile: error: {message}")
    assert captured.err.count("\n") == 1


def test_ctrl_c_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, counts = timing.rounds, itertools.count()

    def interrupted(*args: object, **kwargs: object) -> object:
        if next(counts) == 10:
            raise KeyboardInterrupt
        return rounds(*args, **kwargs)

    monkeypatch.setattr(timing, "rounds", interrupted)
    arguments = ("--critic", "profiled_critics:points", "--shape", "2", "--batch", "4", "--no-compile")
    assert main(["profile", *arguments, "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert captured.err.endswith("gankern profile: interrupted: what was done so far is kept\n")
    sides = json.loads((tmp_path / "profile.json").read_text())["sides"]
    assert {side["steps"] for side in sides.values()} == {10 - 7}
    assert "Where the step's time goes" in captured.out
