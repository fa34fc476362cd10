"""The ``gankern`` command."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gankern.arguments import UsageError, find_device, positive_float, positive_int, seed_int

# gankern.models.MODELS, without importing it for --help.
MODELS = ("dcgan", "wgan", "wgan-gp")

INFO_EXAMPLE = "example: gankern info --json"
BENCH_EXAMPLE = "example: gankern bench --help"
PROFILE_EXAMPLE = "example: gankern profile wgan-gp --steps 20"
TRAIN_EXAMPLE = "example: gankern train wgan-gp --data digits --steps 300 --out runs/a"
SAMPLE_EXAMPLE = "example: gankern sample runs/a --n 64 --out digits.png"


class Completion(argparse.Action):
    """Print a shell's completion script."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error("argument --print-completion: needs shtab: pip install 'gankern[completion]'")
        print(shtab.complete(build_parser(with_arguments_of=("bench", "profile")), args[1]))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv else ""
    try:
        args = build_parser(with_arguments_of=(command,)).parse_args(argv)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except ModuleNotFoundError as error:
        extra = {"bench": "bench", "profile": "bench", "train": "train", "sample": "train"}.get(command)
        if extra is None:
            raise
        return _fail(command, f"needs {error.name}: pip install 'gankern[{extra}]'", 1)
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


def build_parser(*, with_arguments_of: Collection[str] = ()) -> argparse.ArgumentParser:
    """Make the parser; the arguments of ``bench`` and ``profile`` only on request, since they need torch."""
    parser = Parser(
        prog="gankern",
        description="Kernel-accelerated GANs for PyTorch.",
        epilog=TRAIN_EXAMPLE,
    )
    parser.add_argument(
        "--print-completion",
        action=Completion,
        choices=("bash", "zsh"),
        help='print a completion script: eval "$(gankern --print-completion bash)"',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show the machine, versions and backends", epilog=INFO_EXAMPLE)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument("--warmup", action="store_true", help="first compile every CUDA kernel into the cache")
    info.add_argument("--arch", action="append", help="architecture to compile for, such as sm_90 (default: the GPUs')")
    info.set_defaults(run=run_info)

    bench = commands.add_parser("bench", help="time gankern against stock PyTorch", epilog=BENCH_EXAMPLE)
    bench.set_defaults(run=run_bench)
    if "bench" in with_arguments_of:
        from gankern.bench.cli import add_arguments

        add_arguments(bench)

    profile = commands.add_parser("profile", help="show where a critic step's time goes", epilog=PROFILE_EXAMPLE)
    profile.set_defaults(run=run_profile)
    if "profile" in with_arguments_of:
        from gankern.profile import cli as profile_cli

        profile_cli.add_arguments(profile)

    train = commands.add_parser("train", help="train a GAN", epilog=TRAIN_EXAMPLE)
    _add_train_arguments(train)
    train.set_defaults(run=run_train)

    sample = commands.add_parser("sample", help="draw images from a trained GAN", epilog=SAMPLE_EXAMPLE)
    sample.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder that `gankern train` wrote")
    sample.add_argument("--n", type=positive_int, default=64, help="number of images (default 64)")
    sample.add_argument("--out", type=Path, help="PNG file to write (default RUN_DIR/sample.png)")
    sample.add_argument("--seed", type=seed_int, default=0, help="seed of the latents (default 0)")
    sample.set_defaults(run=run_sample)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", choices=MODELS, help=", ".join(MODELS))
    parser.add_argument(
        "--steps", type=positive_int, required=True, help="generator steps, those before a resume included"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--data", help="'digits' (default), or the path of an IDX file, a .npz file or a folder of images"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    model = parser.add_argument_group("model", "the paper's defaults, unless given")
    model.add_argument("--ops", choices=("gankern", "stock"), help="what the model runs on (default gankern)")
    model.add_argument("--image-size", type=positive_int, help="side of the images, a power of two (default 32)")
    model.add_argument("--width", type=positive_int, help="channels of the layers next to the image (default 32)")
    model.add_argument("--latent-dim", type=positive_int, help="size of the latent vector")
    model.add_argument("--batch-size", type=positive_int, help="images per critic step")
    model.add_argument("--n-critic", type=positive_int, help="critic steps per generator step")
    model.add_argument("--lr", type=positive_float, help="learning rate of both optimizers")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=seed_int, help="seed of parameters, latents and shuffles (default 0)")
    run.add_argument("--device", default="cpu", help="torch device to train on (default cpu)")
    run.add_argument("--threads", type=positive_int, help="torch's threads")
    run.add_argument("--sample-every", type=positive_int, default=100, help="steps between sample grids (default 100)")
    run.add_argument(
        "--checkpoint-every", type=positive_int, default=100, help="steps between checkpoints (default 100)"
    )
    run.add_argument(
        "--log-every", type=positive_int, default=10, help="steps between readings of the losses (default 10)"
    )
    run.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def run_info(args: argparse.Namespace) -> int:
    """Run ``gankern info``."""
    from gankern.backends import BackendUnavailable
    from gankern.info import format_info, info, warm_up

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


if __name__ == "__main__":
    sys.exit(main())
