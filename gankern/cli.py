"""The ``gankern`` command."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gankern.arguments import UsageError, find_device, install_hint
from gankern.commands import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success, 1 on failure, 2 on bad usage, 130 after Ctrl-C. Bad usage that argparse finds ends in SystemExit.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    command = args.command
    if command is None:
        parser.print_help()
        return 0
    run, extra = COMMANDS[command]
    try:
        return run(args)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        return _fail(command, f"needs {error.name}: {install_hint(extra)}", 1)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except UsageError as error:
        return _fail(command, str(error), 2)
    except OSError as error:
        return _fail(command, str(error), 1)
    except ValueError as error:
        from gankern.data import DataError
        from gankern.train import CheckpointError

        return _fail(command, str(error), 1 if isinstance(error, DataError | CheckpointError) else 2)


def run_info(args: argparse.Namespace) -> int:
    """Run ``gankern info``."""
    from gankern._info import format_info, info, warm_up
    from gankern.backends import BackendUnavailable

    if args.arch and not args.warmup:
        raise UsageError("argument --arch: needs --warmup")
    for arch in args.arch or ():
        if re.fullmatch(r"sm_\d+[af]?", arch) is None:
            raise UsageError(f"argument --arch: expected an architecture such as sm_90, got {arch!r}")
    if args.warmup:
        try:
            for arch, count, seconds in warm_up(args.arch or ()):
                print(f"{count} kernels for {arch} ready in {seconds:.1f} s", file=sys.stderr)
        except BackendUnavailable as error:
            return _fail(args.command, str(error), 1)
        except RuntimeError as error:
            return _fail(args.command, str(error).splitlines()[0], 1)
    print(json.dumps(info(), indent=2) if args.json else format_info())
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Run ``gankern bench``."""
    from gankern.bench.cli import run

    return run(args)


def run_profile(args: argparse.Namespace) -> int:
    """Run ``gankern profile``."""
    from gankern.profile.cli import run

    return run(args)


def run_train(args: argparse.Namespace) -> int:
    """Run ``gankern train``."""
    import torch

    from gankern import data, models
    from gankern.train import fit

    device = find_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = ("image_size", "ops", "width", "latent_dim", "batch_size", "n_critic", "lr")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume:
        config, seed, spec = _settings_of_run(args, given)
    else:
        config, seed, spec = {"model": args.model, **given}, args.seed or 0, _data_spec(args.data or "digits")
    images = data.load(spec, image_size=config.get("image_size", 32))
    config.setdefault("channels", images.shape[1])

    torch.manual_seed(seed)
    gan = models.from_config(config)
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


def _settings_of_run(args: argparse.Namespace, given: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
    """Model settings, seed and data of the run to resume, which arguments may repeat but not change."""
    from gankern.train import load_config

    saved = load_config(args.out)
    asked = {"model": args.model, **given, "seed": args.seed, "data": args.data and _data_spec(args.data)}
    known = {**saved["model"], "seed": saved["seed"], "data": saved.get("data", asked["data"] or "digits")}
    for name, value in asked.items():
        if value is not None and value != known[name]:
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise UsageError(f"argument {option}: the run to resume has {known[name]}, got {value}")
    return saved["model"], known["seed"], known["data"]


def _data_spec(spec: str) -> str:
    """Make a path absolute, so that a run can be resumed from anywhere."""
    return spec if spec == "digits" else str(Path(spec).resolve())


def run_sample(args: argparse.Namespace) -> int:
    """Run ``gankern sample``."""
    from gankern import models
    from gankern.train import load_checkpoint, sample, save_grid

    state = load_checkpoint(args.run_dir)
    gan = models.from_config(state["config"])
    gan.load_state_dict(state["gan"])
    out = args.out or args.run_dir / "sample.png"
    save_grid(sample(gan, args.n, args.seed), out)
    print(out)
    return 0


def _fail(command: str, message: str, code: int) -> int:
    print(f"gankern {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


#: What each command runs, and the extra that brings what it imports.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str | None]] = {
    "info": (run_info, None),
    "bench": (run_bench, "bench"),
    "profile": (run_profile, "bench"),
    "train": (run_train, "train"),
    "sample": (run_sample, "train"),
}


if __name__ == "__main__":
    sys.exit(main())
