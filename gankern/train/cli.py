"""``gankern train`` and ``gankern sample``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gankern import data, models
from gankern._files import WriteError
from gankern.arguments import UsageError, find_device
from gankern.data.memory import beyond_memory
from gankern.train.checkpoint import FILE_NAME, build, load_checkpoint
from gankern.train.errors import CheckpointError, shown
from gankern.train.loop import check_arguments, fit
from gankern.train.run import CONFIG_NAME, load_config
from gankern.train.samples import image_format, sample, save_grid

SETTINGS = ("image_size", "ops", "width", "latent_dim", "batch_size", "n_critic", "lr")


def run_train(args: argparse.Namespace) -> int:
    """Run ``gankern train``."""
    try:
        return _train(args)
    except (KeyboardInterrupt, WriteError) as error:
        if not error.args:  # before training began
            raise type(error)("nothing was saved") from error
        raise type(error)(f"{error}{_how_to_go_on(args)}") from error


def _train(args: argparse.Namespace) -> int:
    processes = os.environ.get("WORLD_SIZE", "")
    if processes not in ("", "1"):
        raise UsageError(f"trains in one process, got WORLD_SIZE={processes}: start it without torchrun")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("argument --tensorboard: needs its package: pip install tensorboard")
    device = find_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.resume:
        config, seed, spec = _settings_of_run(args, given)
    else:
        config, seed, spec = {"model": args.model, **given}, args.seed or 0, args.data or "digits"
    images = data.load(spec, image_size=config.get("image_size", 32))
    config.setdefault("channels", images.shape[1])

    with _as_usage(of_run=args.out if args.resume else None):
        _check_memory(config)
        torch.manual_seed(seed)
        gan = models.from_config(config)
        check_arguments(gan, images, args.steps)
    history = fit(
        gan,
        images,
        steps=args.steps,
        out=args.out,
        seed=seed,
        sample_every=args.sample_every,
        checkpoint_every=args.checkpoint_every,
        log_every=args.log_every,
        resume=args.resume,
        progress=not args.quiet,
        tensorboard=args.tensorboard,
        device=device,
        metadata={"data": spec},
    )
    step, critic, generator, _ = history.rows()[-1]
    print(f"{args.out}: step {step}, critic loss {critic:.4f}, generator loss {generator:.4f}")
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Run ``gankern sample``."""
    out = args.out or args.run_dir / "sample.png"
    with _as_usage():
        image_format(out)
    gan = build(load_checkpoint(args.run_dir), args.run_dir)
    size = args.n * gan.channels * gan.image_size**2
    if too_much := beyond_memory(12 * size):  # floats, their grid and the file
        raise UsageError(f"argument --n: {args.n} images need {too_much}")
    images = sample(gan, args.n, args.seed)
    with _as_usage():
        save_grid(images, out)
    print(out)
    return 0


def _settings_of_run(args: argparse.Namespace, given: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
    """Model settings, seed and data of the run to resume, which arguments may repeat but not change."""
    saved, state = load_config(args.out), load_checkpoint(args.out)
    found, written = {**saved["model"], "seed": saved["seed"]}, {**state["config"], "seed": state["seed"]}
    for name in [*written, *(found.keys() - written.keys())]:
        if found.get(name) != written.get(name):
            field = name if name == "seed" else f"model.{name}"
            expected = f"{shown(written.get(name))}, as in {FILE_NAME}"
            raise CheckpointError(
                f"{args.out / CONFIG_NAME}: {field}: expected {expected}, found {shown(found.get(name))}"
            )
    build(state, args.out)
    known = {**found, "data": saved.get("data", args.data or "digits")}
    for name, value in {"model": args.model, **given, "seed": args.seed, "data": args.data}.items():
        if value is not None and value != known[name]:
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise UsageError(f"argument {option}: the run to resume has {known[name]}, got {value}")
    return dict(state["config"]), state["seed"], known["data"]


def _check_memory(config: dict[str, Any]) -> None:
    """Raise ValueError where parameters, gradients and two moments of Adam are more than the memory that is left."""
    options = "the model of --image-size, --width and --latent-dim"
    try:
        with torch.device("meta"):
            outline = models.from_config(config)
    except (OverflowError, RuntimeError) as error:
        raise UsageError(f"{options} is too large: {str(error).splitlines()[0]}") from error
    parameters = (*outline.generator.parameters(), *outline.critic.parameters())
    if too_much := beyond_memory(4 * sum(parameter.nbytes for parameter in parameters)):
        raise UsageError(f"{options} needs {too_much}")


@contextlib.contextmanager
def _as_usage(*, of_run: Path | None = None) -> Iterator[None]:
    """Turn the ValueError of an argument's check, whose message begins with the argument's name, into bad usage."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        if of_run is not None:
            raise CheckpointError(f"{of_run / FILE_NAME}: config.{error}") from error
        name, _, rest = str(error).partition(":")
        option = "out" if name == "path" else name.replace("_", "-")
        raise UsageError(f"argument --{option}:{rest}") from error


def _how_to_go_on(args: argparse.Namespace) -> str:
    """The command that takes up a run that has a checkpoint and steps left."""
    try:
        if load_checkpoint(args.out)["step"] >= args.steps:
            return ""
    except CheckpointError:
        return ""
    command = ["gankern", "train", args.model, "--steps", str(args.steps), "--out", str(args.out), "--resume"]
    for option, default in (("device", "cpu"), ("threads", None)):  # the same bits need the same
        if getattr(args, option) != default:
            command += [f"--{option}", str(getattr(args, option))]
    return f"; go on with: {shlex.join(command)}"
