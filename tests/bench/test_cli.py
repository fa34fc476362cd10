from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from bench.fakes import Clock, case

from gankern import cli
from gankern.bench import cases, session
from gankern.bench import cli as bench_cli

CEILINGS = {"copy_bytes": 1e10, "cached_copy_bytes": 1e11, "float32_flops": 1e11}


@pytest.fixture
def registry(monkeypatch):
    """Two fake cases in place of the real ones."""
    clock = Clock()
    fakes = {name: case(clock, name) for name in ("fake.forward", "fake.training")}
    for module in (cases, bench_cli):
        monkeypatch.setattr(module, "CASES", fakes)
    monkeypatch.setattr(bench_cli.ceilings, "measure", lambda device: CEILINGS)
    return fakes


@pytest.fixture
def bench(registry, tmp_path, monkeypatch):
    """Runs the command with --quick and results in tmp_path; returns the exit code."""

    def run(*argv: str) -> int:
        monkeypatch.setattr("sys.argv", ["gankern", "bench", *argv])
        try:
            return cli.main(["bench", "--quick", "--out", str(tmp_path), *argv])
        except SystemExit as error:
            return int(error.code or 0)

    return run


def results(out: Path) -> dict:
    return json.loads((out / "bench.json").read_text())


def test_writes_json_html_and_markdown(bench, tmp_path, capsys):
    table = tmp_path / "docs" / "table.md"
    assert bench("fake", "--markdown", str(table)) == 0
    data = results(tmp_path)
    assert [c["name"] for c in data["cases"]] == ["fake.forward", "fake.training"]
    assert data["machine"]["ceilings"] == CEILINGS
    assert data["command"].startswith("gankern bench fake --markdown")
    assert data["command"] in (tmp_path / "bench.html").read_text()
    assert "fake.forward" in table.read_text()
    captured = capsys.readouterr()
    assert "fake.training" in captured.out
    assert "\r" not in captured.err
    right, timed = captured.err.index("fake.forward: right, relative error"), captured.err.rindex("fake.forward ")
    assert right < timed


def test_a_wrong_case_exits_1_and_shows_no_time(bench, registry, tmp_path, capsys):
    registry["fake.forward"] = case(Clock(), "fake.forward", ours=2.0)
    assert bench("fake.forward") == 1
    assert "fake.forward: wrong: output: relative error" in capsys.readouterr().out
    (result,) = results(tmp_path)["cases"]
    assert result["sides"] == {}
    assert "WRONG" in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "argument CASE: unknown case 'nothing'; known: fake.forward, fake.training"),
        (["--against", "eager,nothing"], "argument --against: unknown variant 'nothing'; known: eager"),
        (["--device", "abacus"], "argument --device: expected a device of this machine, got 'abacus'"),
        (["--backend", "abacus"], "argument --backend: invalid choice: 'abacus'"),
        (["--sizes", "batch=1,x"], "argument --sizes: expected a dimension and sizes, batch=8,16; got 'batch=1,x'"),
        (["--sizes", "depth=1"], "argument --sizes: no case has a dimension 'depth'; there are batch"),
        (["--compare", "none.json"], "argument --compare: none.json: No such file"),
        (["--shape", "2"], "argument --shape: needs --critic"),
        (["--critic", "a:b"], "argument --shape: needed with --critic"),
        (["--seconds", "0"], "argument --seconds: expected a positive number, got '0'"),
        *(([o, "0"], f"argument {o}: expected a positive integer") for o in ("--repeat", "--batch", "--threads")),
    ],
)
def test_bad_arguments_exit_2_with_one_line(bench, capsys, arguments, message):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert f"gankern bench: error: {message}" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_backend_that_is_not_there(bench, capsys):
    assert bench("--backend", "cuda") == 2
    message = "gankern bench: error: argument --backend: cuda is not available: torch finds no GPU\n"
    assert capsys.readouterr().err == message


def test_sweep_takes_the_sizes_of_the_case_or_those_given(bench, tmp_path):
    assert bench("fake.forward", "--sweep") == 0
    (sweep,) = results(tmp_path)["sweeps"]
    assert (sweep["dimension"], [p["size"]["batch"] for p in sweep["points"]]) == ("batch", [1, 4])
    assert "compile" in sweep["points"][0]["left_out"]
    assert bench("fake.forward", "--sizes", "batch=16,8", "--against", "compile") == 0
    (sweep,) = results(tmp_path)["sweeps"]
    assert [p["size"]["batch"] for p in sweep["points"]] == [8, 16]
    assert set(sweep["points"][0]["sides"]) == {"compile", "gankern"}


def test_compare_runs_the_stored_cases_and_exits_1_when_slower(bench, registry, tmp_path, capsys):
    assert bench("fake.forward", "--against", "eager") == 0
    old = tmp_path / "old.json"
    (tmp_path / "bench.json").rename(old)
    bench("--compare", str(old), "--against", "eager")
    assert [c["name"] for c in results(tmp_path)["cases"]] == ["fake.forward"]
    data = json.loads(old.read_text())
    data["cases"][0]["ratio"] = {"median": 99.0, "p20": 98.0, "p80": 100.0}
    old.write_text(json.dumps(data))
    capsys.readouterr()
    assert bench("--compare", str(old), "--against", "eager") == 1
    assert re.search(r"fake.forward +slower", capsys.readouterr().out)
    assert results(tmp_path)["comparison"]["verdicts"][0]["verdict"] == "slower"


def test_compare_refuses_another_machine_and_dtype(bench, tmp_path, capsys):
    assert bench("fake.forward") == 0
    old = tmp_path / "bench.json"
    assert bench("--compare", str(old), "--dtype", "bfloat16") == 2
    assert "has float32 on cpu, not bfloat16 on cpu" in capsys.readouterr().err
    data = results(tmp_path)
    data["machine"]["threads"] = 99
    old.write_text(json.dumps(data))
    assert bench("--compare", str(old)) == 2
    assert "is of another machine: threads 99 -> 1" in capsys.readouterr().err


def test_list(bench, capsys):
    assert bench("--list") == 0
    assert "fake.training" in capsys.readouterr().out


def test_ctrl_c_leaves_the_results_so_far(bench, registry, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    object.__setattr__(registry["fake.training"], "setup", interrupt)
    assert bench("fake") == 130
    assert [c["name"] for c in results(tmp_path)["cases"]] == ["fake.forward"]
    page = (tmp_path / "bench.html").read_text()
    assert "fake.forward" in page and "fake.training" not in page


def test_ctrl_c_before_anything_is_done_leaves_an_older_result(bench, registry, tmp_path, capsys):
    assert bench("fake.forward") == 0
    before = results(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    object.__setattr__(registry["fake.forward"], "setup", interrupt)
    capsys.readouterr()
    assert bench("fake.forward") == 130
    assert capsys.readouterr().err.endswith("gankern bench: interrupted\n")
    assert results(tmp_path) == before


def test_a_result_is_kept_as_soon_as_it_is_there(bench, registry, tmp_path):
    """Whoever kills the process: the second case finds the first one's in the file."""
    setup = registry["fake.training"].setup

    def look(*args):
        assert [c["name"] for c in results(tmp_path)["cases"]] == ["fake.forward"]
        return setup(*args)

    object.__setattr__(registry["fake.training"], "setup", look)
    assert bench("fake") == 0
    assert [c["status"] for c in results(tmp_path)["cases"]] == ["ok", "ok"]


def test_tf32_needs_a_gpu(bench, capsys):
    assert bench("fake", "--dtype", "tf32") == 2
    assert "argument --dtype: tf32 needs --device cuda" in capsys.readouterr().err


def test_out_must_be_a_folder(bench, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert bench("fake.forward", "--out", str(tmp_path / "file")) == 2
    assert "argument --out: cannot make the folder" in capsys.readouterr().err


def test_main_trains_and_leaves_digits(bench, tmp_path, monkeypatch):
    from gankern.bench import training

    monkeypatch.setattr(session, "TRAINING", {"wgan": 1.0})
    monkeypatch.setattr("gankern.data.load", lambda name, image_size: torch.zeros(16, 1, 8, 8))
    train_both = training.train_both
    small = {"width": 4, "latent_dim": 8, "n_critic": 1, "iterations": 2}
    monkeypatch.setattr(training, "train_both", lambda *args, **options: train_both(*args, **options, **small))
    assert bench("--main", "--batch", "4") == 0
    (result,) = results(tmp_path)["training"]
    assert set(result["sides"]) == {"stock", "gankern"}
    assert (tmp_path / "digits-wgan.png").read_bytes().startswith(b"\x89PNG")
