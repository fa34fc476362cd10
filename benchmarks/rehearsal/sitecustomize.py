"""On the path of `gpu.sh --rehearse`: what the GPU machine lacks cannot be imported here either; parts can hang."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib.abc import MetaPathFinder
from typing import Any

#: Of what the tests, the docs and development need; and the extension.
MISSING = {
    "expecttest",
    "gankern._C",
    "l2m4m",
    "mkdocs",
    "mkdocstrings",
    "mlxtend",
    "mypy",
    "playwright",
    "pre_commit",
    "shtab",
    "sybil",
}
#: "TEXT@MODULE ...": a process whose arguments have the text hangs where it imports the module. After a "!" it does not
#: hear Ctrl-C.
HANGS = os.environ.get("GANKERN_HANGS", "").split()


class GpuMachine(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in MISSING or name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r} on the GPU machine", name=name)
        for hang in HANGS:
            text, _, module = hang.removeprefix("!").partition("@")
            if module == name and text in " ".join(sys.orig_argv):
                if hang.startswith("!"):
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                time.sleep(3600)


if os.environ.get("GANKERN_REHEARSE"):
    sys.meta_path.insert(0, GpuMachine())
