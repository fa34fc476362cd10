"""Batch norm + activation, and the blocks that end in it, by the kernels of the GPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate, cuts, layouts, run
from torch import Tensor

from gankern import _cuda, backends, ops
from gankern.ops.conv_transpose_bn_act import cpu, cuda, passes, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "none")
FORMATS = (torch.contiguous_format, torch.channels_last)
# Planes and rows in packs and value by value, of one part and several, of one block of channels and several.
SHAPES = [(3, 5, 7, 3), (5, 3, 16, 8), (2, 5, 24), (37, 7), (35, 20, 1, 1)]
MORE_SHAPES = [(2, 2, 10, 33), (1, 17, 4, 4), (2, 3, 1, 3)]


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that small tensors are cut into several parts."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda, "_PLANES", 32)
        monkeypatch.setattr(cuda, "_ROWS", 64)
        triton = importlib.import_module("gankern.ops.conv_transpose_bn_act.triton")
        monkeypatch.setattr(triton, "_BYTES", 256)
        monkeypatch.setattr(triton, "_VALUES", 64)


def norm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Input, weight and bias; running mean and variance; gradient: in values that the dtype holds.

    The gradient's sums do not cancel: stock adds up float32 in float64 on the CPU, which on a GPU it does not.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))
    vectors = [torch.randn(shape[1], dtype=torch.float64, device=device).to(wide) for _ in range(4)]
    return [(x * 2 + 3).to(dtype), *vectors[:2]], [vectors[2], vectors[3].abs() + 0.5], (grad + x + 1).to(dtype)


def norm_act(function: Callable[..., Tensor], stats: list[Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: function(x, *stats, w, b, **options)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product(SHAPES, DTYPES), *((shape, torch.float32) for shape in MORE_SHAPES)],
    ids=str,
)
def test_batch_norm_act_is_as_accurate_as_stock(gpu: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases = [(activation, True) for activation in ACTIVATIONS] + [("leaky_relu", False), ("tanh", False)]
    if dtype != torch.float32:
        cases = [("relu", True), ("tanh", True), ("leaky_relu", False)]
    for number, (activation, training) in enumerate(cases):
        memory_format = FORMATS[number % 2] if len(shape) == 4 else torch.contiguous_format
        inputs, stats, grad = norm_inputs(shape, dtype, gpu)
        inputs[0] = inputs[0].contiguous(memory_format=memory_format)
        options: dict[str, Any] = {"training": training, "activation": activation, "eps": 1e-3, "momentum": 0.3}
        results = []
        for function, kind in [
            (ops.batch_norm_act, None),
            (reference.batch_norm_act, None),
            (reference.batch_norm_act, torch.float64),
        ]:
            cast = [t.to(kind or t.dtype) for t in inputs]
            running = [t.to(kind or t.dtype, copy=True) for t in stats]
            results.append(run(norm_act(function, running, **options), cast, grad.to(kind or dtype)) + running)
        names = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
        for name, ours, stock, exact in zip(names, *results, strict=True):
            what = f"{name} {activation} {training} {memory_format}"
            assert_as_accurate(ours, stock, exact, what)
        assert results[0][0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(16, 3, 9, 9), (16, 8, 8, 8)], ids=str)
def test_statistics_survive_a_large_mean(
    gpu: torch.device, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    x = (torch.randn(shape, dtype=torch.float64, device=gpu) + 1e4).float().contiguous(memory_format=memory_format)
    mean, var = torch.zeros(shape[1], device=gpu), torch.zeros(shape[1], device=gpu)
    ops.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_are_stocks(gpu: torch.device, activation: str) -> None:
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, 30.0, -30.0, 0.3, -0.3, 0.7, -200.0]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([values], dtype=dtype, device=gpu).t()
        stats = torch.zeros(1, device=gpu, dtype=dtype), torch.ones(1, device=gpu, dtype=dtype)
        grad = torch.linspace(-1, 1, len(values), dtype=dtype, device=gpu)[:, None]

        def call(x: Tensor, function: Any, stats: Any = stats) -> Tensor:
            return function(x, *stats, training=False, activation=activation, eps=1e-30)

        got, want = (run(lambda x, f=f: call(x, f.batch_norm_act), [x], grad) for f in (ops, reference))
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got[0], want[0], equal_nan=True, rtol=tolerance, atol=0)
        if activation == "none":
            assert torch.equal(got[0].signbit(), want[0].signbit())
        # Stock's relu lets the gradient of a NaN through, which has none.
        known = ~x.isnan()
        torch.testing.assert_close(got[1][known], want[1][known], rtol=tolerance, atol=tolerance)


def test_same_bits_on_every_run(gpu: torch.device) -> None:
    def everything() -> list[Tensor]:
        found = []
        for shape, memory_format in zip([(5, 2, 11, 9), (9, 20, 8, 4)], FORMATS, strict=True):
            torch.manual_seed(1)
            inputs, stats, grad = norm_inputs(shape, torch.float32, gpu)
            inputs[0] = inputs[0].contiguous(memory_format=memory_format)
            found += run(norm_act(ops.batch_norm_act, stats, training=True), inputs, grad) + stats
        return found

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))


@pytest.mark.parametrize(("training", "activation"), [(True, "tanh"), (False, "leaky_relu")])
def test_batch_norm_act_derivatives(gpu: torch.device, training: bool, activation: str) -> None:
    inputs, stats, _ = norm_inputs((2, 2, 2), torch.float64, gpu)
    inputs = [t.requires_grad_() for t in inputs]
    function = norm_act(ops.batch_norm_act, stats, training=training, momentum=0.0, activation=activation)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_without_affine_parameters_or_running_statistics(gpu: torch.device) -> None:
    for shape in [(4, 3, 5), (6, 3)]:
        x, grad = torch.randn(shape, device=gpu), torch.randn(shape, device=gpu)
        for given in itertools.product((None, torch.rand(3, device=gpu)), repeat=2):
            for stats in [(None, None), (torch.rand(3, device=gpu), torch.rand(3, device=gpu))]:

                def call(x: Tensor, function: Any, stats: Any = stats, given: Any = given) -> Tensor:
                    return function(x, *stats, *given, training=stats[0] is None, activation="leaky_relu")

                got, want = (run(lambda x, f=f: call(x, f.batch_norm_act), [x], grad) for f in (ops, reference))
                torch.testing.assert_close(got, want)


def test_every_layout_of_input_and_gradient(gpu: torch.device) -> None:
    (x, w, b), stats, grad = norm_inputs((3, 4, 3, 2), torch.float64, gpu)
    x, grad = x.cpu(), grad.cpu()
    pairs = itertools.product(layouts(x).items(), layouts(grad).items())
    for (kind, value), (grad_kind, given) in pairs:
        if "contiguous" not in (kind, grad_kind) and kind != grad_kind:
            continue
        got, want = (
            run(
                norm_act(f.batch_norm_act, [t.clone() for t in stats], training=True),
                [value.to(gpu), w, b],
                given.to(gpu),
            )
            for f in (ops, reference)
        )
        for g, r in zip(got, want, strict=True):
            torch.testing.assert_close(g, r, msg=lambda m, k=kind, gk=grad_kind: f"{k}, gradient {gk}: {m}")


@pytest.mark.parametrize("shape", [(3, 4, 8, 4), (9, 8, 1, 1)], ids=str)
def test_memory_that_starts_between_packs(gpu: torch.device, shape: tuple[int, ...]) -> None:
    storage = torch.randn(500, device=gpu)
    size = torch.Size(shape).numel()
    x, grad = storage[3 : 3 + size].view(shape), storage[5 : 5 + size].view(shape)
    got, want = (
        run(lambda x, f=f: f.batch_norm_act(x, None, None, training=True), [x], grad) for f in (ops, reference)
    )
    torch.testing.assert_close(got, want)


def test_empty_batch(gpu: torch.device) -> None:
    x = torch.randn(0, 3, 4, 4, device=gpu, requires_grad=True)
    w = torch.ones(3, device=gpu, requires_grad=True)
    stats = torch.zeros(3, device=gpu), torch.ones(3, device=gpu)
    y = ops.batch_norm_act(x, *stats, w, training=False)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and not w.grad.any()
    assert ops.batch_norm_act(x, None, None, training=True).shape == x.shape


def sums_of(x: Tensor, parts: int) -> Tensor:
    """As a kernel that makes x would leave them."""
    rows = x.double().movedim(1, -1).flatten(0, -2)
    return torch.stack([torch.stack([part.sum(0), part.square().sum(0)]) for part in rows.tensor_split(parts)])


@pytest.mark.parametrize(
    ("dtype", "parts"), [(torch.float32, 1), (torch.float32, 2), (torch.float64, 2), (torch.float16, 45)], ids=str
)
def test_forward_from_given_sums(gpu: torch.device, dtype: torch.dtype, parts: int) -> None:
    for shape, memory_format in zip([(5, 3, 16, 8), (6, 40, 3, 5)], FORMATS, strict=True):
        (x, w, b), _, _ = norm_inputs(shape, dtype, gpu)
        x = x.contiguous(memory_format=memory_format)
        adapter = backends.select("batch_norm_act", x)
        want = reference.forward_train(x.double(), w, b, 1e-3, "tanh", 0.0)
        got = adapter.forward_train_from_sums(x, sums_of(x, parts), w, b, 1e-3, "tanh", 0.0)
        assert got[0].dtype == dtype and got[0].is_contiguous(memory_format=memory_format)
        tolerance = {torch.float16: 1e-3, torch.float32: 2e-5, torch.float64: 1e-11}[dtype]
        for g, exact in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), exact.double(), rtol=tolerance, atol=tolerance)


def test_statistics_alone(gpu: torch.device) -> None:
    for shape, memory_format in zip([(5, 3, 16, 8), (6, 40, 3, 5)], FORMATS, strict=True):
        x = torch.randn(shape, device=gpu, dtype=torch.float64).contiguous(memory_format=memory_format)
        got = backends.select("batch_norm_act", x).statistics(x, 1e-3)
        for g, want in zip(got, reference.statistics(x, 1e-3), strict=True):
            torch.testing.assert_close(g, want)


@pytest.mark.parametrize("name", ["conv_transpose2d_bn_act", "conv2d_bn_act"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_convolution_blocks(
    gpu: torch.device,
    name: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if cuts(dtype):
        pytest.skip("what the interpreter cuts off of the convolution's results, the normalisation scales up")
    for training, pixels in itertools.product((True, False), (1, 3)):
        tensors = [
            torch.randn(s, dtype=torch.float64, device=gpu) for s in ((3, 4, pixels, pixels), (4, 4, 3, 3), 4, 4)
        ]
        tensors[:2] = [t.contiguous(memory_format=memory_format) for t in tensors[:2]]
        stats = [torch.rand(4, device=gpu) + 0.5 for _ in range(2)]
        results = []
        for functions, kind in [(ops, dtype), (reference, dtype), (reference, torch.float64)]:
            wide = torch.float64 if kind == torch.float64 else torch.float32
            cast = [t.to(dtype).to(kind) if t.dim() > 1 else t.float().to(wide) for t in tensors]
            running = [t.to(wide, copy=True) for t in stats]

            def call(x: Tensor, w: Tensor, bn_w: Tensor, bn_b: Tensor, f: Any = functions, s: Any = running) -> Tensor:
                options: dict[str, Any] = {"training": training, "padding": pixels // 2}  # noqa: B023
                return getattr(f, name)(x, w, None, *s, bn_w, bn_b, **options, stride=2 - pixels // 2)  # noqa: B023

            if name == "conv2d_bn_act" and pixels == 1:
                cast[0] = cast[0].expand(-1, -1, 4, 4).contiguous(memory_format=memory_format)
            with torch.no_grad():
                output = call(*cast)
                [s.copy_(t) for s, t in zip(running, stats, strict=True)]
            if not results:
                grad = torch.randn_like(output)
            results.append([output, *run(call, cast, grad.to(output.dtype)), *running])
        for ours, stock, exact in zip(*results, strict=True):
            assert_as_accurate(ours, stock, exact, f"{training} {pixels}")
        if pixels > 1 and memory_format == torch.channels_last:
            assert results[0][0].is_contiguous(memory_format=memory_format)


def test_statistics_of_a_block_come_with_its_convolution(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def no_pass(*args: Any) -> None:
        raise AssertionError("the convolution's result is read for its statistics")

    monkeypatch.setattr(passes.Passes, "sums_of_values", no_pass)
    x, w = torch.randn(3, 4, 5, 5, device=gpu), torch.randn(4, 6, 4, 4, device=gpu)
    # Far from zero, with nothing known of it.
    bias = torch.full((6,), 1e4, device=gpu)
    x, w, bias = (t.requires_grad_() for t in (x, w, bias))
    stats = torch.zeros(6, device=gpu), torch.ones(6, device=gpu)
    wanted = [t.double() for t in stats]
    options: dict[str, Any] = {"training": True, "stride": 2, "padding": 1, "activation": "leaky_relu"}
    output = ops.conv_transpose2d_bn_act(x, w, bias, *stats, None, None, **options)
    wide = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    exact = reference.conv_transpose2d_bn_act(*wide, *wanted, None, None, **options)
    # float32 rounds what lies next to 1e4 to 1e-3.
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=1e-3)
    torch.testing.assert_close([t.double() for t in stats], wanted, rtol=1e-4, atol=0)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (x, w), grad)
    for got, want in zip(grads, torch.autograd.grad(exact, wide[:2], grad.double()), strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("norm", [reference, cpu])
def test_another_backend_normalises_what_a_kernel_has_convolved(
    gpu: torch.device, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a table that was measured may have it: statistics come with the convolution to whoever normalises."""
    if norm is cpu and gpu.type != "cpu":
        pytest.skip("the CPU's kernels take no tensors of the GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, w = torch.randn(3, 4, 5, 5, device=gpu), torch.randn(4, 6, 4, 4, device=gpu)
    weight, bias = torch.randn(6, device=gpu), torch.randn(6, device=gpu)
    inputs = [t.requires_grad_() for t in (x, w, weight, bias)]
    sides = []
    for function, kind in ((ops, torch.float32), (reference, torch.float64)):
        own = [t.detach().to(kind).requires_grad_() for t in inputs]
        stats = torch.zeros(6, device=gpu, dtype=kind), torch.ones(6, device=gpu, dtype=kind)
        with backends.wrapped("batch_norm_act", lambda adapter: norm):
            block = function.conv_transpose2d_bn_act
            output = block(*own[:2], None, *stats, *own[2:], training=True, stride=2, padding=1)
            sides.append([output, *stats, *torch.autograd.grad(output.square().sum(), own)])
    for got, want in zip(*sides, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_blocks_of_the_kernels_are_cut_to_fill_the_gpu() -> None:
    for n, c, hw, itemsize in [(64, 64, 1024, 4), (64, 3, 4096, 2), (1, 1, 1 << 24, 4), (64, 512, 16, 2)]:
        shape = passes.Shape(n, c, hw, 16 // itemsize)
        got = passes.cut(shape, itemsize, c, 256, 256)
        assert (got.parts - 1) * got.units < shape.units <= got.parts * got.units
        assert got.parts * c >= 132
    for n, c in [(65536, 64), (65536, 8), (1 << 20, 3), (1024, 512), (1, 7)]:
        shape = passes.Shape(n, c, 1, 4 if c % 4 == 0 else 1)
        got = passes.cut(shape, 4, -(-c // 16), 128, 512)
        assert (got.parts - 1) * got.units < n <= got.parts * got.units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["plain", "strided", "overlapping", "bfloat16"])
def test_running_statistics_are_updated_as_stocks(
    gpu: torch.device, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one kernel where they are plain vectors of the statistics' type, else by torch."""
    adapter = backends.select("batch_norm_act", torch.empty(1, device=gpu))
    update = getattr(adapter, "update_running", None)
    if update is None:
        pytest.skip("has no kernel for it")
    launched: list[Any] = []
    launch = _cuda.launch
    monkeypatch.setattr(_cuda, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k))
    c = 300
    mean, var = torch.randn(c, dtype=dtype, device=gpu), torch.rand(c, dtype=dtype, device=gpu) + 0.5
    storage = torch.randn(2 * c, dtype=torch.bfloat16 if kind == "bfloat16" else dtype, device=gpu)

    def views(storage: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "strided":
            return storage[::2], storage[1::2]
        return storage[:c], storage[1 : c + 1] if kind == "overlapping" else storage[c:]

    ours, want = storage.clone(), storage.clone()
    update(*views(ours), mean, var, 0.3, 1.25)
    reference.update_running(*views(want), mean, var, 0.3, 1.25)
    bar = torch.finfo(storage.dtype).eps
    torch.testing.assert_close(ours, want, rtol=4 * bar, atol=4 * bar)
    assert [k.name for k in launched] == ["batch_norm_update"] * (kind == "plain")
    assert not ours.equal(storage)


def test_a_training_step_makes_five_launches(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.requested() != "cuda":
        pytest.skip("counts the launches of C++ kernels")
    launched: list[str] = []
    launch = _cuda.launch
    monkeypatch.setattr(
        _cuda, "launch", lambda kernel, *a, **k: launched.append(kernel.name) or launch(kernel, *a, **k)
    )
    inputs, stats, grad = norm_inputs((4, 8, 3, 3), torch.float32, gpu)
    run(norm_act(ops.batch_norm_act, stats, training=True), inputs, grad)
    assert launched == [*cuda._NAMES[:2], "batch_norm_update", *cuda._NAMES[2:4]]
