"""How CUDA C++ kernels are compiled, kept and launched; the compiler is real, the launch recorded."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cuda_on_cpu.launcher import Launcher
from cupy.cuda.function import Function

import gankern
from gankern import _cuda, backends, cli
from gankern._info import warm_up

# What CuPy says of either of CUDA's interfaces.
NO_DRIVER = r"CUDA driver version is insufficient|failed to load libcuda"
KERNEL = _cuda.kernel("weight_clip", "clip_weights", torch.float32)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GANKERN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_compiled_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _cuda.cubin(KERNEL, "sm_90")
    assert code[:4] == b"\x7fELF"
    assert [p.read_bytes() for p in kept.iterdir()] == [code]
    monkeypatch.setattr(_cuda, "compile_kernel", lambda *args: pytest.fail("compiled again"))
    assert _cuda.cubin(KERNEL, "sm_90") == code


def test_cache_tells_kernels_apart(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By architecture, macros, source and header."""
    _cuda.cubin(KERNEL, "sm_90")
    _cuda.cubin(KERNEL, "sm_80")
    _cuda.cubin(_cuda.kernel("weight_clip", "clip_weights", torch.bfloat16), "sm_90")
    assert len(list(kept.iterdir())) == 3
    for name in ("weight_clip.cu", "device.h"):
        sources = tmp_path / name / "sources"
        shutil.copytree(_cuda.SOURCES, sources)
        with (sources / name).open("a") as file:
            file.write("// changed\n")
        monkeypatch.setattr(_cuda, "SOURCES", sources)
        before = len(list(kept.iterdir()))
        _cuda.cubin(KERNEL, "sm_90")
        assert len(list(kept.iterdir())) == before + 1


def test_cache_is_written_whole_or_not_at_all(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_cuda.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        _cuda.cubin(KERNEL, "sm_90")
    assert not list(kept.iterdir())


def test_kernels_run_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GANKERN_CACHE_DIR", str(tmp_path / "file"))
    assert _cuda.cubin(KERNEL, "sm_90")[:4] == b"\x7fELF"
    assert "cannot be kept" in caplog.text


def test_an_error_of_the_compiler_is_shown() -> None:
    with pytest.raises(RuntimeError, match=r"weight_clip.*sm_90[\s\S]*nothing"):
        _cuda.compile_kernel(KERNEL._replace(defines=(("STORAGE", "nothing"),)), "sm_90")


class Device:
    """torch.cuda.device where there is no GPU: remembers what it was."""

    seen: ClassVar[list[torch.device]] = []

    def __init__(self, device: torch.device) -> None:
        self.seen.append(device)

    def __enter__(self) -> None: ...
    def __exit__(self, *args: Any) -> None: ...


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy itself, up to CUDA's driver, which is not there: cuda:1 with a stream of torch's and a kernel's function."""
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    stream = SimpleNamespace(cuda_stream=77, device_index=1)
    function = Function.__new__(Function)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(_cuda, "_function", lambda wanted, device: function)
    Device.seen.clear()
    _cuda._stream.cache_clear()
    yield function
    _cuda._stream.cache_clear()


def test_cupy_takes_a_launch(no_driver: Any) -> None:
    """Stream and arguments pass CuPy's own checks, without a warning: all that fails is the driver."""
    x, device, struct = torch.ones(3), torch.device("cuda", 1), np.zeros((), np.dtype([("a", np.int64, 400)]))
    for shared in (16, 64 << 10):
        with pytest.raises(RuntimeError, match=NO_DRIVER):
            _cuda.launch(KERNEL, (5, 2), 64, x, None, 2, 0.5, struct, device=device, shared=shared)
    assert Device.seen == [device, device]
    with pytest.raises(TypeError, match="Unsupported type"):  # CuPy looks at the arguments first
        _cuda.launcher(KERNEL, (1, 1, 1), (1, 1, 1), ["no argument"], 0, device)


def test_more_shared_memory_is_asked_of_the_driver(no_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    # CuPy's Function has no attribute for it.
    monkeypatch.setattr(_cuda, "_allow_shared", lambda function, size: asked.append((function, size)))
    for shared in (48 << 10, 49 << 10):
        with pytest.raises(RuntimeError, match=NO_DRIVER):
            _cuda.launch(KERNEL, 1, 64, device=torch.device("cuda", 1), shared=shared)
    assert asked == [(no_driver, 49 << 10)]


def test_a_stream_is_made_once(no_driver: Any) -> None:
    stream = _cuda._stream(77)
    assert stream.ptr == 77
    assert _cuda._stream(77) is stream
    assert _cuda._stream(78) is not stream


def test_launches_on_torchs_current_stream(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []
    launched: list[tuple[Any, ...]] = []
    # As many positional arguments as CuPy's Function takes.
    module = SimpleNamespace(load=loaded.append, get_function=lambda name: lambda *args: launched.append(args))
    monkeypatch.setattr("cupy.cuda.function.Module", lambda: module)
    stream = SimpleNamespace(cuda_stream=77, device_index=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index - 1))
    monkeypatch.setattr(torch.cuda, "device", Device)
    Device.seen.clear()
    _cuda._function.cache_clear()
    x, device = torch.ones(3), torch.device("cuda", 1)
    for _ in range(2):
        _cuda.launch(KERNEL, (5, 2), 64, x, None, 2, 0.5, device=device, shared=16)
    _cuda._function.cache_clear()
    assert loaded == [_cuda.cubin(KERNEL, "sm_90")]
    assert Device.seen == [device, device]
    grid, block, args, shared, on = launched[0]
    assert (grid, block, shared, on.ptr) == ((5, 2, 1), (64, 1, 1), 16, 77)
    assert args == (x.data_ptr(), 0, 2, 0.5)
    assert [a.dtype for a in args] == [np.uintp, np.uintp, np.int64, np.float64]


def test_a_gpu_that_nvrtc_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, get_device=lambda: 0)
    for capability, known in {(9, 0): True, (9, 9): False, (7, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        _cuda._unknown.cache_clear()
        reason = _cuda.refuse(on_gpu)
        assert (reason is None) is known
        assert known or re.search(
            rf"NVRTC [\d.]+ compiles for sm_\d+ to .*got a GPU of sm_{capability[0]}", reason or ""
        )
    _cuda._unknown.cache_clear()


def test_empty_grids_are_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "launcher", lambda *args: pytest.fail("launched"))
    _cuda.launch(KERNEL, 0, 64, device=torch.device("cpu"))
    _cuda.launch(KERNEL, (3, 0), 64, device=torch.device("cpu"))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cuda", "triton"):
        assert re.search("CUDA device; got cpu", backends.refusal("clip_weights_", name, x) or "")
    with gankern.backend("cuda"), pytest.raises(gankern.BackendUnavailable, match="got cpu"):
        gankern.clip_weights_(x, 1.0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    try:
        assert ".[cuda13]" in (_cuda.missing() or "")
    finally:
        _cuda.missing.cache_clear()


def test_a_planted_index_reaches_the_reference_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's run of a kernel is the kernel's: one element more or less is seen."""
    sources = tmp_path / "sources"
    shutil.copytree(_cuda.SOURCES, sources)
    text = (sources / "weight_clip.cu").read_text()
    planted = text.replace("i = whole + threadIdx.x", "i = whole + 1 + threadIdx.x")
    assert planted != text
    (sources / "weight_clip.cu").write_text(planted)
    monkeypatch.setattr(_cuda, "launcher", Launcher(sources))
    x = torch.ones(6)
    with gankern.backend("cuda"):
        gankern.clip_weights_(x, 0.5)
    assert x.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 0.5]


def test_warm_up(kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = SimpleNamespace(KERNELS=[KERNEL])
    monkeypatch.setattr(backends, "adapters", lambda name: [adapter])
    assert [row[:2] for row in warm_up(["sm_80", "sm_90"])] == [("sm_80", 1), ("sm_90", 1)]
    assert len(list(kept.iterdir())) == 2
    assert cli.main(["info", "--warmup", "--arch", "sm_90", "--json"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"1 kernels for sm_90 ready in [\d.]+ s\n", err)
    assert json.loads(out)["kernel_cache"] == str(kept)
    assert cli.main(["info", "--warmup", "--arch", "sm_1"]) == 1
    assert cli.main(["info", "--warmup", "--arch", "mars"]) == 2
    assert "sm_1" in capsys.readouterr().err
    assert cli.main(["info", "--arch", "sm_90"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_warm_up_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--warmup"]) == 1
    assert "torch finds no GPU" in capsys.readouterr().err
