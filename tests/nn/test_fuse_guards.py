"""Where something of torch's is replaced, watched or transformed, a fused sequential is stock's; the report says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
from gankern.compiler.fused import plans_of

f64 = torch.float64
CL = torch.channels_last


def net() -> nn.Sequential:
    """Two runs: convolution + batch norm + leaky ReLU, and convolution + tanh."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()
    )


def plain() -> nn.Sequential:
    """One row of convolutions with activations."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 3), nn.ReLU())


def pair(stock: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    return stock, gankern.fuse(copy.deepcopy(stock))


def step(model: nn.Module, x: Tensor, *, create_graph: bool = False) -> list[Tensor]:
    """Output, gradients of the input and all parameters, and the buffers."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=create_graph)
    if create_graph:
        grads = (*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    return [output.detach(), *(g.detach() for g in grads), *(b.clone() for b in model.buffers())]


def assert_same(stock: nn.Module, ours: nn.Module, x: Tensor, *, create_graph: bool = False, bar: float = 1e-9) -> None:
    want, got = (step(model, x, create_graph=create_graph) for model in (stock, ours))
    torch.testing.assert_close(got, want, rtol=bar, atol=bar)
    for a, b in zip(want, got, strict=True):
        assert layout(a) == layout(b)


def layout(tensor: Tensor) -> list[int]:
    """Strides that tell elements apart."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def reasons(model: nn.Module) -> dict[tuple[str, ...], str | None]:
    return {run.names: run.reason for run in gankern.fusion_report(model)}


# Code that is not torch's.


class Halved(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 0.5, bias)


class Loud(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def patch_conv_forward(model: nn.Sequential) -> None:
    conv = model[0]
    conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b)


def patch_forward(model: nn.Sequential) -> None:
    model[2].forward = lambda x: x * torch.sigmoid(x)


def patch_check(model: nn.Sequential) -> None:
    check = model[1]._check_input_dim
    model[1]._check_input_dim = lambda x: check(x.mul_(2))


def patch_weight(model: nn.Sequential) -> None:
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight * 2


def hook_on_weight(model: nn.Sequential) -> None:
    model[0].weight.register_hook(lambda grad: grad * 3)


def computed_weight(model: nn.Sequential) -> None:
    weight = model[0]._parameters.pop("weight")
    model[0]._parameters["weight"] = weight * 2
    model[0].register_parameter("raw", weight)


REPLACED: dict[str, Callable[[nn.Sequential], Any]] = {
    "_conv_forward": patch_conv_forward,
    "forward": patch_forward,
    "_check_input_dim": patch_check,
    "weight": patch_weight,
    "subclass": lambda m: m.__setitem__(0, Halved(3, 4, 3, padding=1, dtype=f64)),
    "batch norm": lambda m: m.__setitem__(1, Loud(4, dtype=f64)),
    "hook on a weight": hook_on_weight,
    "computed weight": computed_weight,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[0]),
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    "spectral_norm by hooks": lambda m: torch.nn.utils.spectral_norm(m[0]),
    "momentum": lambda m: setattr(m[1], "momentum", torch.tensor(0.3)),
    "padding": lambda m: setattr(m[0], "padding", "same"),
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", REPLACED)
def test_what_was_replaced_runs(name: str) -> None:
    change = REPLACED[name]
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64)
    assert_same(stock, ours, x)
    for model in (stock, ours):
        torch.manual_seed(3)
        change(model)
    assert_same(stock, ours, x)


def test_parameters_that_are_computed() -> None:
    stock, ours = pair(net().double())
    x, gain = torch.randn(2, 3, 6, 6, dtype=f64), torch.tensor(0.7, dtype=f64, requires_grad=True)
    grads = []
    for model in (stock, ours):
        weights = {name: p * gain for name, p in model.named_parameters()}
        output = torch.func.functional_call(model, weights, x)
        (grad,) = torch.autograd.grad(output.square().sum(), gain, create_graph=True)
        grads.append((output, grad, torch.autograd.grad(grad, gain)))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


PATCHES: list[tuple[Any, str, Any]] = [
    (nn.LeakyReLU, "forward", lambda self, x: F.elu(x)),
    (nn.Conv2d, "forward", lambda self, x: F.conv2d(x, self.weight * 2, self.bias, 1, 1)),
    (nn.Conv2d, "_conv_forward", lambda self, x, w, b: F.conv2d(x, w * 2, b, 1, 1)),
    (nn.BatchNorm2d, "forward", lambda self, x: x * 2),
    (nn.BatchNorm2d, "_check_input_dim", lambda self, x: x.mul_(2)),
    (nn.Module, "_call_impl", lambda self, *args: self.forward(*args) + 1),
    (nn.Module, "__call__", lambda self, *args: self.forward(*args) + 1),
    (nn.Sequential, "forward", lambda self, x: self[0](x)),
    (F, "leaky_relu", lambda x, *args: F.elu(x)),
    (F, "batch_norm", lambda x, *args: x * 2),
    (F, "conv2d", lambda x, w, *args: torch.conv2d(x, w * 2, *args)),
]


@pytest.mark.parametrize(("owner", "name", "function"), PATCHES, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_patched_in_torch_counts(owner: Any, name: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64)
    assert_same(stock, ours, x)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        torch.testing.assert_close(ours(x), stock(x))
    ours.load_state_dict(stock.state_dict())
    assert_same(stock, ours, x)


class Twice(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class Backwards(nn.Sequential):
    def __iter__(self) -> Any:
        return iter(list(self._modules.values())[::-1])


@pytest.mark.parametrize("kind", [Twice, Backwards])
def test_sequentials_that_call_otherwise(kind: Any) -> None:
    stock, ours = pair(kind(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()).double())
    assert_same(stock, ours, torch.randn(2, 3, 6, 6, dtype=f64))


# Hooks.

HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(o)),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(i[0])),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, i, o: seen.append(o[0])),
    "changes": lambda m, seen: m.register_forward_hook(lambda m, i, o: o * 1.5),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["", "0", "1", "2", "3", "4"])
def test_hooks_keep_their_meaning(kind: str, where: str) -> None:
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64)
    seen: tuple[list[Any], list[Any]] = [], []
    handles = [HOOKS[kind](m.get_submodule(where), s) for m, s in zip((stock, ours), seen, strict=True)]
    assert_same(stock, ours, x)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
        assert a.stride() == b.stride()
    if kind != "pre" or where:
        assert any(reason is not None for reason in reasons(ours).values())
    for handle in handles:
        handle.remove()
    assert_same(stock, ours, x)


@pytest.mark.parametrize(
    "register",
    [
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(register: Any) -> None:
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64).requires_grad_()
    seen: list[str] = []
    handle = register(lambda m, *args: seen.append(type(m).__name__))
    try:
        stock(x).sum().backward()
        want, seen[:] = seen[:], []
        ours(x).sum().backward()
        assert seen == want
        assert set(reasons(ours).values()) == {"a hook on all modules"}
    finally:
        handle.remove()
    assert_same(stock, ours, x)


# What torch does otherwise for a while.


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.leaky_relu else result


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_what_they_see_in_stock() -> None:
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64)
    with Doubled():
        assert_same(stock, ours, x)
    calls = []
    for model in (stock, ours):
        with Counted() as mode:
            model(x)
        calls.append(mode.calls)
    assert calls[1] == calls[0]
    with torch.device("cpu"):
        ours(x)
        assert set(reasons(ours).values()) == {None}


@pytest.mark.parametrize("pack", [lambda t: t, lambda t: t * 2 if t.is_floating_point() else t])
def test_hooks_for_saved_tensors(pack: Any) -> None:
    def hooks() -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or pack(t), lambda t: t)

    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64)
    shapes = []
    for model in (stock, ours):
        packed: list[Any] = []
        with hooks():
            model(x)
        shapes.append(packed)
    assert shapes[1] == shapes[0]
    with hooks():
        assert_same(stock, ours, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64).requires_grad_()
    results = []
    for model in (stock, ours):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    torch.testing.assert_close(results[1], results[0])


# Order of memory, and changes in place.


def one_channel() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.Tanh())


@pytest.mark.parametrize("make", [net, plain, one_channel])
@pytest.mark.parametrize("weights", [torch.contiguous_format, CL])
@pytest.mark.parametrize("images", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_layout_is_stock_s(make: Any, weights: torch.memory_format, images: str, dtype: torch.dtype) -> None:
    stock, ours = pair(make().to(dtype).to(memory_format=weights))
    x = torch.randn(2, 3, 6, 7, dtype=dtype)
    x = {
        "contiguous": lambda: x,
        "channels_last": lambda: x.contiguous(memory_format=CL),
        "transposed": lambda: x.transpose(2, 3),
        "sliced": lambda: x[..., :-1],
    }[images]()
    want, got = stock(x), ours(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert layout(got) == layout(want)
    assert not got._is_view()


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("change", [lambda h: h.mul_(2**0.5), lambda h: h.data.add_(1), lambda h: h.detach_()])
def test_output_is_changed_in_place(layout: torch.memory_format, change: Any) -> None:
    stock, ours = pair(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.2)))
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=layout)
    ours(x)
    assert plans_of(ours).made == 1
    grads = []
    for model in (stock, ours):
        h = model(x)
        y = h * 2
        change(h)
        ((h if h.requires_grad else y) + y).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("after", [nn.ReLU(True), nn.Dropout(0.5, inplace=True), nn.ELU(inplace=True)])
def test_a_module_changes_what_a_row_made(layout: torch.memory_format, after: nn.Module) -> None:
    stock, ours = pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), after, nn.Conv2d(4, 1, 4)))
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=layout)
    results = []
    for model in (stock, ours):
        torch.manual_seed(0)
        results.append(step(model, x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


# One module several times, frozen parts, empty and odd batches.


def repeated() -> nn.Sequential:
    conv, act, bn = nn.Conv2d(3, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.BatchNorm2d(3)
    return nn.Sequential(conv, act, conv, act, conv, bn, act, bn, conv, nn.Tanh())


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_a_module_several_times(create_graph: bool, dtype: torch.dtype) -> None:
    stock, ours = pair(repeated().to(dtype))
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    assert_same(stock, ours, x, create_graph=create_graph, bar=1e-9 if dtype == f64 else 2e-3)


@pytest.mark.parametrize("frozen", ["0", "1", "3", ""])
def test_frozen_parts(frozen: str) -> None:
    stock, ours = pair(net().double())
    x = torch.randn(2, 3, 6, 6, dtype=f64)
    for value in (False, True):
        for model in (stock, ours):
            model.get_submodule(frozen).requires_grad_(value)
        assert_same(stock, ours, x, create_graph=True)


BAD: dict[str, Callable[[], Tensor]] = {
    "channels": lambda: torch.randn(2, 5, 6, 6, dtype=f64),
    "type": lambda: torch.randn(2, 3, 6, 6),
    "dims": lambda: torch.randn(3, 6, dtype=f64),
    "integers": lambda: torch.ones(2, 3, 6, 6, dtype=torch.int64),
    "list": lambda: [1.0],  # type: ignore[dtype]
    "meta": lambda: torch.randn(2, 3, 6, 6, dtype=f64, device="meta"),
    "one value": lambda: torch.randn(1, 3, 1, 1, dtype=f64),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_stock_s(name: str) -> None:
    stock, ours = pair(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double())
    errors = []
    for model in (stock, ours):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            model(BAD[name]())
        errors.append((caught.type, str(caught.value)))
    assert errors[1] == errors[0]
    torch.testing.assert_close(list(ours.buffers()), list(stock.buffers()))


def test_unbatched_and_empty_images() -> None:
    stock, ours = pair(plain().double())
    for x in (torch.randn(3, 6, 6, dtype=f64), torch.randn(0, 3, 6, 6, dtype=f64)):
        assert_same(stock, ours, x)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("make", [net, plain, lambda: repeated()])
def test_gradients_can_be_viewed(make: Any, create_graph: bool) -> None:
    stock, ours = pair(make())
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    flat = []
    for model in (stock, ours):
        grads = torch.autograd.grad(model(x * 2).sum(), [x, *model.parameters()], create_graph=create_graph)
        flat.append([g.view(-1) for g in grads])
    torch.testing.assert_close(flat[1], flat[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2])
def test_inference_mode_and_no_grad(n: int) -> None:
    stock, ours = pair(net().double())
    x = torch.randn(n, 3, 6, 6, dtype=f64)
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            stock.train(training), ours.train(training)
            with mode():
                torch.testing.assert_close(ours(x), stock(x))
            torch.testing.assert_close(list(ours.buffers()), list(stock.buffers()))


def test_autocast() -> None:
    stock, ours = pair(net())
    x = torch.randn(3, 3, 6, 6)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            want, got = stock(x), ours(x)
        assert want.dtype == got.dtype
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)


class Swaps(nn.Module):
    """Replaces what follows it, while the sequential runs."""

    def __init__(self) -> None:
        super().__init__()
        self.into: list[nn.Sequential] = []

    def forward(self, x: Tensor) -> Tensor:
        self.into[0][1].register_forward_hook(lambda m, i, o: o * 3)
        self.into[0][3] = nn.Tanh()
        return x


def test_modules_that_change_what_follows() -> None:
    stock, ours = pair(nn.Sequential(Swaps(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double())
    for model in (stock, ours):
        model[0].into = [model]
    assert_same(stock, ours, torch.randn(2, 3, 6, 6, dtype=f64))
