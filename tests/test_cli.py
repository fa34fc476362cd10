import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import gankern
from gankern import backends, cli, commands, models
from gankern.bench import cli as bench_cli
from gankern.bench import own
from gankern.profile import cli as profile_cli
from gankern.train import load_checkpoint, loop

SMALL = ["--image-size", "8", "--width", "4", "--latent-dim", "4", "--batch-size", "4", "--n-critic", "1", "--quiet"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "noise.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8))
    return str(path)


@pytest.fixture
def run(tmp_path, data):
    """Folder of a run of two steps."""
    out = tmp_path / "run"
    assert cli.main(["train", "dcgan", "--data", data, "--steps", "2", "--out", str(out), *SMALL]) == 0
    return out


def usage_error(argv, capsys):
    """The line on stderr of a call with bad usage."""
    try:
        code = cli.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2
    return one_line(capsys)


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.startswith("gankern") and err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


def test_choices_are_what_there_is():
    assert set(commands.MODELS) == set(models.MODELS)
    assert (commands.BACKENDS, commands.LOSSES) == (backends.NAMES, own.LOSSES)
    assert {*commands.DTYPES, "tf32"} == bench_cli.DTYPES.keys()
    assert set(commands.DTYPES) == profile_cli.DTYPES.keys()


def test_help_version_and_wrong_arguments_load_no_torch():
    code = """
import contextlib, io, sys
from gankern.cli import main
quiet = io.StringIO()
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), contextlib.suppress(SystemExit):
        main(line.split())
modules = {name.partition(".")[0] for name in sys.modules} - {"gankern", "site", *sys.stdlib_module_names}
print(sorted(m for m in modules if not m.startswith("_")), len(sys.modules) < 250)
"""
    lines = ["", "--help", "--version", *(f"{command} --help" for command in cli.COMMANDS)]
    lines += ["fly", "train", "train vae", "bench --fast", "profile wgan-gp --steps none", "sample"]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"gankern {gankern.__version__}\n"


def test_no_command_is_help(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: gankern") and all(command in out for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["trian"], "train"),
        (["Bench"], "bench"),
        (["train", "dcgn"], "dcgan"),
        (["train", "wgangp"], "wgan-gp"),
        (["train", "dcgan", "--steps=1", "--out=a", "--batchsize", "4"], "--batch-size"),
        (["train", "dcgan", "--step=4"], None),
        (["train", "dcgan", "--steps=1", "--out=a", "--N_Critic=4"], "--n-critic"),
        (["bench", "--againts", "eager"], "--against"),
        (["bench", "gradient_penality.conv"], "gradient_penalty.conv"),
        (["bench", "gradient-penalty"], "gradient_penalty"),
        (["bench", "clip_weights", "--against", "Channels-Last"], "channels_last"),
        (["bench", "gradient_penalty", "--sizes", "bach=2"], "batch"),
        (["profile", "wgan-gp", "--Device", "cpu"], "--device"),
        (["profile", "wgan-gp", "--xyz"], None),
    ],
)
def test_what_was_probably_meant(argv, meant, capsys):
    message = usage_error(argv, capsys)
    assert message.startswith(f"gankern{f' {argv[0]}' if len(argv) > 1 else ''}: error: ")
    assert f"(did you mean {meant!r}?)" in message if meant else "did you mean" not in message


@pytest.mark.parametrize("name", ["wgan_gp", "WGAN-GP"])
def test_a_model_by_another_spelling(name):
    assert commands.build_parser().parse_args(["profile", name]).model == "wgan-gp"
    with pytest.raises(ValueError, match=r"name: expected .* got 'wgan_gpp' \(did you mean 'wgan-gp'\?\)"):
        models.build("wgan_gpp")


@pytest.mark.parametrize("command", ["bench", "profile dcgan", "train dcgan --steps 1 --out run"])
def test_one_name_of_an_option_and_its_older_one(command, capsys):
    for option in ("--batch-size", "--batch"):
        assert commands.build_parser().parse_args([*command.split(), option, "3"]).batch_size == 3
    with pytest.raises(SystemExit):
        cli.main([command.split()[0], "--help"])
    assert not re.search(r"--batch\b(?!-size)", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["bench", "profile dcgan"])
def test_a_latent_by_the_name_that_train_has(command):
    for option in ("--latent", "--latent-dim"):
        assert commands.build_parser().parse_args([*command.split(), option, "8"]).latent == (8,)


@pytest.mark.parametrize("command", ["info", "bench", "profile", "train", "sample"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert re.search(rf"examples?:\s+gankern {command} ", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--print-completion", shell])
    assert exit.value.code == 0
    assert "--sweep" in capsys.readouterr().out


def test_completion_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    message = "gankern: error: argument --print-completion: needs shtab: pip install '.[completion]' in a clone"
    assert usage_error(["--print-completion", "bash"], capsys).startswith(message)


def test_an_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gankern.bench.cli", None)
    assert cli.main(["bench"]) == 1
    assert one_line(capsys).endswith("pip install '.[bench]' in a clone of gankern")


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("ops", ["gankern", "stock"])
@pytest.mark.parametrize("model", commands.MODELS)
def test_train(tmp_path, data, model, ops, capsys):
    out = tmp_path / "run"
    argv = ["train", model, "--data", data, "--steps", "2", "--out", str(out), "--seed", "3", "--ops", ops, *SMALL]
    assert cli.main(argv) == 0
    assert f"{out}: step 2, critic loss" in capsys.readouterr().out
    config = load_checkpoint(out)["config"]
    assert (config["model"], config["ops"], config["width"], config["batch_size"]) == (model, ops, 4, 4)
    assert json.loads((out / "config.json").read_text())["data"] == data


def test_train_options_reach_the_run(tmp_path, data):
    threads = torch.get_num_threads()
    options = ["--lr", "0.5", "--threads", "1", "--sample-every", "1", "--checkpoint-every", "1", "--log-every", "1"]
    try:
        argv = ["train", "wgan", "--data", data, "--steps", "2", "--out", str(tmp_path / "run"), *options, *SMALL]
        assert cli.main(argv) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert load_checkpoint(tmp_path / "run")["config"]["lr"] == 0.5
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_resume_takes_the_settings_of_the_run(run, capsys):
    assert cli.main(["train", "dcgan", "--steps", "3", "--out", str(run), "--resume", "--quiet"]) == 0
    state = load_checkpoint(run)
    assert (state["step"], state["config"]["width"]) == (3, 4)


@pytest.mark.parametrize(
    ("option", "value", "saved"),
    [("--width", "8", "4"), ("--seed", "1", "0"), ("--data", "digits", "noise.npz"), ("--ops", "stock", "gankern")],
)
def test_resume_refuses_other_settings(run, capsys, option, value, saved):
    argv = ["train", "dcgan", "--steps", "3", "--out", str(run), "--resume", option, value]
    message = usage_error(argv, capsys)
    assert f"argument {option}: the run to resume has " in message and saved in message and f"got {value}" in message


def test_resume_refuses_another_model(run, capsys):
    message = usage_error(["train", "wgan", "--steps", "3", "--out", str(run), "--resume"], capsys)
    assert message == "gankern train: error: argument MODEL: the run to resume has dcgan, got wgan"


def test_resume_without_a_run(tmp_path, capsys):
    assert cli.main(["train", "dcgan", "--steps", "3", "--out", str(tmp_path), "--resume"]) == 1
    assert "config.json: expected the settings of a run, found nothing" in one_line(capsys)


def test_train_into_the_folder_of_a_run(run, data, capsys):
    assert cli.main(["train", "dcgan", "--data", data, "--steps", "3", "--out", str(run), *SMALL]) == 1
    assert "out: " in one_line(capsys)


def test_sample(run, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["sample", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "sample.png")
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        assert cli.main(["sample", str(run), "--n", "5", "--out", str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_sample_without_a_run(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path)]) == 1
    assert "checkpoint.pt: expected the checkpoint of a run, found nothing" in one_line(capsys)


def test_ctrl_c(tmp_path, data, capsys, monkeypatch):
    step = loop.generator_step

    def interrupted_step(gan, latent):
        signal.raise_signal(signal.SIGINT)
        return step(gan, latent)

    monkeypatch.setattr(loop, "generator_step", interrupted_step)
    assert cli.main(["train", "dcgan", "--data", data, "--steps", "9", "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert one_line(capsys).startswith("gankern train: interrupted: after step 1 of 9; ")
    assert load_checkpoint(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
        (["info", "--yaml"], "unrecognized arguments: --yaml"),
        (["train", "vae"], "argument MODEL: invalid choice: 'vae'"),
        (["train", "dcgan"], "the following arguments are required: --steps, --out"),
        (["sample"], "the following arguments are required: RUN_DIR"),
        (["sample", "run", "--n", "0"], "argument --n: expected a positive integer, got '0'"),
        (["sample", "run", "--seed", "x"], "argument --seed: expected an integer from 0 to 2**63 - 1, got 'x'"),
    ],
)
def test_bad_usage(argv, message, capsys):
    assert message in usage_error(argv, capsys)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "expected a positive integer, got '0'"),
        ("--ops", "fast", "invalid choice: 'fast'"),
        ("--image-size", "x", "expected a positive integer, got 'x'"),
        ("--width", "-1", "expected a positive integer, got '-1'"),
        ("--latent-dim", "1.5", "expected a positive integer, got '1.5'"),
        ("--batch-size", "0", "expected a positive integer, got '0'"),
        ("--n-critic", "", "expected a positive integer, got ''"),
        ("--lr", "0", "expected a positive number, got '0'"),
        ("--lr", "nan", "expected a positive number, got 'nan'"),
        ("--lr", "fast", "expected a positive number, got 'fast'"),
        ("--seed", "-1", "expected an integer from 0 to 2**63 - 1, got '-1'"),
        ("--seed", str(2**63), "expected an integer from 0 to 2**63 - 1"),
        ("--device", "abacus", "expected a device of this machine, got 'abacus'"),
        ("--threads", "0", "expected a positive integer, got '0'"),
        ("--sample-every", "0", "expected a positive integer, got '0'"),
        ("--checkpoint-every", "0", "expected a positive integer, got '0'"),
        ("--log-every", "0", "expected a positive integer, got '0'"),
    ],
)
def test_bad_train_option(tmp_path, option, value, message, capsys):
    argv = ["train", "dcgan", "--steps", "1", "--out", str(tmp_path / "run"), f"{option}={value}"]
    assert f"argument {option}: {message}" in usage_error(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_image_size_that_no_model_has(tmp_path, data, capsys):
    argv = ["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run"), "--image-size", "30"]
    assert "argument --image-size: expected a power of two of at least 8, got '30'" in usage_error(argv, capsys)


def test_batch_size_beyond_the_data(tmp_path, data, capsys):
    argv = ["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run"), *SMALL]
    assert "argument --batch-size: expected 1 to 6" in usage_error([*argv, "--batch-size", "7"], capsys)


def test_missing_data(tmp_path, capsys):
    argv = ["train", "dcgan", "--data", str(tmp_path / "none"), "--steps", "1", "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 1
    assert "none: expected 'digits' or the path of" in one_line(capsys)


def test_out_that_is_a_file(tmp_path, data, capsys):
    assert cli.main(["train", "dcgan", "--data", data, "--steps", "1", "--out", data, *SMALL]) == 1
    assert data in one_line(capsys)
