"""What gankern runs on: versions, processor, threads, GPUs, backends. Never raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gankern.ops  # noqa: F401  registers every room's kernels
from gankern import _cuda, _native, _triton, backends, workspace

_PACKAGES = ("gankern", "torch", "numpy", "triton", "cupy-cuda12x", "cupy-cuda13x", "mlxtend", "matplotlib")


def info() -> dict[str, Any]:
    """Describe the environment.

    Returns
    -------
    dict
        JSON-ready: ``versions``, ``cpu`` (model, cores, isa, matrix_units, threading), ``threads``, ``memory_gib``,
        ``gpus``, ``backends`` (None where available, else the reason), ``backend`` in force, ``kernel_cache`` (folder
        of compiled kernels), ``kernels_cached``, ``workspace_limit_mib``, ``commit``, ``python``, ``platform``.
    """
    return {
        "versions": {name: v for name in _PACKAGES if (v := _safe(partial(importlib.metadata.version, name)))},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "commit": _safe(_commit),
        "cpu": {
            "model": _safe(_cpu_model),
            "cores": os.cpu_count(),
            "isa": _safe(lambda: _native.kernels.cpu_isa()),
            "matrix_units": _safe(lambda: bool(_native.kernels.has_matrix_units())),
            "threading": _safe(lambda: _native.kernels.threading_runtime()),
        },
        "threads": torch.get_num_threads(),
        "memory_gib": _safe(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)),
        "gpus": _safe(_gpus) or [],
        "backend": _safe(backends.requested),
        "kernel_cache": _safe(lambda: str(_cuda.cache_dir())),
        "kernels_cached": _safe(lambda: len(list(_cuda.cache_dir().glob("*.cubin")))),
        "workspace_limit_mib": _safe(lambda: workspace.limit() >> 20),
        "backends": {
            "reference": None,
            "cpu": _native.import_error,
            "triton": _safe(lambda: _without_gpu() or _triton.missing()),
            "cuda": _safe(lambda: _without_gpu() or _cuda.missing()),
        },
    }


def format_info(report: dict[str, Any] | None = None) -> str:
    """:func:`info` as one page of text."""
    report = info() if report is None else report
    cpu = report["cpu"]
    lines = [
        "gankern " + report["versions"].get("gankern", "(not installed)") + f", commit {report['commit'] or 'unknown'}",
        "versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items() if k != "gankern"),
        f"python {report['python']} on {report['platform']}",
        f"cpu: {cpu['model']}, {cpu['cores']} cores, kernels for {cpu['isa']}"
        + f"{' and AMX' if cpu['matrix_units'] else ''}, threads from {cpu['threading']}",
        f"threads: {report['threads']}, memory: {report['memory_gib']} GiB",
        "gpus: " + (", ".join(report["gpus"]) or "none"),
        f"backend in force: {report['backend']}",
    ]
    lines += [f"  {name}: {reason or 'available'}" for name, reason in report["backends"].items()]
    lines.append(f"compiled GPU kernels: {report['kernels_cached']} in {report['kernel_cache']}")
    lines.append(f"memory kept idle between steps: at most {report['workspace_limit_mib']} MiB")
    return "\n".join(lines)


def warm_up(archs: Sequence[str] = ()) -> list[tuple[str, int, float]]:
    """Compile every CUDA C++ kernel into the cache, so that no first call has to.

    Parameters
    ----------
    archs : sequence of str, optional
        Architectures such as ``"sm_90"``, which need not be there; by default those of this machine's GPUs.

    Returns
    -------
    list of (str, int, float)
        Architecture, number of kernels and seconds.

    Raises
    ------
    BackendUnavailable
        If CuPy or NVRTC is missing, or there is no GPU and no architecture is given.
    """
    reason = _cuda.missing() if archs else _without_gpu() or _cuda.missing()
    if reason is not None:
        raise backends.BackendUnavailable(f"the cuda backend is not available: {reason}")
    there = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    wanted = dict.fromkeys(archs or (f"sm_{major}{minor}" for major, minor in there))
    kernels = [kernel for adapter in backends.adapters("cuda") for kernel in adapter.KERNELS]
    report = []
    for arch in wanted:
        start = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            list(pool.map(_cuda.cubin, kernels, [arch] * len(kernels)))
        report.append((arch, len(kernels), time.perf_counter() - start))
    return report


def _without_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _safe(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
