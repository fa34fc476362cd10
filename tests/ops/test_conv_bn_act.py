from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, layouts, run
from torch import Tensor

from gankern import ops
from gankern.ops.conv_transpose_bn_act import reference

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "none")
SHAPES = [(3, 5, 7, 3), (4, 20, 6, 6), (2, 64, 33), (5, 7), (8, 40, 1, 1), (2, 3, 70, 80), (1, 17, 4, 4), (2, 3, 1, 3)]


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Input, weight and bias; running mean and variance; all in values that the dtype holds."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    vectors = [torch.randn(shape[1], dtype=torch.float64).to(wide) for _ in range(4)]
    return [x, *vectors[:2]], [vectors[2], vectors[3].abs() + 0.5]


def norm_act(function: Callable[..., Tensor], stats: list[Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: function(x, *stats, w, b, **options)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_act_is_as_accurate_as_stock(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    formats = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for activation, training, memory_format in itertools.product(ACTIVATIONS, (True, False), formats):
        inputs, stats = norm_inputs(shape, dtype)
        inputs[0] = inputs[0].contiguous(memory_format=memory_format)
        grad = torch.randn(shape, dtype=torch.float64).to(dtype)
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
            assert_as_accurate(ours, stock, exact, f"{name} {activation} {training} {memory_format}")
        assert results[0][0].is_contiguous(memory_format=memory_format)


@pytest.mark.kernel
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [4, 32])
def test_statistics_survive_a_large_mean(memory_format: torch.memory_format, channels: int) -> None:
    x = (torch.randn(16, channels, 9, 9, dtype=torch.float64) + 1e4).float().contiguous(memory_format=memory_format)
    mean, var = torch.zeros(channels), torch.zeros(channels)
    ops.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.kernel
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_larger_than_the_caches(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    inputs, stats = norm_inputs((17, 16, 128, 128), dtype)
    inputs[0] = inputs[0].contiguous(memory_format=memory_format)
    grad = torch.randn_like(inputs[0])
    # Four images at a time fit, and are written by other stores.
    whole = run(norm_act(ops.batch_norm_act, stats, training=False), inputs, grad)[:2]
    parts = [
        run(norm_act(ops.batch_norm_act, stats, training=False), [x, *inputs[1:]], g)[:2]
        for x, g in zip(inputs[0].split(4), grad.split(4), strict=True)
    ]
    for got, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(got, torch.cat(pieces))
    results = []
    for op, kind in [(ops, dtype), (reference, dtype), (reference, torch.float64)]:
        running = [t.to(torch.float64 if kind == torch.float64 else t.dtype) for t in stats]
        function = norm_act(op.batch_norm_act, running, training=True, momentum=0.0)
        cast = [t.to(torch.float64 if kind == torch.float64 else t.dtype) for t in inputs]
        results.append(run(function, cast, grad.to(kind))[:2])
    for ours, stock, exact in zip(*results, strict=True):
        assert_as_accurate(ours, stock, exact)


@pytest.mark.kernel
def test_special_values_are_stocks() -> None:
    for activation in ("relu", "leaky_relu", "tanh"):
        x = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, 30.0, -30.0, 0.3, -0.3]]).t()
        stats = torch.zeros(1), torch.ones(1)
        want = reference.batch_norm_act(x, *stats, training=False, activation=activation, eps=0.0)
        got = ops.batch_norm_act(x, *stats, training=False, activation=activation, eps=0.0)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=3e-7, atol=0)


@pytest.mark.kernel
def test_results_do_not_depend_on_run_or_threads() -> None:
    def everything() -> list[Tensor]:
        found = []
        for shape, memory_format in itertools.product(
            [(9, 5, 11, 13), (9, 33, 11, 13)], [torch.contiguous_format, torch.channels_last]
        ):
            torch.manual_seed(1)
            inputs, stats = norm_inputs(shape, torch.float32)
            inputs[0] = inputs[0].contiguous(memory_format=memory_format)
            found += run(norm_act(ops.batch_norm_act, stats, training=True), inputs, torch.randn(shape)) + stats
        return found

    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        runs.append(everything())
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_act_derivatives(activation: str, training: bool) -> None:
    inputs, stats = norm_inputs((3, 2, 2, 3), torch.float64)
    inputs = [t.requires_grad_() for t in inputs]
    function = norm_act(ops.batch_norm_act, stats, training=training, momentum=0.0, activation=activation)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_without_affine_parameters_or_running_statistics() -> None:
    x, grad = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    for training in (True, False):
        got = run(lambda x: ops.batch_norm_act(x, None, None, training=training), [x], grad)  # noqa: B023
        want = run(lambda x: reference.batch_norm_act(x, None, None, training=True), [x], grad)
        torch.testing.assert_close(got, want)


def conv_inputs(transposed: bool, dtype: torch.dtype, groups: int = 2, bias: bool = True) -> list[Tensor]:
    channels_in, channels_out = 4, 6
    form = (channels_in, channels_out // groups) if transposed else (channels_out, channels_in // groups)
    tensors = [
        torch.randn(3, channels_in, 5, 4, dtype=torch.float64),
        torch.randn(*form, 3, 2, dtype=torch.float64) / 3,
        torch.randn(channels_out, dtype=torch.float64) if bias else None,
        torch.randn(channels_out, dtype=torch.float64),
        torch.rand(channels_out, dtype=torch.float64) + 0.5,
        torch.randn(channels_out, dtype=torch.float64),
        torch.randn(channels_out, dtype=torch.float64),
    ]
    return [t if t is None else t.to(dtype) for t in tensors]


CONV_OPTIONS: list[dict[str, Any]] = [
    {"stride": 1, "padding": 0},
    {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2), "activation": "leaky_relu", "negative_slope": 0.1},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", CONV_OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolution_blocks_match_the_reference(
    training: bool, options: dict[str, Any], bias: bool, transposed: bool, channels_last: bool
) -> None:
    name = "conv_transpose2d_bn_act" if transposed else "conv2d_bn_act"
    options = {**options, "groups": 2, "training": training}
    if transposed and options["stride"] != 1:
        options["output_padding"] = (1, 2)
    results = []
    for function in (getattr(ops, name), getattr(reference, name)):
        torch.manual_seed(0)
        x, w, b, mean, var, bn_w, bn_b = conv_inputs(transposed, torch.float64, bias=bias)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        tensors = [t for t in (x, w, b, bn_w, bn_b) if t is not None]

        def call(*given: Tensor, function=function, mean=mean, var=var) -> Tensor:
            x, w, *rest = given
            b = rest[0] if bias else None
            return function(x, w, b, mean, var, *rest[-2:], **options)

        with torch.no_grad():
            mean_before, var_before = mean.clone(), var.clone()
            inference = call(*tensors)
            mean.copy_(mean_before), var.copy_(var_before)
        results.append([inference, *run(call, tensors, torch.ones_like(inference).expand_as(inference)), mean, var])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        # A weight's gradient lies as the weight does, of which people take views.
        assert got.stride() in (want.stride(), w.stride()) or not channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_convolution_blocks_are_as_accurate_as_stock(dtype: torch.dtype, training: bool) -> None:
    for transposed, no_grad in itertools.product((True, False), (True, False)):
        name = "conv_transpose2d_bn_act" if transposed else "conv2d_bn_act"
        results = []
        for function, kind in [
            (getattr(ops, name), dtype),
            (getattr(reference, name), dtype),
            (getattr(reference, name), torch.float64),
        ]:
            torch.manual_seed(0)
            tensors = [t.to(kind) for t in conv_inputs(transposed, dtype, groups=1)]
            with torch.set_grad_enabled(not no_grad):
                results.append(function(*tensors, training=training))
        assert_as_accurate(*results, what=name)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_convolution_block_derivatives(transposed: bool, training: bool) -> None:
    x, w, b, mean, var, bn_w, bn_b = conv_inputs(transposed, torch.float64)
    function = ops.conv_transpose2d_bn_act if transposed else ops.conv2d_bn_act

    def call(x: Tensor, w: Tensor, b: Tensor, bn_w: Tensor, bn_b: Tensor) -> Tensor:
        options: dict[str, Any] = {"groups": 2, "training": training, "momentum": 0.0, "activation": "tanh"}
        return function(x, w, b, mean, var, bn_w, bn_b, **options)

    leaves = [t[:2, ..., :3, :3].clone() if t is x else t for t in (x, w, b, bn_w, bn_b)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_every_layout_of_input_and_gradient() -> None:
    (x, w, b), stats = norm_inputs((4, 6, 5, 3), torch.float64)
    grads = layouts(torch.randn(4, 6, 5, 3, dtype=torch.float64))
    for (kind, value), (grad_kind, grad) in itertools.product(layouts(x).items(), grads.items()):
        got, want = (
            run(norm_act(function, [t.clone() for t in stats], training=True), [value, w, b], grad)
            for function in (ops.batch_norm_act, reference.batch_norm_act)
        )
        for g, r in zip(got, want, strict=True):
            torch.testing.assert_close(g, r, msg=lambda m, k=kind, gk=grad_kind: f"{k}, gradient {gk}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_images_of_one_pixel(training: bool, memory_format: torch.memory_format, dilation: int) -> None:
    _, w, b, mean, var, bn_w, bn_b = conv_inputs(True, torch.float64, groups=1)
    x = torch.randn(5, 4, 1, 1, dtype=torch.float64).clone(memory_format=memory_format)
    options: dict[str, Any] = {"training": training, "momentum": 0.0, "stride": 2, "dilation": dilation}
    results = []
    for function in (ops.conv_transpose2d_bn_act, reference.conv_transpose2d_bn_act):

        def call(x: Tensor, w: Tensor, b: Tensor, function: Any = function) -> Tensor:
            return function(x, w, b, mean, var, bn_w, bn_b, **options)

        with torch.no_grad():
            output = call(x, w, b)
        assert output.is_contiguous(memory_format=memory_format)
        results.append([output, *run(call, [x, w, b], torch.ones_like(output))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-8)


def test_empty_batch() -> None:
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    stats = torch.zeros(3), torch.ones(3)
    y = ops.batch_norm_act(x, *stats, training=False)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    w = torch.randn(3, 5, 4, 4)
    assert (
        ops.conv_transpose2d_bn_act(x, w, None, torch.zeros(5), torch.ones(5), None, None, training=False).shape[0] == 0
    )


@pytest.mark.parametrize("name", ["train", "eval", "backward"])
def test_opcheck(name: str) -> None:
    x, stat = torch.randn(3, 4, 5, 2), torch.rand(4) + 0.5
    args = {
        "train": (x, stat, stat, 1e-5, "relu", 0.2),
        "eval": (x, stat, None, stat, stat, "tanh", 0.2),
        "backward": (x, x, stat, stat, stat, stat, True, "leaky_relu", 0.2),
    }[name]
    op = getattr(torch.ops.gankern, f"batch_norm_act_{name}").default
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = [
            a.contiguous(memory_format=memory_format) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args
        ]
        torch.library.opcheck(op, tuple(given))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training: bool) -> None:
    x, w, b, *norm = conv_inputs(True, torch.float32)

    def block(x: Tensor, w: Tensor, b: Tensor, bn_w: Tensor, bn_b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = ops.conv_transpose2d_bn_act(x, w, b, mean, var, bn_w, bn_b, groups=2, training=training)
        return ops.batch_norm_act(y, None, None, training=True, activation="tanh")

    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        stats = [t.clone() for t in norm[:2]]
        leaves = [t.clone().requires_grad_() for t in (x, w, b, *norm[2:])]
        y = function(*leaves, *stats)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves), *stats])
    torch.testing.assert_close(results[1], results[0])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 35), st.integers(1, 9), st.integers(1, 9)),
    activation=st.sampled_from(ACTIVATIONS),
    training=st.booleans(),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "channels_last"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_layout_and_dtype(
    shape: tuple[int, ...], activation: str, training: bool, layout: str, dtype: torch.dtype
) -> None:
    (x, w, b), stats = norm_inputs(shape, dtype)
    if training and x.numel() == x.size(1):
        training = False
    x = layouts(x)[layout]
    grad = torch.randn(shape).to(dtype)
    options: dict[str, Any] = {"training": training, "activation": activation, "eps": 0.1}
    results = []
    for function, kind in [
        (ops.batch_norm_act, None),
        (reference.batch_norm_act, None),
        (reference.batch_norm_act, torch.float64),
    ]:
        # Stock's own backward goes wrong for some strides of a single image (torch 2.13): its oracle is contiguous.
        given = x if function is ops.batch_norm_act else x.contiguous()
        cast = [t.to(kind or t.dtype) for t in (given, w, b)]
        running = [t.to(kind or t.dtype, copy=True) for t in stats]
        results.append(run(norm_act(function, running, **options), cast, grad.to(kind or dtype)))
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 3e-2}[dtype]
    for ours, _stock, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm() + tolerance


def block_call(**changed: Any) -> Callable[[], Tensor]:
    function = changed.pop("function", ops.conv_transpose2d_bn_act)
    x, w, b, mean, var, bn_w, bn_b = conv_inputs(function is ops.conv_transpose2d_bn_act, torch.float32, groups=1)
    arguments: dict[str, Any] = {
        "input": x,
        "weight": w,
        "bias": b,
        "running_mean": mean,
        "running_var": var,
        "bn_weight": bn_w,
        "bn_bias": bn_b,
        "training": True,
    }
    return lambda: function(**{**arguments, **changed})


BAD: list[tuple[str, Any, type[Exception]]] = [
    ("input", None, TypeError),
    ("input", torch.ones(3, 4, 5), ValueError),
    ("input", torch.ones(3, 4, 5, 4, dtype=torch.int64), TypeError),
    ("input", torch.ones(3, 4, 5, 4).to_sparse(), TypeError),
    ("input", torch.ones(3, 4, 0, 0), ValueError),
    ("weight", torch.ones(7, 7, 3, 2), ValueError),
    ("weight", torch.ones(4, 4, 3, 2, dtype=torch.float64), TypeError),
    ("bias", torch.ones(5), ValueError),
    ("running_mean", torch.ones(5), ValueError),
    ("running_mean", None, ValueError),
    ("running_var", torch.ones(6, dtype=torch.int64), TypeError),
    ("bn_weight", torch.ones(6, 1), ValueError),
    ("bn_bias", 3, TypeError),
    ("bn_bias", torch.ones(6, device="meta"), ValueError),
    ("stride", 0, ValueError),
    ("stride", 1.5, TypeError),
    ("padding", -1, ValueError),
    ("dilation", (1, 2, 3), TypeError),
    ("groups", 3, ValueError),
    ("groups", True, TypeError),
    ("training", 1, TypeError),
    ("momentum", torch.ones(1), TypeError),
    ("momentum", None, TypeError),
    ("eps", -1.0, ValueError),
    ("activation", "gelu", ValueError),
    ("negative_slope", "steep", TypeError),
]


@pytest.mark.parametrize("function", [ops.conv_transpose2d_bn_act, ops.conv2d_bn_act], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=lambda v: str(v)[:20])
def test_bad_input_of_the_blocks(function: Any, name: str, value: Any, error: type[Exception]) -> None:
    # A wrong number of groups shows as a weight that does not fit.
    with pytest.raises(error, match="weight" if (name, value) == ("groups", 3) else name):
        block_call(function=function, **{name: value})()


def test_bad_output_padding() -> None:
    for value, error in [(2, ValueError), (-1, ValueError), ("1", TypeError)]:
        with pytest.raises(error, match="output_padding"):
            block_call(output_padding=value)()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("input", torch.ones(3), ValueError),
        ("input", torch.ones(1, 4), ValueError),
        ("input", "x", TypeError),
        ("running_mean", torch.ones(3), ValueError),
        ("running_var", None, ValueError),
        ("weight", torch.ones(3), ValueError),
        ("bias", torch.ones(3), ValueError),
        ("training", None, TypeError),
        ("momentum", "0.1", TypeError),
        ("eps", "small", TypeError),
        ("activation", None, ValueError),
        ("negative_slope", None, TypeError),
    ],
    ids=lambda v: str(v)[:20],
)
def test_bad_input_of_batch_norm_act(name: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "input": torch.randn(3, 4),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "weight": torch.ones(4),
        "bias": torch.ones(4),
        "training": True,
    }
    with pytest.raises(error, match=name):
        ops.batch_norm_act(**{**arguments, name: value})
