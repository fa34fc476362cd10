"""Compiles every Triton kernel ahead of time and prints what each takes of the GPU, as JSON.

A program of its own: in a process whose kernels run in the interpreter none can be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

import gankern.ops
from gankern import _triton, backends

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def ptxas(ptx: str, arch: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(program), "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def resources(compiled: Any, arch: str) -> dict[str, int]:
    if arch.startswith("sm"):
        log = ptxas(compiled.asm["ptx"], re.search(r"\.target (\w+)", compiled.asm["ptx"])[1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
        registers = int(re.search(r"Used (\d+) registers", log)[1])
    else:
        text = compiled.asm["amdgcn"]
        spilled = sum(map(int, re.findall(r"gpr_spill_count:\s*(\d+)", text)))
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    return {"spilled": spilled, "registers": registers, "shared": compiled.metadata.shared}


def compiled() -> list[_triton.Compiled]:
    return [wanted for adapter in backends.adapters("triton") for wanted in adapter.COMPILED]


def rows(number: int) -> list[dict[str, Any]]:
    """What one specialisation takes of each architecture."""
    wanted = compiled()[number]
    # Architectures differ in what their matrix units take, and hardly in anything else.
    alike = [w for w in compiled()[:number] if kind(w) == kind(wanted)]
    return [
        {"kernel": wanted.label, "arch": arch, **resources(_triton.compile_kernel(wanted, target), arch)}
        for arch, target in TARGETS.items()
        if arch != "sm_80" or not alike
    ]


def kind(wanted: _triton.Compiled) -> tuple[Any, ...]:
    return wanted.kernel.__name__, wanted.dtype, wanted.constants.get("PRECISION")


def main() -> None:
    assert gankern.__version__
    # Spawned: a forked process shares its parent's compiler threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = [row for some in pool.map(rows, range(len(compiled())), chunksize=4) for row in some]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
