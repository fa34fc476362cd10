"""Every kernel of the GPU compiles for every architecture, without spills and within its shared memory."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import gankern.ops  # noqa: F401  registers every kernel
from gankern import _cuda, backends

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
STATIC_SHARED = 48 << 10
KERNELS = [k for adapter in backends.adapters("cuda") for k in adapter.KERNELS]
# The widest values take most registers.
KERNELS.sort(key=lambda k: ("STORAGE", "double") in k.defines)
ENTRY_POINTS = {(k.source, k.name): k for k in KERNELS}
# Architectures differ in what their matrix units take, and hardly in anything else.
OLDER = {(k.source, k.name, k.defines[:2] if "TF32" in dict(k.defines) else ()): k for k in KERNELS}


def compilations(kernels: Iterable[_cuda.Kernel]) -> list[_cuda.Kernel]:
    """Without those whose entry point another one's compilation brings: a file has several."""
    return list({(k.source, k.defines): k for k in kernels}.values())


NVRTC = [*((k, "sm_90") for k in compilations(KERNELS)), *((k, "sm_80") for k in compilations(OLDER.values()))]
NVCC = compilations(ENTRY_POINTS.values())


def test_triton_kernels_are_started_on_their_tensors_device() -> None:
    """Triton launches on the current device: only _triton.start makes it the tensors'."""
    package = Path(_cuda.__file__).parent
    for path in sorted(package.rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        subscripts = [call.func for call in calls if isinstance(call.func, ast.Subscript)]
        grids = [s for s in subscripts if isinstance(s.slice, ast.Tuple) or ast.unparse(s.slice) == "grid"]
        assert bool(grids) == (path.name == "_triton.py"), f"{path}: {[ast.unparse(s) for s in grids]}"


# Kernels whose packs are made in registers: the compiler splits a struct's store.
PACKED = ("interpolate", "penalty_tail", "norm_apply", "clip_weights", "rmsprop_clip", "bias_act", "avg_pool")


@pytest.mark.parametrize("name", PACKED)
def test_packs_are_stored_16_bytes_at_a_time(name: str) -> None:
    kernels = [k for k in KERNELS if k.name == name and ("STORAGE", "half") not in k.defines]
    assert kernels
    for kernel in (kernels[0], kernels[-1]):
        assert "st.global.v4" in _cuda.ptx(kernel, "compute_90"), kernel.label


@pytest.mark.slow
def test_triton() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {row["arch"] for row in found} == set(SHARED)
    for row in found:
        assert row["spilled"] == 0, row
        # What is compiled for sm_90 alone is to fit in sm_80, too.
        assert row["shared"] <= min(SHARED[row["arch"]], SHARED["sm_80"]), row


@pytest.mark.parametrize(("kernel", "arch"), NVRTC, ids=lambda value: getattr(value, "label", value))
def test_nvrtc(kernel: _cuda.Kernel, arch: str) -> None:
    _, log = _cuda.compile_kernel(kernel, arch, verbose=True)
    check_resources(log, kernel.label)
    names = {k.name for k in KERNELS if (k.source, k.defines) == (kernel.source, kernel.defines)}
    assert names <= set(re.findall(rf"entry function '(\w+)' for '{arch}'", log))


def check_resources(log: str, label: str) -> None:
    assert re.search(r"Used \d+ registers", log), log
    assert not re.search(r"[1-9]\d* bytes spill", log), f"{label}: {log}"
    assert all(int(size) <= STATIC_SHARED for size in re.findall(r"(\d+) bytes smem", log)), f"{label}: {log}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("kernel", NVCC, ids=lambda kernel: kernel.label)
def test_nvcc(kernel: _cuda.Kernel, tmp_path: Path) -> None:
    defines = [f"-D{key}={value}" for key, value in kernel.defines]
    source = _cuda.SOURCES / f"{kernel.source}.cu"
    # One run for both architectures, most of which is the same.
    archs = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    command = ["nvcc", "-fatbin", *archs, "-std=c++17", "-Xptxas", "-v", *defines, str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for arch in ("sm_80", "sm_90"):
        assert f"for '{arch}'" in done.stderr
    check_resources(done.stderr, kernel.label)
