"""What stock's functions do for people, the ops do: derivatives, changes in place, transforms, traces, odd values."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gankern
from gankern import ops
from gankern.ops.conv_act import conv2d_acts
from gankern.ops.conv_act import reference as conv_reference
from gankern.ops.conv_act.reference import ConvOptions, Layer
from gankern.ops.conv_transpose_bn_act import autograd as norm_autograd
from gankern.ops.conv_transpose_bn_act import reference as norm_reference
from gankern.ops.minibatch_discrimination import reference as pair_reference
from gankern.ops.minibatch_discrimination import small

Op = Callable[..., Tensor]
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "none")


def conv(activation: str) -> tuple[Op, Op]:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.conv2d_act(x, w, b, stride=2, padding=1, activation=activation)

    def stock(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv_reference.activate(F.conv2d(x, w, b, 2, 1), activation, 0.2)

    return ours, stock


def norm(training: bool, activation: str) -> tuple[Op, Op]:
    def call(module: Any) -> Op:
        def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            mean = torch.linspace(-1, 1, 4, dtype=x.dtype, device=x.device)
            given = (None, None) if training else (mean, mean.square() + 0.5)
            return module.batch_norm_act(x, *given, w, b, training=training, activation=activation)

        return run

    return call(ops), call(norm_reference)


def by_hand(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    """Stock's own third derivative of a batch's statistics takes them for constants (torch 2.13)."""
    return norm_reference.forward_train(x, w, b, 1e-5, activation, 0.2)[0]


def block(name: str, training: bool, activation: str) -> tuple[Op, Op]:
    def call(module: Any) -> Op:
        def run(x: Tensor, w: Tensor, b: Tensor, bn_w: Tensor, bn_b: Tensor) -> Tensor:
            mean = torch.linspace(-1, 1, bn_w.size(0), dtype=x.dtype, device=x.device)
            given = (None, None) if training else (mean, mean.square() + 0.5)
            options: dict[str, Any] = {"stride": 2, "padding": 1, "training": training, "activation": activation}
            return getattr(module, name)(x, w, b, *given, bn_w, bn_b, **options)

        return run

    return call(ops), call(norm_reference)


IMAGES, CHANNELS = (3, 4, 6, 6), (4,)
# Ours, stock's, the shapes of their arguments.
OPS: dict[str, tuple[Op, Op, list[tuple[int, ...]]]] = {
    **{f"conv2d_act {a}": (*conv(a), [IMAGES, (5, 4, 3, 3), (5,)]) for a in ACTIVATIONS},
    **{
        f"batch_norm_act {t} {a}": (*norm(t, a), [IMAGES, CHANNELS, CHANNELS])
        for t, a in [(True, "relu"), (True, "tanh"), (False, "leaky_relu"), (False, "none")]
    },
    "conv2d_bn_act": (*block("conv2d_bn_act", True, "leaky_relu"), [IMAGES, (5, 4, 3, 3), (5,), (5,), (5,)]),
    "conv2d_bn_act eval": (*block("conv2d_bn_act", False, "relu"), [IMAGES, (5, 4, 3, 3), (5,), (5,), (5,)]),
    "conv_transpose2d_bn_act": (
        *block("conv_transpose2d_bn_act", True, "relu"),
        [IMAGES, (4, 5, 3, 3), (5,), (5,), (5,)],
    ),
    "l1_distance": (ops.l1_distance, pair_reference.l1_distance, [(5, 3, 4)]),
    "minibatch_discrimination": (ops.minibatch_discrimination, pair_reference.minibatch_discrimination, [(5, 3, 4)]),
    "minibatch_stddev": (ops.minibatch_stddev, ops.minibatch_stddev, [(4, 4, 5, 5)]),
}
# In float32 the convolutions' kernels run, in float64 torch's.
DTYPES = (torch.float32, torch.float64)
TOLERANCES = {torch.float32: {"rtol": 1e-3, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


@pytest.fixture(params=[pytest.param((n, d), id=f"{n}-{d}") for n, d in itertools.product(OPS, DTYPES)])
def case(request: pytest.FixtureRequest) -> tuple[Op, Op, list[Tensor]]:
    name, dtype = request.param
    ours, stock, shapes = OPS[name]
    return ours, stock, [torch.randn(shape, dtype=dtype) for shape in shapes]


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in inputs]


def assert_same(got: Any, want: Any) -> None:
    """Trees of tensors of one dtype; None is zero."""
    got, want = (torch.utils._pytree.tree_leaves(found) for found in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        if w is None or g is None:
            assert all(t is None or not t.any() for t in (g, w))
        else:
            assert g.dtype == w.dtype
            torch.testing.assert_close(g, w, equal_nan=True, **TOLERANCES[w.dtype])


def derivatives(op: Op, inputs: list[Tensor], mix: Callable[..., list[Tensor]], orders: int) -> list[Tensor | None]:
    """Value and derivatives of an op whose arguments `mix` makes of the inputs."""
    given = leaves(inputs)
    output = op(*mix(*given))
    found: list[Tensor | None] = [output]
    total = output.tanh().sum()
    for order in range(1, orders + 1):
        grads = torch.autograd.grad(total, given, create_graph=order < orders, allow_unused=True)
        found += grads
        # Of numbers about 1.
        parts = [(g / (1 + g.detach().abs().max())).sin().sum() for g in grads if g is not None and g.requires_grad]
        if not parts:
            break
        total = torch.stack(parts).sum()
    return found


def both(case: tuple[Op, Op, list[Tensor]], mix: Callable[..., list[Tensor]], orders: int) -> None:
    ours, stock, inputs = case
    assert_same(derivatives(ours, inputs, mix, orders), derivatives(stock, inputs, mix, orders))


def test_derivatives(case: tuple[Op, Op, list[Tensor]]) -> None:
    both(case, lambda *given: list(given), 2)


def test_arguments_that_depend_on_each_other(case: tuple[Op, Op, list[Tensor]]) -> None:
    def mix(x: Tensor, *rest: Tensor) -> list[Tensor]:
        return [x, *(t * x.mean() + x.square().mean() for t in rest)]

    both(case, mix, 2)


@pytest.mark.parametrize("name", [n for n in OPS if "bn_act" not in n])
def test_third_derivatives(name: str) -> None:
    ours, stock, shapes = OPS[name]
    if name.startswith("batch_norm_act True"):
        stock = functools.partial(by_hand, activation=name.split()[-1])
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    both((ours, stock, inputs), lambda *given: list(given), 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_tensor_in_several_places(activation: str) -> None:
    for dtype in DTYPES:
        square, vector = torch.randn(4, 4, 3, 3, dtype=dtype), torch.randn(4, dtype=dtype)
        ours, stock = conv(activation)
        for mix in (lambda x, b: [x, x, b], lambda x, b: [x, x * b[:, None, None, None], x.mean((0, 2, 3))]):
            both((ours, stock, [square, vector]), mix, 2)
        for training in (True, False):
            ours, stock = norm(training, activation)
            both((ours, stock, [square, vector]), lambda x, b: [x, b, b], 2)


def test_a_module_that_stands_several_times() -> None:
    for dtype in DTYPES:
        inputs = [
            torch.randn(2, 4, 5, 5, dtype=dtype),
            torch.randn(4, 4, 3, 3, dtype=dtype) / 6,
            torch.randn(4).to(dtype),
        ]
        options = ConvOptions((1, 1), (1, 1), (1, 1), False, (0, 0), 1)

        def row(run: Any) -> Op:
            return lambda x, w, b: run(x, [Layer(w, b, options, "tanh", 0.0)] * 3)  # noqa: B023

        both((row(conv2d_acts), row(conv_reference.conv2d_acts), inputs), lambda *t: list(t), 3)
        layer = nn.Conv2d(4, 4, 3, padding=1).to(dtype)
        stock = nn.Sequential(*[layer, nn.LeakyReLU(0.2)] * 3)
        found = []
        for model in (gankern.fuse(nn.Sequential(*stock)), stock):
            loss = model(inputs[0]).square().mean()
            found.append(torch.autograd.grad(loss, list(layer.parameters()), create_graph=True))
        assert_same(*found)


def test_gradgradcheck_of_weights_that_depend_on_the_input() -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for activation in ("tanh", "leaky_relu"):
        assert torch.autograd.gradgradcheck(
            lambda x, w: ops.conv2d_act(x, w * x.mean(), x.mean((0, 2, 3)), activation=activation),  # noqa: B023
            (x, w),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_changes_in_place_after_a_call(activation: str, dtype: torch.dtype) -> None:
    """Also those that no version counter shows."""
    changes: list[Callable[[Tensor], Any]] = [lambda h: h.mul_(-2.0), lambda h: h.add_(1.0), lambda h: h.data.add_(3.0)]
    for change, name in itertools.product(changes, ("conv2d_act", "conv2d_bn_act")):
        found = []
        for module in (ops, norm_reference):
            torch.manual_seed(1)
            x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 3, 5, 5), (4, 3, 3, 3), (4,)))
            if name == "conv2d_bn_act":
                h = module.conv2d_bn_act(x, w, b, None, None, b, b, training=True, activation=activation)
            elif module is ops:
                h = ops.conv2d_act(x, w, b, activation=activation)
            else:
                h = conv_reference.activate(F.conv2d(x, w, b), activation, 0.2)
            change(h)
            try:
                found.append(torch.autograd.grad(h.square().sum(), (x, w, b)))
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                found.append(())
        # docs/guides/drop-in.md: what is not seen.
        told_by_input = activation == "relu" or (activation == "tanh" and dtype.itemsize < 4)
        if found[1] and not (change is changes[2] and name == "conv2d_bn_act" and told_by_input):
            assert_same(*found)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["conv2d_act", "conv2d_bn_act"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_come_to_hooks_on_the_output(activation: str, name: str, training: bool) -> None:
    for hook, power in itertools.product((lambda g: g * 1.7, lambda g: g + 0.1), (1, 2)):
        found = []
        for module in (ops, norm_reference):
            torch.manual_seed(1)
            x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5, 5), (4, 3, 3, 3), (4,)))
            if name == "conv2d_bn_act":
                stats = torch.zeros(4), torch.ones(4)
                h = module.conv2d_bn_act(x, w, None, *stats, b, b, training=training, activation=activation)
            elif module is ops:
                h = ops.conv2d_act(x, w, b, activation=activation)
            else:
                h = conv_reference.activate(F.conv2d(x, w, b), activation, 0.2)
            h.register_hook(hook)
            weight = torch.linspace(-1, 1, h.numel()).view_as(h)
            (grad,) = torch.autograd.grad((h.pow(power) * weight).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), (x, w, b), allow_unused=True))
        for got, want in zip(*found, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if got is None else got, zero if want is None else want, rtol=2e-3, atol=2e-3
            )


def test_leaky_relu_of_a_fused_network_may_be_changed() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3), nn.LeakyReLU(0.2))
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    found = []
    for model in (gankern.fuse(nn.Sequential(*stock)), stock):
        h = model(x)
        h *= -(2**0.5)
        found.append(torch.autograd.grad(h.square().sum(), list(stock.parameters())))
    assert_same(*found)


def test_parameters_changed_before_the_backward_pass(case: tuple[Op, Op, list[Tensor]]) -> None:
    """They raise where stock raises, and where it does not, gradients are its own."""
    ours, stock, inputs = case
    if inputs[0].dim() == 3:
        pytest.skip("has no parameters")
    for i in range(len(inputs)):
        found: list[Any] = []
        for op in (ours, stock):
            given = leaves(inputs)
            output = op(*given)
            with torch.no_grad():
                given[i].add_(0.5)
            try:
                found.append(torch.autograd.grad(output.square().sum(), given))
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                found.append(None)
        # Raised by both, or by none.
        if i == 0 or None in found:
            assert found[0] is None or found[1] is not None, i
            assert found[1] is None or found[0] is not None, i
        if found[1] is not None:
            assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_that_are_copied_raise_too(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 1, 1, dtype=dtype).clone(memory_format=torch.channels_last)
    w, bn_w = torch.randn(4, 5, 4, 4, dtype=dtype, requires_grad=True), torch.ones(5, dtype=dtype, requires_grad=True)
    for changed in (w, bn_w):
        output = ops.conv_transpose2d_bn_act(x, w, None, None, None, bn_w, None, training=True)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_requires_grad_switched_off_later() -> None:
    for create_graph in (False, True):
        found = []
        for op in conv("tanh"):
            torch.manual_seed(0)
            x, w, b = (torch.randn(s, requires_grad=True) for s in (IMAGES, (5, 4, 3, 3), (5,)))
            loss = op(x, w, b).square().sum()
            w.requires_grad_(False)
            found.append(torch.autograd.grad(loss, (x, b), create_graph=create_graph))
        assert_same(*found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_functorch(case: tuple[Op, Op, list[Tensor]]) -> None:
    ours, stock, inputs = case
    tangents = tuple(torch.randn_like(t) for t in inputs)
    places = tuple(range(len(inputs)))

    def everything(op: Op) -> list[Any]:
        def loss(*given: Tensor) -> Tensor:
            return op(*given).square().sum()

        def per_sample(x: Tensor, *rest: Tensor) -> Any:
            return torch.func.grad(
                lambda *r: op(x.repeat(2, *[1] * (x.dim() - 1)), *r).square().sum(), places[: len(rest)]
            )(*rest)

        many = tuple(t.expand(2, *t.shape).clone() for t in inputs)
        found = [
            torch.func.grad(loss, places)(*inputs),
            torch.func.vmap(op)(*many),
            torch.func.jvp(op, tuple(inputs), tangents),
            torch.func.jacrev(lambda *t: op(*t).sum(-1), places)(*inputs),
            torch.func.hessian(lambda x: loss(x, *inputs[1:]))(inputs[0]).sum(),
        ]
        if len(inputs) > 1:
            found.append(
                torch.func.vmap(per_sample, in_dims=(0, *[None] * (len(inputs) - 1)))(inputs[0][:, None], *inputs[1:])
            )
        return found

    assert_same(everything(ours), everything(stock))


def test_forward_mode_and_batched_gradients(case: tuple[Op, Op, list[Tensor]]) -> None:
    ours, stock, inputs = case
    tangents = [torch.randn_like(t) for t in inputs]

    def everything(op: Op) -> list[Any]:
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(op(*map(forward_ad.make_dual, inputs, tangents)))
            found: list[Any] = [dual.primal, dual.tangent]
        given = leaves(inputs)
        output = op(*given)
        many = torch.stack([torch.ones_like(output), output.detach()])
        for create_graph in (False, True):
            grads = torch.autograd.grad(
                output, given, many, is_grads_batched=True, create_graph=create_graph, retain_graph=True
            )
            found.append(grads)
        total = sum((g / (1 + g.detach().abs().max())).square().sum() for g in grads if g.requires_grad)
        return [*found, torch.autograd.grad(total, given, allow_unused=True) if isinstance(total, Tensor) else None]

    assert_same(everything(ours), everything(stock))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_and_exports_are_torchs(case: tuple[Op, Op, list[Tensor]]) -> None:
    ours, stock, inputs = case

    class Module(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return ours(*given)

    want = stock(*inputs)
    traced = torch.jit.trace(Module(), tuple(inputs), check_trace=False)
    assert not any("gankern" in node.kind() for node in traced.inlined_graph.nodes())
    assert_same(traced(*inputs), want)
    graph = make_fx(lambda *given: ours(*given))(*inputs)
    assert not any("gankern" in str(node.target) for node in graph.graph.nodes)
    assert_same(graph(*inputs), want)
    exported = torch.export.export(Module(), tuple(inputs))
    assert not any("gankern" in str(node.target) for node in exported.graph.nodes)
    assert_same(exported.module()(*inputs), want)


class Traced(nn.Module):
    """Of all ops, for torch.fx, which knows the number of arguments."""

    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = ops.batch_norm_act(ops.conv2d_act(x, w, b), None, None, b, b, training=True)
        y = ops.conv2d_bn_act(y, w[:, :1], None, None, None, b, b, training=True, groups=4)
        y = ops.conv_transpose2d_bn_act(y, w, b[:3], b[:3], b[:3].exp(), None, None, training=False)
        m = ops.minibatch_stddev(y).flatten(2)
        return ops.minibatch_discrimination(m) + ops.l1_distance(m).sum(0)


def test_symbolic_traces() -> None:
    inputs = torch.randn(2, 3, 7, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    graph = torch.fx.symbolic_trace(Traced())
    assert_same(graph(*inputs), Traced()(*inputs))
    assert "batch_norm_act" not in graph.code


def test_tensors_without_values(case: tuple[Op, Op, list[Tensor]]) -> None:
    ours, stock, inputs = case
    want = stock(*inputs)
    given = [t.to("meta").requires_grad_() for t in inputs]
    output = ours(*given)
    assert output.is_meta
    assert (output.shape, output.dtype) == (want.shape, want.dtype)
    grads = torch.autograd.grad(output.sum(), given, create_graph=True)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    with FakeTensorMode() as mode:
        output = ours(*(mode.from_tensor(t) for t in inputs))
    assert (output.shape, output.dtype) == (want.shape, want.dtype)


class Named(Tensor):
    """Somebody's subclass."""


def test_subclasses_stay_subclasses(case: tuple[Op, Op, list[Tensor]]) -> None:
    ours, stock, inputs = case
    output = ours(inputs[0].as_subclass(Named), *inputs[1:])
    assert type(output) is Named
    assert_same(output.as_subclass(Tensor), stock(*inputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_clipping_on_meta_and_in_inference_mode() -> None:
    gankern.clip_weights_(nn.Linear(3, 2, device="meta"), 0.1)
    with torch.inference_mode():
        weight = torch.randn(5)
        gankern.clip_weights_([weight], 0.1)
    assert weight.abs().max() <= 0.1
    many = torch.randn(3, 4)
    clipped = torch.func.vmap(lambda t: gankern.clip_weights_([t.clone()], torch.tensor(0.25))[0])(many)
    torch.testing.assert_close(clipped, many.clamp(-0.25, 0.25))


NON_FINITE = (math.inf, -math.inf, math.nan)


def special(tensor: Tensor) -> list[Tensor]:
    return [tensor.isnan(), tensor == math.inf, tensor == -math.inf]


@pytest.mark.kernel
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_pixel_that_is_not_finite_in_batch_norm(activation: str, memory_format: torch.memory_format) -> None:
    for value, dtype, channels in itertools.product(NON_FINITE, (*DTYPES, torch.bfloat16), (3, 20)):
        x = torch.randn(2, channels, 5, 5).to(dtype).contiguous(memory_format=memory_format)
        x[1, 2, 3, 3] = value
        for training in (False, True):
            found = []
            for module in (ops, norm_reference):
                leaf, w, b = (
                    x.clone().requires_grad_(),
                    *(torch.ones(channels).to(dtype).requires_grad_() for _ in "wb"),
                )
                stats = torch.zeros(channels).to(dtype), torch.ones(channels).to(dtype)
                output = module.batch_norm_act(leaf, *stats, w, b, training=training, activation=activation)
                found.append([output, *torch.autograd.grad(output.sum(), (leaf, w, b)), *stats])
            for got, want in zip(*found, strict=True):
                assert all(map(torch.equal, special(got), special(want))), (value, dtype, channels, training)


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(3, 1), (4, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("channels", [3, 32])
def test_values_that_are_not_finite_reach_what_they_reach_in_stock(channels: int, size: tuple[int, int]) -> None:
    kernel, stride = size
    options = ConvOptions((stride, stride), (1, 1), (1, 1), False, (0, 0), 1)
    for value, place in itertools.product((*NON_FINITE, 3e38), range(3)):
        x, w = torch.randn(8, channels, 24, 24), torch.randn(48, channels, kernel, kernel)
        grad = torch.randn_like(F.conv2d(x, w, None, stride, 1))
        for tensor in ((x,), (w,), (grad,))[place]:
            tensor[0, 1] = 1.0
            tensor[0, 1, 0, 1] = value
        ours = [
            gankern.ops.conv_act.cpu.conv(x, w, None, options, "tanh"),
            gankern.ops.conv_act.cpu.conv_input_grad(grad, w, x, options),
            gankern.ops.conv_act.cpu.conv_weight_grad(grad, x, w, options),
        ]
        stock = [
            F.conv2d(x, w, None, stride, 1).tanh(),
            conv_reference.conv_input_grad(grad, w, x, options),
            conv_reference.conv_weight_grad(grad, x, w, options),
        ]
        for got, want in zip(ours, stock, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite()), (value, place)
            near = want.isfinite() & (want.abs() < 1e30)
            torch.testing.assert_close(got[near], want[near], rtol=1e-3, atol=1e-3)


NUMBERS = [0.3, 2.0, -0.5, torch.tensor(0.3), torch.tensor(2, dtype=torch.int64), np.float32(0.25), 1, 0]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_that_stock_takes(value: Any) -> None:
    x, w, b = torch.randn(3, 4, 5, 5), torch.randn(4, 4, 3, 3), torch.randn(4)
    found = []
    for module in (ops, norm_reference):
        mean, var = torch.randn(4), torch.rand(4) + 0.5
        torch.manual_seed(0)
        mean, var = torch.randn(4), torch.rand(4) + 0.5
        options: dict[str, Any] = {"training": True, "activation": "leaky_relu"}
        y = module.batch_norm_act(x, mean, var, b, b, momentum=value, negative_slope=value, **options)
        z = module.conv2d_bn_act(x, w, b, mean, var, b, b, momentum=value, negative_slope=value, **options)
        found.append([y, z, mean, var])
    assert_same(*found)
    got = ops.conv2d_act(x, w, b, negative_slope=value)
    assert_same(got, F.leaky_relu(F.conv2d(x, w, b), value))


def test_slopes_that_are_not_finite() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    for slope in (math.inf, math.nan):
        assert_same(ops.conv2d_act(x, w, negative_slope=slope), F.leaky_relu(F.conv2d(x, w), slope))
        got = ops.batch_norm_act(x, None, None, training=True, activation="leaky_relu", negative_slope=slope)
        assert_same(got, F.leaky_relu(F.batch_norm(x, None, None, training=True), slope))


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words(padding: str) -> None:
    x, b = torch.randn(2, 3, 7, 6), torch.randn(4)
    for kernel, dilation in (((3, 3), 1), ((4, 2), (1, 3)), ((2, 3), 2)):
        w = torch.randn(4, 3, *kernel)
        want = F.leaky_relu(F.conv2d(x, w, b, padding=padding, dilation=dilation), 0.2)
        assert_same(ops.conv2d_act(x, w, b, padding=padding, dilation=dilation), want)
        given: dict[str, Any] = {"padding": padding, "dilation": dilation, "training": True}
        statistics = (None, None, None, None)
        assert_same(*(m.conv2d_bn_act(x, w, b, *statistics, **given) for m in (ops, norm_reference)))
    with pytest.raises(ValueError, match="padding must not be 'same' with a stride"):
        ops.conv2d_act(x, w, padding="same", stride=2)


@pytest.mark.parametrize("size", [(2,), [2, 1], np.int64(2), torch.tensor(2)], ids=repr)
def test_sizes_that_stock_takes(size: Any) -> None:
    x, w = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 2, 2)
    want = F.leaky_relu(F.conv2d(x, w, None, size, size, size), 0.2)
    assert_same(ops.conv2d_act(x, w, stride=size, padding=size, dilation=size), want)


def test_running_statistics_are_stocks_own() -> None:
    """What a call in training mode writes, a graph of one in evaluation mode reads, as in stock."""
    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        found = []
        for module in (ops, norm_reference):
            torch.manual_seed(0)
            x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in (IMAGES, (4,), (4,)))
            mean, var = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
            output = module.batch_norm_act(x, mean, var, w, b, training=False, activation=activation)
            module.batch_norm_act(x.detach() * 3 + 1, mean, var, training=True, momentum=0.7)
            assert mean._version == var._version == 0
            found.append([*torch.autograd.grad(output.square().sum(), (x, w, b)), mean, var])
        assert_same(*found)
    output = ops.batch_norm_act(x, mean, var, training=False)
    var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_odd_running_statistics() -> None:
    def each(change: Callable[..., Any]) -> list[Any]:
        found = []
        for module in (ops, norm_reference):
            torch.manual_seed(0)
            x, w = torch.randn(IMAGES), torch.ones(4)
            stats = [torch.zeros(4), torch.ones(4)]
            found.append(change(module.batch_norm_act, x, w, *stats))
        return found

    # Infinite before, of a batch that is infinite, empty, of another type, one for both, the weight itself.
    def infinite(op: Op, x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        mean[1] = math.inf
        x[0, 2] = math.inf
        op(x, mean, var, training=True)
        return [op(x, mean, var, training=True), mean, var]

    def empty(op: Op, x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        return [op(x[:0], mean, var, w.requires_grad_(), training=True), mean, var]

    def one(op: Op, x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        return [op(x, var, var, w, training=True), var]

    def weight(op: Op, x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        return [op(x, mean, w, w, training=True), mean, w]

    for change in (infinite, empty, one, weight):
        assert_same(*each(change))
    for op in (ops.batch_norm_act, norm_reference.batch_norm_act):
        mean = torch.zeros(4, requires_grad=True)
        with pytest.raises(RuntimeError, match="running_mean"):
            op(torch.randn(IMAGES), mean, torch.ones(4), training=False).sum().backward()
    for dtype in (torch.float64, torch.bfloat16):
        mean, var = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
        x = torch.randn(IMAGES)
        ops.batch_norm_act(x, mean, var, training=True, momentum=0.25)
        torch.testing.assert_close(mean, (x.mean((0, 2, 3)) * 0.25).to(dtype))
        torch.testing.assert_close(var, (x.var((0, 2, 3)) * 0.25 + 0.75).to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sums_that_a_backend_has_no_use_for(backend: str) -> None:
    x = torch.randn(IMAGES)
    sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])[None].double()
    with gankern.backend(backend):
        got = norm_autograd._train_from_sums_op(x, sums, None, None, 1e-5, "relu", 0.0)
        torch.testing.assert_close(got, norm_autograd._train_op(x, None, None, 1e-5, "relu", 0.0))


@pytest.mark.by_size
def test_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    m = torch.randn(5, 3, 4, dtype=torch.float64)
    assert small.is_small(m)
    for name in ("l1_distance", "minibatch_discrimination"):
        given = OPS[name][0], OPS[name][1], [m]
        both(given, lambda m: [m], 3)
        test_functorch(given)
        test_forward_mode_and_batched_gradients(given)


def test_autocast_in_the_backward_pass_does_not_cast() -> None:
    x, w, b = torch.randn(IMAGES), torch.randn(5, 4, 3, 3), torch.randn(5)
    found = []
    for op in conv("tanh"):
        given = leaves([x, w, b])
        output = op(*given)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(output.square().sum(), given, create_graph=True))
    assert_same(*found)


def test_what_a_call_keeps_for_its_backward_pass() -> None:
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 8, 16, 16), (16, 8, 3, 3), (16,)))
    given = {t.data_ptr() for t in (x, w)}
    for activation, most in {"none": 0, "leaky_relu": 1, "relu": 4, "tanh": 4}.items():
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = ops.conv2d_act(x, w, b, padding=1, activation=activation)
        bytes_kept = sum(t.nbytes for t in kept if t.data_ptr() not in given)
        assert bytes_kept == most * output.numel() + b.nbytes


@pytest.mark.parametrize("groups", [1, 3])
def test_output_padding_and_sizes_that_stock_takes(groups: int) -> None:
    w = torch.randn(6, 5, 1, 3)
    for shape, options in (
        ((1, 6, 1, 11), {"output_padding": 1, "dilation": 2}),
        ((2, 6, 1, 1), {"padding": (1, 0)}),
        ((0, 6, 4, 4), {"output_padding": 1}),
    ):
        for training, grad in itertools.product((True, False), (True, False)):
            found = []
            for module in (ops, norm_reference):
                torch.manual_seed(0)
                x, ones = torch.randn(shape), torch.ones(5 * groups)
                stats = torch.zeros_like(ones), torch.ones_like(ones)
                with torch.set_grad_enabled(grad):
                    weight = w.clone().requires_grad_()
                    given: dict[str, Any] = {"groups": groups, "training": training, **options}
                    try:
                        output = module.conv_transpose2d_bn_act(x, weight, None, *stats, ones, ones, **given)
                    except (RuntimeError, ValueError) as error:
                        found.append(type(error))
                        continue
                found.append([output, *stats])
            if isinstance(found[1], list):
                assert_same(*found)
            else:
                assert found[0] is ValueError
