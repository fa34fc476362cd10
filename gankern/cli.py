"""The ``gankern`` command."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence

from gankern._files import FileError
from gankern.arguments import UsageError, install_hint
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
    except KeyboardInterrupt as interrupt:
        print(f"gankern {command}: interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130
    except UsageError as error:
        return _fail(command, str(error), 2)
    except (FileError, OSError) as error:
        return _fail(command, str(error), 1)


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
    from gankern.train.cli import run_train

    return run_train(args)


def run_sample(args: argparse.Namespace) -> int:
    """Run ``gankern sample``."""
    from gankern.train.cli import run_sample

    return run_sample(args)


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
