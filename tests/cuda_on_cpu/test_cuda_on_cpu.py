"""What runs kernels on the CPU finds the mistakes that a GPU would punish."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cuda_on_cpu.launcher import Launcher
from gankern import _cuda

ROOT = Path(__file__).parents[2]
BLOCK_SUM = """
#include "device.h"
using T = STORAGE;
extern "C" __global__ void sums(const T* x, T* out, index_t size) {
    index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    T total = block_sum<T>(i < size ? x[i] : T(0));
    T twice = block_sum<T>(total);
    out[i] = twice;
}
"""
# Each thread reads what its neighbour wrote.
NEIGHBOUR = """
#include "device.h"
extern "C" __global__ void sums(const float* x, float* out, index_t size) {
    GANKERN_SHARED(float, values, 64);
    values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}
"""


def run(folder: Path, source: str, size: int, blocks: int, threads: int, header: str | None = None) -> np.ndarray:
    sources = Path(tempfile.mkdtemp(dir=folder))
    text = (_cuda.SOURCES / "device.h").read_text() if header is None else header
    (sources / "device.h").write_text(text)
    (sources / "planted.cu").write_text(source)
    x, out = torch.arange(1.0, size + 1), torch.full((blocks * threads,), float("nan"))
    kernel = _cuda.kernel("planted", "sums", torch.float32)
    arguments = [_cuda._argument(a) for a in (x, out, size)]
    Launcher(sources)(kernel, (blocks, 1, 1), (threads, 1, 1), arguments, 0, torch.device("cpu"))
    return out.numpy()


def test_block_sum(tmp_path: Path) -> None:
    found = run(tmp_path, BLOCK_SUM, size=150, blocks=2, threads=96)
    assert np.all(found[:96] == 96 * 97 / 2 * 96)
    assert np.all(found[96:] == (150 * 151 / 2 - 96 * 97 / 2) * 96)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_changes_the_result(tmp_path: Path, barrier: int) -> None:
    header = (_cuda.SOURCES / "device.h").read_text()
    start = header.index("block_sum(A value)")
    pieces = header[start:].split("__syncthreads();")
    planted = header[:start] + "".join(p + ("" if i == barrier else "__syncthreads();") for i, p in enumerate(pieces))
    planted = planted.removesuffix("__syncthreads();")
    found = run(tmp_path, BLOCK_SUM, size=150, blocks=2, threads=96, header=planted)
    assert not np.all(found[:96] == 96 * 97 / 2 * 96)


def test_no_order_of_threads_can_be_counted_on(tmp_path: Path) -> None:
    want = np.roll(np.arange(1.0, 65.0), -1)
    assert np.array_equal(run(tmp_path, NEIGHBOUR, size=64, blocks=1, threads=64), want)
    without = NEIGHBOUR.replace("    __syncthreads();\n", "")
    assert not np.array_equal(run(tmp_path, without, size=64, blocks=1, threads=64), want)


def test_shared_memory_starts_as_nan(tmp_path: Path) -> None:
    unwritten = NEIGHBOUR.replace("    values[threadIdx.x] = x[threadIdx.x];\n", "")
    assert np.all(np.isnan(run(tmp_path, unwritten, size=64, blocks=1, threads=64)))


def in_a_process(folder: Path, source: str, sanitize: bool = False) -> subprocess.CompletedProcess[str]:
    """A mistake that ends the process, in one of its own."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\n"
        "from pathlib import Path; from cuda_on_cpu.test_cuda_on_cpu import run\n"
        "run(Path(sys.argv[2]), sys.argv[3], size=64, blocks=1, threads=64)"
    )
    environment = dict(os.environ)
    if sanitize:
        found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment |= {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", code, str(ROOT), str(folder), source]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_barrier_that_some_threads_miss(tmp_path: Path) -> None:
    divergent = NEIGHBOUR.replace("    __syncthreads();", "    if (threadIdx.x % 2) __syncthreads();")
    found = in_a_process(tmp_path, divergent)
    assert found.returncode != 0
    assert "barrier that others never reach" in found.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, so no libasan")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("= x[threadIdx.x];", "= x[threadIdx.x + 1];"),
        ("", ""),
        ("(threadIdx.x + 1) % blockDim.x", "threadIdx.x + 1"),
        ("= x[threadIdx.x];", "= reinterpret_cast<const Pack<float, 4>*>(x + 1)[threadIdx.x / 8].values[0];"),
    ],
    ids=["read", "none", "shared memory", "alignment"],
)
def test_sanitizers_see_an_index_off_by_one(tmp_path: Path, right: str, wrong: str) -> None:
    found = in_a_process(tmp_path, NEIGHBOUR.replace(right, wrong), sanitize=True)
    assert (found.returncode == 0) == (right == wrong)
    assert ("ERROR: AddressSanitizer" in found.stderr or "runtime error" in found.stderr) == (right != wrong)
