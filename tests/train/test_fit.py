import csv
import json
import re
import signal
import sys
import types

import pytest
import torch
from PIL import Image

from gankern import models, train
from gankern.train import loop, progress

SMALL = {"image_size": 8, "width": 4, "latent_dim": 4, "batch_size": 4, "n_critic": 2}
NAMES = sorted(models.MODELS)


@pytest.fixture
def images():
    return torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(name="dcgan", ops="gankern", **overrides):
    torch.manual_seed(3)
    return models.build(name, ops=ops, **(SMALL | overrides))


def fit(gan, images, **options):
    return train.fit(gan, images, **({"progress": False} | options))


def tensors(state):
    """All tensors of a nested state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def losses(path):
    with path.open() as file:
        return [(row["step"], row["critic_loss"], row["generator_loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ops", ["gankern", "stock"])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path, images, name, ops):
    whole = build(name, ops)
    fit(whole, images, steps=6, out=tmp_path / "whole", seed=5)
    fit(build(name, ops), images, steps=3, out=tmp_path / "parts", seed=5)
    resumed = build(name, ops)
    history = fit(resumed, images, steps=6, out=tmp_path / "parts", resume=True)

    assert losses(tmp_path / "parts" / "losses.csv") == losses(tmp_path / "whole" / "losses.csv")
    assert history.step == [1, 2, 3, 4, 5, 6]
    expected, actual = tensors(whole.state_dict()), tensors(resumed.state_dict())
    assert len(expected) == len(actual) > 0
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    grid = "samples/step-000006.png"
    assert (tmp_path / "parts" / grid).read_bytes() == (tmp_path / "whole" / grid).read_bytes()


def test_files_of_a_run(tmp_path, images):
    gan = build()
    history = fit(
        gan, images, steps=5, out=tmp_path, seed=7, sample_every=2, checkpoint_every=3, metadata={"data": "noise"}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "config.json", "losses.csv", "samples"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step-{step:06d}.png" for step in (2, 4, 5)
    ]
    with Image.open(tmp_path / "samples" / "step-000005.png") as grid:
        assert (grid.mode, grid.size) == ("L", (78, 78))
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": gan.config, "seed": 7, "data": "noise"}
    assert train.load_config(tmp_path)["model"] == gan.config
    state = train.load_checkpoint(tmp_path)
    assert (state["step"], state["seed"], state["config"]) == (5, 7, gan.config)
    with (tmp_path / "losses.csv").open() as file:
        rows = [tuple(map(float, row.values())) for row in csv.DictReader(file)]
    assert rows == history.rows()
    assert all(rate > 0 for rate in history.images_per_second)


def test_history_holds_the_losses_of_the_steps(images):
    gan, expected = build(), build()
    history = fit(gan, images, steps=2, seed=1, log_every=1)
    torch.manual_seed(1)
    batches = loop.make_batches(images, 4, torch.Generator().manual_seed(1))
    for step in range(2):
        for _ in range(2):
            critic_loss = train.critic_step(expected, next(batches), expected.sample_latent(4))
        generator_loss = train.generator_step(expected, expected.sample_latent(4))
        assert (history.critic_loss[step], history.generator_loss[step]) == (critic_loss.item(), generator_loss.item())


def test_global_random_state_is_left_alone(images):
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    gan = build()
    torch.manual_seed(11)
    fit(gan, images, steps=1)
    train.sample(gan, 2)
    assert torch.equal(torch.get_rng_state(), expected)


def test_logging_and_sampling_do_not_change_the_run(tmp_path, images):
    plain = fit(build(), images, steps=4)
    busy = fit(build(), images, steps=4, out=tmp_path, sample_every=1, checkpoint_every=1, log_every=1)
    assert busy.critic_loss == plain.critic_loss


def test_ctrl_c_ends_the_run_after_its_step_and_leaves_a_checkpoint(tmp_path, images, monkeypatch):
    expected = fit(build(), images, steps=4)
    steps = []

    def interrupted_step(gan, latent):
        steps.append(None)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return train.generator_step(gan, latent)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "generator_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            fit(build(), images, steps=4, out=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(steps) == train.load_checkpoint(tmp_path)["step"] == len(losses(tmp_path / "losses.csv")) == 2
    assert fit(build(), images, steps=4, out=tmp_path, resume=True).critic_loss == expected.critic_loss


def test_second_ctrl_c_ends_the_run_at_once(tmp_path, images, monkeypatch):
    def interrupted_step(gan, latent):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "generator_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        fit(build(), images, steps=4, out=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path, images):
    fit(build(), images, steps=2, out=tmp_path)
    with (tmp_path / "losses.csv").open("a") as file:
        file.write("3,9.0,9.0,1.0\n")
    fit(build(), images, steps=3, out=tmp_path, resume=True)
    rows = losses(tmp_path / "losses.csv")
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert rows[-1][1] != "9.0"


def test_resume_of_a_finished_run_does_nothing(tmp_path, images):
    fit(build(), images, steps=2, out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert len(fit(build(), images, steps=2, out=tmp_path, resume=True)) == 2
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_tensorboard(tmp_path, images, monkeypatch):
    scalars = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            scalars.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            scalars.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    history = fit(build(), images, steps=1, out=tmp_path, tensorboard=True)
    assert scalars == [
        (tmp_path / "tensorboard", 1),
        ("critic_loss", history.critic_loss[0], 1),
        ("generator_loss", history.generator_loss[0], 1),
        ("images_per_second", history.images_per_second[0], 1),
        "closed",
    ]


def test_missing_tensorboard(tmp_path, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"^tensorboard: .* pip install tensorboard$"):
        fit(build(), images, steps=1, out=tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_lines_where_stderr_is_no_terminal(images, capsys, monkeypatch):
    train.fit(build(), images, steps=2, log_every=1)
    (line,) = capsys.readouterr().err.splitlines(keepends=True)
    assert re.fullmatch(r"dcgan: step 2 of 2: critic -?[\d.]+, generator -?[\d.]+, \d+ images/s\n", line)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    train.fit(build(), images, steps=2, log_every=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "\r" not in err
    fit(build(), images, steps=1)
    assert not capsys.readouterr().err


def test_bar_on_a_terminal(images, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train.fit(build(), images, steps=2, log_every=1)
    err = capsys.readouterr().err
    assert "\rdcgan: 100%" in err and "images/s" in err and "step 2 of 2" not in err


@pytest.mark.parametrize("name", ["steps", "sample_every", "checkpoint_every", "log_every"])
def test_bad_count(images, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected a positive integer, got 0$"):
        fit(build(), images, **({"steps": 1} | {name: 0}))


@pytest.mark.parametrize(
    "bad", [torch.zeros(9, 8, 8), torch.zeros(9, 3, 8, 8), torch.zeros(9, 1, 16, 16), torch.zeros(9, 1, 8, 8).double()]
)
def test_bad_images(bad):
    with pytest.raises(ValueError, match=r"^images: expected \(N, 1, 8, 8\) float32 for this model, got "):
        fit(build(), bad, steps=1)


def test_too_few_images(images):
    with pytest.raises(ValueError, match=r"^batch_size: expected 1 to 3, the number of images, got 4$"):
        fit(build(), images[:3], steps=1)


@pytest.mark.parametrize("option", ["resume", "tensorboard"])
def test_out_is_needed(images, option):
    with pytest.raises(ValueError, match=rf"^out: expected a folder, which {option} needs, got None$"):
        fit(build(), images, steps=1, **{option: True})


def test_out_with_a_run_in_it(tmp_path, images):
    fit(build(), images, steps=1, out=tmp_path)
    with pytest.raises(FileExistsError, match=r"^out: .* holds a run already"):
        fit(build(), images, steps=1, out=tmp_path)


def test_resume_without_a_checkpoint(tmp_path, images):
    with pytest.raises(train.CheckpointError, match=r"checkpoint\.pt: expected the checkpoint of a run, found nothing"):
        fit(build(), images, steps=1, out=tmp_path, resume=True)


@pytest.mark.parametrize("overrides", [{"width": 8}, {"lr": 1.0}, {"ops": "stock"}])
def test_resume_with_another_model(tmp_path, images, overrides):
    fit(build(), images, steps=1, out=tmp_path)
    (name,) = overrides
    with pytest.raises(
        train.CheckpointError, match=rf"^{name}: expected .*, as in .*checkpoint.pt, which the run began with, got "
    ):
        fit(build(**overrides), images, steps=2, out=tmp_path, resume=True)


def test_resume_with_other_images(tmp_path, images):
    fit(build(), images, steps=1, out=tmp_path)
    with pytest.raises(ValueError, match=r"^images: expected the 10 of the saved run, got 8$"):
        fit(build(), images[:8], steps=2, out=tmp_path, resume=True)


def test_broken_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(train.CheckpointError, match=r"expected a checkpoint, found a file that torch cannot load"):
        train.load_checkpoint(tmp_path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(train.CheckpointError, match=r"expected a checkpoint of gankern, found something else"):
        train.load_checkpoint(tmp_path)


def test_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"config": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(train.CheckpointError):
        train.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"), [(None, "found nothing"), ("{", "expected JSON"), ("[]", "something else")]
)
def test_broken_config(tmp_path, content, found):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(train.CheckpointError, match=found):
        train.load_config(tmp_path)
