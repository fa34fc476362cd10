"""Every kernel of the GPU compiles for every architecture, without spills and within its shared memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gankern import _cuda, backends

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
STATIC_SHARED = 48 << 10
KERNELS = {k.label: k for adapter in backends.adapters("cuda") for k in adapter.KERNELS}


@pytest.mark.timeout(1200)
def test_triton() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {row["arch"] for row in found} == set(SHARED)
    for row in found:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[row["arch"]], row


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("label", KERNELS)
def test_nvrtc(label: str, arch: str) -> None:
    _, log = _cuda.compile_kernel(KERNELS[label], arch, verbose=True)
    check_resources(log, label)


def check_resources(log: str, label: str) -> None:
    assert re.search(r"Used \d+ registers", log), log
    assert not re.search(r"[1-9]\d* bytes spill", log), f"{label}: {log}"
    assert all(int(size) <= STATIC_SHARED for size in re.findall(r"(\d+) bytes smem", log)), f"{label}: {log}"


# One specialisation of each entry point: nvcc takes over a second for each.
ENTRY_POINTS = {(k.source, k.name): k for k in reversed(KERNELS.values())}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("entry", ENTRY_POINTS, ids="-".join)
def test_nvcc(entry: tuple[str, str], arch: str, tmp_path: Path) -> None:
    kernel = ENTRY_POINTS[entry]
    defines = [f"-D{key}={value}" for key, value in kernel.defines]
    source = _cuda.SOURCES / f"{kernel.source}.cu"
    command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-Xptxas", "-v", *defines, str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_resources(done.stderr, kernel.label)
