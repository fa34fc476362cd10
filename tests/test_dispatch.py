"""What a GPU has measured decides what auto runs there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gankern import backends, dispatch
from gankern.compiler import choice


class OnGpu:
    """What the choice looks at of a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self._size = dtype, size

    def numel(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        return self._size * self.dtype.itemsize


class Takes:
    """An adapter that takes all tensors."""

    def refuse(self, *tensors: Any) -> None:
        return None


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GANKERN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU / 80 GB")
    monkeypatch.setattr(dispatch, "key", lambda *tensors: ("float32", tensors[0].numel().bit_length() - 1))
    taking = {name: Takes() for name in backends.NAMES}
    monkeypatch.setattr(backends, "_adapters", dict.fromkeys(("batch_norm_act", "conv2d_act", "l1_distance"), taking))
    dispatch._of_device.cache_clear()
    backends._by_default.cache_clear()
    yield
    dispatch._of_device.cache_clear()
    backends._by_default.cache_clear()


def chosen(op: str, size: int) -> str:
    found = backends.select(op, OnGpu(size))  # type: ignore[arg-type]
    explained = backends.explain_call(op, OnGpu(size))  # type: ignore[arg-type]
    assert explained.chosen is not None
    assert backends._adapters[op][explained.chosen] is found
    return explained.chosen


def test_the_nearest_size_that_was_measured_decides() -> None:
    assert chosen("l1_distance", 1 << 10) == "cuda"
    assert chosen("conv2d_act", 1 << 10) == "cpu"  # passed over unless measured
    dispatch.save("A GPU / 80 GB", {"l1_distance": {"float32": {10: "reference", 20: "triton"}}})
    assert [chosen("l1_distance", 1 << k) for k in (4, 12, 17, 30)] == ["reference", "reference", "triton", "triton"]
    assert chosen("conv2d_act", 1 << 10) == "cpu"
    dispatch.save("A GPU / 80 GB", {"conv2d_act": {"float32": {10: "cuda"}}})
    assert chosen("conv2d_act", 1 << 10) == "cuda"
    assert chosen("l1_distance", 1 << 4) == "reference"
    assert "not measured" in backends.explain_call("conv2d_act", torch.ones(2)).refused["cuda"]


def test_float32_in_tf32_is_a_type_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"float32": {10: "reference"}, "tf32": {10: "triton"}}
    dispatch.save("A GPU / 80 GB", {"l1_distance": rows, "conv2d_act": {"float32": {10: "cuda"}}})
    for tf32, name in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(dispatch, "convolves_in_tf32", lambda tf32=tf32: tf32)
        assert chosen("l1_distance", 1 << 10) == name
        assert chosen("conv2d_act", 1 << 10) == "cuda"


def test_tf32_is_read_by_torchs_old_and_new_flags() -> None:
    """Of which the old one cannot be read once the new ones differ from operator to operator."""
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            assert dispatch.convolves_in_tf32() is allowed
        if hasattr(torch.backends.cudnn, "conv"):
            for precision in ("ieee", "tf32"):
                torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
                assert dispatch.convolves_in_tf32() is (precision == "tf32")
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_another_gpu_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.save("A GPU / 80 GB", {"l1_distance": {"float32": {10: "reference"}}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Another")
    dispatch._of_device.cache_clear()
    assert chosen("l1_distance", 1 << 10) == "cuda"


def test_a_file_that_cannot_be_read_is_no_table(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen("l1_distance", 1 << 10) == "cuda"
    assert not caplog.records
    dispatch._of_device.cache_clear()
    dispatch.path("A GPU / 80 GB").write_text("[1, 2")
    assert chosen("l1_distance", 1 << 10) == "cuda"
    assert "cannot be read" in caplog.text


def test_calls_are_told_apart_by_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert dispatch.key(torch.empty(3), torch.empty(60, 1000, dtype=torch.bfloat16)) == ("bfloat16", 16)
    assert dispatch.key(torch.empty(0)) == ("float32", 0)


@pytest.mark.by_size
def test_small_eager_calls_on_a_gpu_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By auto, of the ops that the rule is for; not while a graph is captured, nor in what is captured next."""
    few, many = OnGpu(dispatch.FEW_BYTES // 4), OnGpu(dispatch.FEW_BYTES // 4 + 1)
    tensors: list[Any] = [few, many]
    captures = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[-1])

    def small() -> list[bool]:
        assert dispatch.is_small(*tensors) is False, "the largest decides"
        return [dispatch.is_small(t) for t in tensors]

    def explained(op: str) -> backends.Explanation:
        return backends.explain_call(op, tensors[0])

    assert small() == [True, False]
    assert [choice.norm_pays(t) for t in tensors] == [False, True], "in plans"
    assert dispatch.is_small(torch.ones(3)) is False
    assert explained("batch_norm_act").chosen == "reference"
    assert explained("batch_norm_act").refused == dict.fromkeys(("cuda", "triton", "cpu"), dispatch.SMALL)
    assert explained("l1_distance").chosen == "cuda"
    with backends.backend("cuda"):
        assert small() == [False, False]
        assert explained("batch_norm_act").chosen == "cuda"
    with dispatch.as_captured():
        assert small() == [False, False]
        assert explained("batch_norm_act").chosen == "cuda"
    assert small() == [True, False]
    captures.append(True)
    assert small() == [False, False]
    assert [choice.norm_pays(t) for t in tensors] == [True, True]
    # Of what needs a first call outside of the graph.
    assert dispatch.is_small(few, captured=True) is True  # type: ignore[arg-type]
    with dispatch.as_captured():
        assert dispatch.is_small(few, captured=True) is False  # type: ignore[arg-type]


def test_as_captured_holds_in_a_backward_pass() -> None:
    seen: list[bool] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(dispatch._is_as_captured()))
    loss = y.sum()
    with dispatch.as_captured():
        loss.backward()
        with dispatch.as_captured():
            pass
        assert dispatch._is_as_captured()
    assert seen == [True]
    assert not dispatch._is_as_captured()
