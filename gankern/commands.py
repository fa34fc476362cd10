"""The ``gankern`` command's arguments. What is in here imports no torch: help and wrong arguments answer at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gankern import __version__
from gankern.arguments import (
    closest,
    data_spec,
    file_path,
    image_size,
    install_hint,
    positive_float,
    positive_int,
    seed_int,
    shape,
)

# Those of gankern.models, .backends and .bench, without importing torch.
MODELS = ("dcgan", "wgan", "wgan-gp")
BACKENDS = ("cuda", "triton", "cpu", "reference")
LOSSES = ("wgan-gp", "wgan", "gan")
DTYPES = ("bfloat16", "float32")
VARIANTS = (
    *("eager", "channels_last", "compile", "compile_step", "autocast", "cdist", "foreach", "capturable", "func_grad"),
    "graph",
)

INFO_EXAMPLE = "example: gankern info --json"
BENCH_EXAMPLES = """examples:
  gankern bench                                     every op
  gankern bench gradient_penalty critic_step        two groups of cases
  gankern bench --main                              every op, then training on digits
  gankern bench --device cuda --dtype bfloat16      every op, on a GPU
  gankern bench critic_step.wgan-gp --dtype bfloat16 --against eager,autocast
  gankern bench minibatch_discrimination.training --sweep
  gankern bench gradient_penalty --sizes batch=16,64 --sizes image_size=16,32,64
  gankern bench --compare out/bench/bench.json --out out/now
  gankern bench --critic mymodule:make_critic --generator mymodule:make_generator --shape 3,64,64
"""
PROFILE_EXAMPLES = """examples:
  gankern profile wgan-gp --steps 20
  gankern profile --critic mymodule:make_critic --shape 3,64,64 --batch-size 32
  gankern profile --critic nets:critic --generator nets:generator --shape 2 --latent 8 --out out/points
  gankern profile --critic nets:projection_critic --labels 10 --shape 3,32,32
"""
TRAIN_EXAMPLE = "example: gankern train dcgan --data digits --steps 1000 --out runs/digits"
SAMPLE_EXAMPLE = "example: gankern sample runs/digits --n 64 --out digits.png"


class Completion(argparse.Action):
    """Print a shell's completion script."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(f"argument --print-completion: needs shtab: {install_hint('completion')}")
        print(shtab.complete(build_parser(), args[1]))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the word that was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A command's parser knows the options that a wrong one may have meant; the one above it does not.
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hints = (closest(word.partition("=")[0], self._option_string_actions) for word in unknown if word[0] == "-")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += closest(str(value), map(str, action.choices or ()))
            raise


def model_name(text: str) -> str:
    """Type of arguments that are models: ``WGAN_GP`` is ``wgan-gp``."""
    name = text.lower().replace("_", "-")
    return name if name in MODELS else text


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; ``command`` is the name of the one that was given, None without one."""
    parser = Parser(
        prog="gankern",
        description="Kernel-accelerated GANs for PyTorch.",
        epilog=TRAIN_EXAMPLE,
    )
    parser.add_argument("--version", action="version", version=f"gankern {__version__}")
    parser.add_argument(
        "--print-completion",
        action=Completion,
        choices=("bash", "zsh"),
        help='print a completion script: eval "$(gankern --print-completion bash)"',
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_info_arguments(commands.add_parser("info", help="show the machine, versions and backends"))
    _add_bench_arguments(commands.add_parser("bench", help="time gankern against stock PyTorch"))
    _add_profile_arguments(commands.add_parser("profile", help="show where a critic step's time goes"))
    _add_train_arguments(commands.add_parser("train", help="train a GAN"))
    _add_sample_arguments(commands.add_parser("sample", help="draw images from a trained GAN"))
    return parser


def _add_batch_size(group: Any, **options: Any) -> None:
    group.add_argument("--batch-size", type=positive_int, metavar="N", **options)
    _add_other_name(group, "--batch", "batch_size", positive_int)


def _add_compile_seconds(group: Any) -> None:
    group.add_argument(
        "--compile-seconds",
        type=positive_float,
        default=90.0,
        metavar="S",
        help="leave out what torch.compile takes longer for, default %(default)s",
    )


def _add_latent(group: Any, **options: Any) -> None:
    group.add_argument("--latent", type=shape, metavar="N,...", **options)
    _add_other_name(group, "--latent-dim", "latent", shape)


def _add_other_name(group: Any, option: str, dest: str, type: Callable[[str], Any]) -> None:
    """Let an argument be given by an older name, or by another command's, that help does not list."""
    group.add_argument(option, dest=dest, type=type, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _examples(parser: argparse.ArgumentParser, text: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = text


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = INFO_EXAMPLE
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--warmup", action="store_true", help="first compile every CUDA kernel into the cache")
    parser.add_argument(
        "--arch", action="append", help="architecture to compile for, such as sm_90 (default: the GPUs')"
    )


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    _examples(parser, BENCH_EXAMPLES)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a case or a group of cases; every op by default")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--main", action="store_true", help="the main job: every op, then training on digits")
    parser.add_argument(
        "--train-seconds", type=positive_float, default=110.0, help="seconds of training in --main, default %(default)s"
    )

    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cpu", help="torch device, such as cuda; default %(default)s")
    how.add_argument(
        "--dtype", choices=(*DTYPES, "tf32"), default="float32", help="default %(default)s; tf32: with TF32 allowed"
    )
    _add_batch_size(how, help="batch size in place of each case's own")
    how.add_argument("--backend", choices=("auto", *BACKENDS), help="what gankern's side runs on; default auto")
    how.add_argument("--against", metavar="VARIANT,...", help=f"stock variants, of {', '.join(VARIANTS)}")
    how.add_argument("--repeat", type=positive_int, default=25, metavar="N", help="rounds at most, default %(default)s")
    how.add_argument(
        "--seconds",
        type=positive_float,
        default=2.5,
        help="seconds of rounds a case, five rounds at least (two of very long ones), default %(default)s",
    )
    _add_compile_seconds(how)
    how.add_argument("--quick", action="store_true", help="a few rounds only and no torch.compile, for a first look")
    how.add_argument("--threads", type=positive_int, metavar="N", help="torch's threads")
    how.add_argument("--sweep", action="store_true", help="also over sizes of each case's main dimension")
    how.add_argument(
        "--sizes", action="append", default=[], metavar="DIM=N,...", help="also over these sizes; may be repeated"
    )
    how.add_argument(
        "--compare", type=Path, metavar="JSON", help="what has changed since a stored result; exit code 1 if slower"
    )
    how.add_argument(
        "--tune", action="store_true", help="also find each op's fastest backend on this GPU, for auto to go by"
    )

    yours = parser.add_argument_group("your own networks", "MODULE is imported from the current folder or installed")
    yours.add_argument("--critic", metavar="MODULE:FACTORY", help="makes a critic: critic(x), or critic(x, labels)")
    yours.add_argument("--generator", metavar="MODULE:FACTORY", help="makes a generator of such samples")
    yours.add_argument("--shape", type=shape, metavar="C,H,W", help="shape of a sample, such as 3,64,64 or 2")
    _add_latent(yours, help="shape of a latent; found by default")
    yours.add_argument("--loss", choices=LOSSES, help=f"default {LOSSES[0]}")
    yours.add_argument("--labels", type=positive_int, metavar="K", help="the critic takes labels of K classes")

    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default %(default)s")
    out.add_argument("--json", type=Path, metavar="FILE", help="default bench.json in --out")
    out.add_argument("--html", type=Path, metavar="FILE", help="default bench.html in --out")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")


def _add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    _examples(parser, PROFILE_EXAMPLES)
    what = parser.add_argument_group("what")
    what.add_argument("model", nargs="?", type=model_name, metavar="MODEL", choices=MODELS, help=", ".join(MODELS))
    what.add_argument("--critic", metavar="MODULE:FACTORY", help="makes the critic, in place of MODEL's")
    what.add_argument("--generator", metavar="MODULE:FACTORY", help="makes the generator; random samples without it")
    what.add_argument("--shape", type=shape, metavar="C,H,W", help="of one sample, 2 for points; MODEL: 1,32,32")
    _add_latent(what, help="of one latent; default by --generator's first layer")
    what.add_argument("--labels", type=positive_int, metavar="K", help="call critic(x, y) with labels of K classes")
    what.add_argument("--loss", choices=LOSSES, help="default MODEL's, or wgan-gp")
    _add_batch_size(what, default=64, help="samples a step, default %(default)s")
    what.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 means autocast")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=positive_int, default=20, metavar="N", help="steps to time, default %(default)s")
    how.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without stock's step compiled whole, to save time"
    )
    _add_compile_seconds(how)
    how.add_argument("--device", default="cpu", help="torch device, such as cuda; default %(default)s")
    how.add_argument("--threads", type=positive_int, metavar="N", help="torch's threads")
    how.add_argument("--out", type=Path, default=Path("out/profile"), metavar="DIR", help="default %(default)s")
    how.add_argument("--json", type=Path, metavar="FILE", help="default profile.json in --out")
    how.add_argument(
        "--trace", type=Path, metavar="FILE", help="default trace-gankern.json in --out, stock's beside it"
    )


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = TRAIN_EXAMPLE
    parser.add_argument("model", type=model_name, metavar="MODEL", choices=MODELS, help=", ".join(MODELS))
    parser.add_argument(
        "--steps", type=positive_int, required=True, help="generator steps, those before a resume included"
    )
    parser.add_argument("--out", type=file_path, required=True, help="folder to write")
    parser.add_argument(
        "--data", type=data_spec, help="'digits' (default), or an IDX file, a .npz file or a folder of images"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    model = parser.add_argument_group("model", "the paper's defaults, unless given")
    model.add_argument("--ops", choices=("gankern", "stock"), help="what the model runs on (default gankern)")
    model.add_argument("--image-size", type=image_size, help="side of the images, a power of two (default 32)")
    model.add_argument("--width", type=positive_int, help="channels of the layers next to the image (default 32)")
    model.add_argument("--latent-dim", type=positive_int, help="size of the latent vector")
    _add_batch_size(model, help="images per critic step")
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


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = SAMPLE_EXAMPLE
    parser.add_argument("run_dir", metavar="RUN_DIR", type=file_path, help="folder that `gankern train` wrote")
    parser.add_argument("--n", type=positive_int, default=64, help="number of images (default 64)")
    parser.add_argument("--out", type=file_path, help="image to write (default RUN_DIR/sample.png)")
    parser.add_argument("--seed", type=seed_int, default=0, help="seed of the latents (default 0)")
