from __future__ import annotations

import json

import pytest
import torch
from bench.fakes import Clock, case

from gankern.bench import cases, cli


@pytest.fixture
def registry(monkeypatch):
    """Two fake cases in place of the real ones."""
    clock = Clock()
    fakes = {name: case(clock, name) for name in ("fake.forward", "fake.training")}
    for module in (cases, cli):
        monkeypatch.setattr(module, "CASES", fakes)
    return fakes


def test_writes_json_chart_and_markdown(registry, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gankern", "bench", "fake"])
    out, table = tmp_path / "bench", tmp_path / "docs" / "table.md"
    assert cli.main(["fake", "--quick", "--out", str(out), "--markdown", str(table)]) == 0
    data = json.loads((out / "bench.json").read_text())
    assert [c["name"] for c in data["cases"]] == ["fake.forward", "fake.training"]
    assert data["machine"]
    assert data["command"] == "gankern bench fake"
    assert (out / "bench.png").stat().st_size > 0
    assert "fake.forward" in table.read_text()
    captured = capsys.readouterr()
    assert "fake.training" in captured.out
    assert "\r" not in captured.err


def test_a_wrong_case_exits_1_and_shows_no_time(registry, tmp_path, capsys):
    registry["fake.forward"] = case(Clock(), "fake.forward", ours=2.0)
    assert cli.main(["fake.forward", "--quick", "--out", str(tmp_path)]) == 1
    assert "fake.forward: wrong: output: relative error" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert result["sides"] == {}
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown case 'nothing'; known: fake.forward, fake.training"),
        (["--against", "eager,nothing"], "--against: unknown variant 'nothing'; known: eager"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(registry, capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--repeat", "--batch", "--threads"])
def test_numbers_must_be_positive(option, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([option, "0"])
    assert exit.value.code == 2
    assert "expected a positive integer, got '0'" in capsys.readouterr().err


def test_list(registry, capsys):
    assert cli.main(["--list"]) == 0
    assert "fake.training" in capsys.readouterr().out


def test_ctrl_c_leaves_the_results_so_far(registry, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    object.__setattr__(registry["fake.training"], "setup", interrupt)
    assert cli.main(["--quick", "--out", str(tmp_path), "fake"]) == 130
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [c["name"] for c in data["cases"]] == ["fake.forward"]


def test_main_trains_and_leaves_digits(registry, tmp_path, monkeypatch):
    from gankern.bench import training

    monkeypatch.setattr(cli, "TRAINING", {"wgan": 1.0})
    monkeypatch.setattr("gankern.data.load", lambda name, image_size: torch.zeros(16, 1, 8, 8))
    train_both = training.train_both
    small = {"width": 4, "latent_dim": 8, "n_critic": 1, "iterations": 2}
    monkeypatch.setattr(training, "train_both", lambda *args, **options: train_both(*args, **options, **small))
    assert cli.main(["--main", "--quick", "--batch", "4", "--out", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["training"]
    assert set(result["sides"]) == {"stock", "gankern"}
    assert (tmp_path / "digits-wgan.png").read_bytes().startswith(b"\x89PNG")
