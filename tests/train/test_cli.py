import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gankern import cli
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


def error(argv, capsys, code):
    """The one line on stderr of a call that fails."""
    capsys.readouterr()
    try:
        found = cli.main(argv)
    except SystemExit as exit:
        found = exit.code
    err = capsys.readouterr().err
    assert (found, err.count("\n"), "\r" in err) == (code, 1, False), err
    return err.rstrip("\n")


def resuming(run, steps=3):
    return ["train", "dcgan", "--steps", str(steps), "--out", str(run), "--resume", "--quiet"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--image-size", "1", "argument --image-size: expected a power of two of at least 8, got '1'"),
        ("--image-size", "28", "argument --image-size: expected a power of two of at least 8, got '28'"),
        ("--data", "", "argument --data: expected a path, got ''"),
        ("--out", "", "argument --out: expected a path, got ''"),
        ("--batch-size", "7", "argument --batch-size: expected 1 to 6, the number of images, got 7"),
        ("--width", str(2**40), "the model of --image-size, --width and --latent-dim "),
        ("--latent-dim", str(2**62), "the model of --image-size, --width and --latent-dim "),
    ],
)
def test_arguments_of_train(tmp_path, data, capsys, option, value, message):
    argv = ["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run"), *SMALL, option, value]
    assert error(argv, capsys, 2).startswith(f"gankern train: error: {message}")
    assert not (tmp_path / "run").exists()


def test_images_that_need_more_memory_than_there_is(tmp_path, data, capsys):
    argv = ["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run")]
    assert "expected images that fit in memory, found 6, which need" in error(
        [*argv, "--image-size", str(2**40)], capsys, 1
    )


def test_torchrun(tmp_path, data, capsys, monkeypatch):
    argv = ["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run"), *SMALL]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "trains in one process, got WORLD_SIZE=2: start it without torchrun" in error(argv, capsys, 2)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(argv) == 0


def test_tensorboard_that_is_missing(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run"), "--tensorboard", *SMALL]
    assert "argument --tensorboard: needs its package: pip install tensorboard" in error(argv, capsys, 2)


def test_an_error_deep_in_training_is_no_bad_usage(tmp_path, data, monkeypatch):
    def broken(*args):
        raise ValueError("weight: a fault of gankern")

    monkeypatch.setattr(loop, "generator_step", broken)
    with pytest.raises(ValueError, match=r"^weight: a fault of gankern$"):
        cli.main(["train", "dcgan", "--data", data, "--steps", "1", "--out", str(tmp_path / "run"), *SMALL])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "width"), 8, "config.json: model.width: expected 4, as in checkpoint.pt, found 8"),
        (("model", "image_size"), 2**40, "config.json: model.image_size: expected 8, as in checkpoint.pt, found"),
        (("model", "alien"), 1, "config.json: model.alien: expected None, as in checkpoint.pt, found 1"),
        (("seed",), 7, "config.json: seed: expected 0, as in checkpoint.pt, found 7"),
        (("seed",), "0", "config.json: seed: expected an integer, found '0'"),
        (("data",), 3, "config.json: data: expected a text, found 3"),
        (("data",), "/nowhere", "/nowhere: expected 'digits' or the path of"),
    ],
)
def test_settings_broken_by_hand(run, capsys, path, value, message):
    config = json.loads((run / "config.json").read_text())
    holder = config
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    (run / "config.json").write_text(json.dumps(config))
    assert message in error(resuming(run), capsys, 1)


def test_data_that_changed_since_the_run_began(run, data, capsys):
    np.savez(data, images=np.zeros((5, 8, 8), np.uint8))
    assert "images: expected the 6 of the saved run, got 5" in error(resuming(run), capsys, 1)
    np.savez(data, images=np.zeros((3, 8, 8), np.uint8))
    assert "checkpoint.pt: config.batch_size: expected 1 to 3" in error(resuming(run), capsys, 1)
    np.savez(data, images=np.zeros((6, 8, 8, 3), np.uint8))
    assert "images: expected (N, 1, 8, 8) float32 for this model" in error(resuming(run), capsys, 1)


def test_broken_files_of_a_run(run, capsys):
    for name in ("losses.csv", "config.json", "checkpoint.pt"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])
        assert str(run / name) in error(resuming(run), capsys, 1)
        (run / name).write_bytes(content)
    (run / "checkpoint.pt").write_text("text")
    assert "checkpoint.pt: expected a checkpoint, found" in error(["sample", str(run)], capsys, 1)


@pytest.mark.parametrize(("suffix", "form"), [("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_samples_have_the_format_of_their_suffix(run, tmp_path, suffix, form):
    path = tmp_path / f"grid.{suffix}"
    assert cli.main(["sample", str(run), "--out", str(path)]) == 0
    with Image.open(path) as image:
        assert image.format == form


@pytest.mark.parametrize("name", ["grid.xyz", "grid", "grid.npz"])
def test_samples_of_no_format(run, tmp_path, name, capsys):
    message = error(["sample", str(run), "--out", str(tmp_path / name)], capsys, 2)
    assert "argument --out: expected the suffix of an image that Pillow writes, such as .png, got " in message
    assert not (tmp_path / name).exists()


def test_samples_that_the_format_cannot_hold(run, tmp_path, capsys):
    message = error(["sample", str(run), "--out", str(tmp_path / "grid.xbm")], capsys, 2)
    assert "argument --out: expected a format that holds this image, got .xbm" in message


def test_more_samples_than_fit_in_memory(run, capsys):
    assert "argument --n: 1000000000000 images need" in error(["sample", str(run), "--n", "1" + "0" * 12], capsys, 2)


def test_samples_into_what_is_no_file(run, tmp_path, capsys):
    (tmp_path / "grid.png").mkdir()
    message = error(["sample", str(run), "--out", str(tmp_path / "grid.png")], capsys, 1)
    assert message.endswith("grid.png: cannot be written: something is there that is no file")


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(tmp_path, data, capsys, monkeypatch):
    out = tmp_path / "run"
    argv = ["train", "dcgan", "--data", data, "--steps", "9", "--out", str(out), "--threads", "1", *SMALL]
    step = loop.generator_step

    def interrupted(times):
        def interrupted_step(gan, latent):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            return step(gan, latent)

        return interrupted_step

    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(loop, "generator_step", interrupted(2))
        assert error(argv, capsys, 130) == "gankern train: interrupted: nothing was saved"
        monkeypatch.setattr(loop, "generator_step", interrupted(1))
        message = error(argv, capsys, 130)
        go_on = f"gankern train dcgan --steps 9 --out {out} --resume --threads 1"
        assert message == f"gankern train: interrupted: after step 1 of 9; {out} holds step 1; go on with: {go_on}"
        monkeypatch.setattr(loop, "generator_step", step)
        assert cli.main([*go_on.split()[1:], "--quiet"]) == 0
        assert load_checkpoint(out)["step"] == 9
    finally:
        torch.set_num_threads(threads)


def test_a_second_run_into_a_folder(tmp_path, data, capsys):
    """Another process writes to it: it is named, samples can be drawn, and nothing is left of its death."""
    out = tmp_path / "run"
    argv = ["train", "dcgan", "--data", data, "--out", str(out), *SMALL]
    options = ["--steps", "1000000", "--checkpoint-every", "1", "--log-every", "1", "--sample-every", "1000000"]
    process = subprocess.Popen([sys.executable, "-m", "gankern.cli", *argv, *options], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 200
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        expected = f"out: {out} is in use by process {process.pid}: wait for it or choose another folder"
        assert error([*argv, "--steps", "3"], capsys, 1) == f"gankern train: error: {expected}"
        assert error(resuming(out), capsys, 1) == f"gankern train: error: {expected}"
        assert cli.main(["sample", str(out), "--out", str(tmp_path / "grid.png")]) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    step = load_checkpoint(out)["step"]
    assert cli.main(resuming(out, step + 1)) == 0
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.json", "losses.csv", "samples"]


def test_logs_have_no_carriage_returns(tmp_path, data, capsys):
    argv = ["train", "dcgan", "--data", data, "--steps", "2", "--out", str(tmp_path / "run"), *SMALL[:-1]]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    assert re.fullmatch(r"dcgan: step 2 of 2: critic .* images/s\n", err)
