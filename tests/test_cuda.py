"""How CUDA C++ kernels are compiled, kept and launched; the compiler is real, the launch recorded."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cuda_on_cpu.launcher import Launcher
from cupy_backends.cuda.api import driver

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
    """torch.cuda.device where there is no GPU: the device that is current in it is remembered."""

    current: ClassVar[int] = 0
    seen: ClassVar[list[int]] = []

    def __init__(self, device: int) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.device
        self.seen.append(self.device)

    def __exit__(self, *args: Any) -> None:
        Device.current = self.before


class Recorder:
    """CUDA's driver where there is none: reads what a launch of KERNEL's like would read, by its pointers."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

    def __init__(self) -> None:
        self.context, self.layout = 1, ""
        self.loaded: list[bytes] = []
        self.launched: list[tuple[Any, ...]] = []
        self.asked: list[tuple[int, ...]] = []
        self.between: Any = lambda: None

    def moduleLoadData(self, code: bytes) -> int:
        self.loaded.append(code)
        return len(self.loaded)

    def moduleGetFunction(self, module: int, name: str) -> int:
        assert name == KERNEL.name
        return module

    def ctxGetCurrent(self) -> int:
        return self.context

    def funcSetAttribute(self, *asked: int) -> None:
        self.asked.append(asked)

    def launchKernel(self, *call: int) -> None:
        *shape, pointers, extra = call
        self.between()
        assert extra == 0
        sizes = [struct.calcsize("=" + f) for f in self.layout.split()]
        places = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        read = [
            struct.unpack("=" + f, ctypes.string_at(places[i] or 0, size))[0]
            for i, (f, size) in enumerate(zip(self.layout.split(), sizes, strict=True))
        ]
        self.launched.append((*shape, read, Device.current))


@pytest.fixture
def recorded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Launches on a machine with two GPUs, as far as CUDA's driver, which records."""
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    found = Recorder()
    monkeypatch.setattr(_cuda, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Device.current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    Device.seen.clear()
    _cuda._function.cache_clear()
    yield found
    assert set(found.loaded) <= {_cuda.cubin(KERNEL, "sm_90")}
    _cuda._function.cache_clear()


GPU = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_launch_reaches_the_driver(recorded: Recorder) -> None:
    """On torch's current stream of the tensors' device, with the arguments as the kernel reads them."""
    struct_ = np.zeros((), np.dtype([("a", np.int64, 400)]))
    struct_["a"] = range(400)
    x, y = torch.ones(3), torch.ones(5)
    recorded.layout = "Q Q 3200s q d"
    for device, number in ((GPU[1], 2), (GPU[0], -3), (GPU[1], 4)):
        _cuda.launch(KERNEL, (5, 2), 64, x if number > 0 else y, None, struct_, number, 0.5, device=device, shared=16)
    read = [(x.data_ptr(), 2), (y.data_ptr(), -3), (x.data_ptr(), 4)]
    for (*call, values, on), (pointer, number), function, index in zip(
        recorded.launched, read, (1, 2, 1), (1, 0, 1), strict=True
    ):
        assert (call, on) == ([function, 5, 2, 1, 64, 1, 1, 16, 70 + index], index)
        assert values == [pointer, 0, struct_.tobytes(), number, 0.5]
    # The device that is current already is not set again.
    assert Device.seen == [1, 1]
    assert Device.current == 0


def test_each_launch_packs_its_own_arguments(recorded: Recorder) -> None:
    """Whatever is launched, by another thread or a signal's handler, before the driver has read them."""
    recorded.layout = "q d"

    def again() -> None:
        recorded.between = lambda: None
        _cuda.launch(KERNEL, 1, 64, 2, 2.0, device=GPU[0])

    for _ in range(2):
        recorded.between = again
        _cuda.launch(KERNEL, 1, 64, 1, 1.0, device=GPU[0])
    assert [values for *_, values, _ in recorded.launched] == [[2, 2.0], [1, 1.0]] * 2
    # An integer where the kernel takes a double arrives as one.
    _cuda.launch(KERNEL, 1, 64, 3, 3, device=GPU[0])
    assert recorded.launched[-1][-2] == [3, 3.0]
    with pytest.raises(struct.error):
        _cuda.launch(KERNEL, 1, 64, 3.5, 3.0, device=GPU[0])


def test_a_new_thread_gets_a_context(recorded: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(_cuda, "_make_current", made.append)
    for recorded.context in (0, 7):
        _cuda.launch(KERNEL, 1, 64, device=GPU[1])
    assert made == [1]
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        _cuda._make_current(0)


def test_a_kernel_is_loaded_in_a_mode_that_captures_let_pass(
    kept: Path, recorded: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the thread's before and after, also where the loading fails."""
    monkeypatch.undo()
    modes = [0]

    def exchange(pointer: Any) -> None:
        wanted = pointer._obj.value
        pointer._obj.value = modes[-1]
        modes.append(wanted)

    def load(code: bytes) -> None:
        assert modes[-1] == 2
        raise RuntimeError("not loaded")

    library = SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)
    monkeypatch.setattr(_cuda.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(_cuda, "_driver", lambda: SimpleNamespace(moduleLoadData=load))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.raises(RuntimeError, match="not loaded"):
        _cuda._function(KERNEL, 0)
    assert modes == [0, 2, 0]


def test_cupy_takes_a_launch(recorded: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CuPy's launch and its setting of an attribute get passes their own checks: all that fails is the driver."""
    x, structure = torch.ones(3), np.zeros((), np.dtype([("a", np.int64, 400)]))
    monkeypatch.setattr(recorded, "launchKernel", driver.launchKernel)
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        _cuda.launch(KERNEL, (5, 2), 64, x, None, 2, 0.5, structure, device=GPU[1])
    monkeypatch.setattr(recorded, "funcSetAttribute", driver.funcSetAttribute)
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        _cuda.launch(KERNEL, 1, 64, x, None, 2, 0.5, structure, device=GPU[1], shared=64 << 10)
    _cuda._function.cache_clear()
    monkeypatch.setattr(recorded, "moduleLoadData", driver.moduleLoadData)
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        _cuda.launch(KERNEL, 1, 64, x, None, 2, 0.5, structure, device=GPU[1])
    monkeypatch.setattr(recorded, "moduleGetFunction", driver.moduleGetFunction)
    monkeypatch.setattr(recorded, "moduleLoadData", lambda code: 1)
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        _cuda.launch(KERNEL, 1, 64, x, None, 2, 0.5, structure, device=GPU[1])
    monkeypatch.setattr(recorded, "moduleGetFunction", lambda module, name: 1)
    with pytest.raises(struct.error):  # as CuPy's own launch of a Function: a TypeError
        _cuda.launcher(KERNEL, (1, 1, 1), (1, 1, 1), ["no argument", 0, 0, 0.0, b""], 0, GPU[1])


def test_more_shared_memory_is_asked_of_the_driver(recorded: Recorder) -> None:
    for shared in (48 << 10, 49 << 10):
        _cuda.launch(KERNEL, 1, 64, device=GPU[1], shared=shared)
    assert recorded.asked == [(1, recorded.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 49 << 10)]


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
