"""A fused model that is traced, scripted, exported, compiled or transformed is the stock one, without gankern in it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gankern


def generator() -> nn.Sequential:
    return nn.Sequential(
        *(nn.ConvTranspose2d(5, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)),
        nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.3)),
        *(nn.Conv2d(6, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 1), nn.Tanh()),
    )


class Inside(nn.Module):
    """Its own forward calls a sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.main = generator()

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z) * 2


def noise() -> Tensor:
    return torch.randn(3, 5, 1, 1)


@pytest.fixture(params=[generator, Inside], ids=["sequential", "inside"])
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def models(request: pytest.FixtureRequest, make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    stock = make().train(request.param)
    return stock, gankern.fuse(copy.deepcopy(stock))


def same_text(stock: Any, ours: Any) -> None:
    """The same but for the numbers that jit gives to classes of one name, and for where the code lies."""
    got, want = (re.sub(r"___torch_mangle_\d+\.| # /.*", "", str(graph)) for graph in (ours, stock))
    assert got == want
    assert "gankern" not in got


def test_symbolic_trace(models: Any) -> None:
    same_text(*(torch.fx.symbolic_trace(m).code for m in models))


def test_script(models: Any) -> None:
    scripted = [torch.jit.script(m) for m in models]
    same_text(*(m.inlined_graph for m in scripted))
    z = noise()
    torch.testing.assert_close(scripted[1](z), scripted[0](z))


@pytest.mark.filterwarnings("ignore")
def test_trace(models: Any) -> None:
    z = noise()
    same_text(*(torch.jit.trace(m, z, check_trace=False).inlined_graph for m in models))


@pytest.mark.parametrize("strict", [False, True])
def test_export(models: Any, strict: bool) -> None:
    same_text(*(torch.export.export(m, (noise(),), strict=strict).graph for m in models))


def test_make_fx(models: Any) -> None:
    z = noise()
    same_text(*(make_fx(m)(z).code for m in models))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.skipif(not find_spec("onnx"), reason="needs onnx")
def test_onnx(models: Any, dynamo: bool, tmp_path: Path) -> None:
    import onnx

    if dynamo:
        pytest.importorskip("onnxscript")
    graphs = []
    for i, model in enumerate(models):
        torch.onnx.export(model.eval(), (noise(),), str(tmp_path / f"{i}.onnx"), dynamo=dynamo, verbose=False)
        nodes = onnx.load(str(tmp_path / f"{i}.onnx")).graph.node
        graphs.append([(node.op_type, node.name, list(node.input), list(node.output)) for node in nodes])
    assert graphs[1] == graphs[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(models: Any, backend: str) -> None:
    stock, ours = models
    torch.compiler.reset()  # torch 2.8 counts compilations of other tests' networks, too
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    z = noise()
    for _ in range(2):
        torch.testing.assert_close(compiled(z), stock(z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(ours.buffers()), list(stock.buffers()))


@pytest.mark.parametrize("first", ["fuse", "compile"])
def test_compile_before_and_after(make: Any, first: str) -> None:
    stock = make()
    ours = copy.deepcopy(stock)
    if first == "fuse":
        compiled = torch.compile(gankern.fuse(ours), fullgraph=True, backend="eager")
    else:
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        gankern.fuse(compiled)
    z = noise()
    for _ in range(2):
        torch.testing.assert_close(compiled(z), stock(z))
    torch.testing.assert_close(ours(z), stock(z), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_in_place_compile(models: Any) -> None:
    stock, ours = models
    for module in (ours, ours.main[3] if isinstance(ours, Inside) else ours[3]):
        module.compile(fullgraph=True, backend="eager")
    z = noise()
    torch.testing.assert_close(ours(z), stock(z), rtol=1e-4, atol=1e-5)


def test_meta_and_fake_tensors(models: Any) -> None:
    stock, ours = models
    want = stock(noise())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ours(mode.from_tensor(noise()))
    meta = ours.to("meta")(noise().to("meta"))
    for got in (fake, meta):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def assert_alike(function: Callable[[nn.Module], Any], models: Any) -> None:
    stock, ours = models
    torch.testing.assert_close(function(ours), function(stock), rtol=1e-3, atol=1e-4)


def test_functorch(make: Any) -> None:
    stock = make().eval()
    models = stock, gankern.fuse(copy.deepcopy(stock))
    z = noise()

    def loss(model: nn.Module, parameters: Any) -> Tensor:
        return torch.func.functional_call(model, parameters, (z,)).square().sum()

    assert_alike(lambda m: torch.func.grad(lambda p: loss(m, p))(dict(m.named_parameters())), models)
    assert_alike(lambda m: torch.func.vmap(m)(z[:, None]), models)
    assert_alike(lambda m: torch.func.jvp(m, (z,), (z,)), models)
    assert_alike(lambda m: torch.func.jacrev(lambda v: m(v).flatten(1).mean(1))(z), models)
    assert_alike(lambda m: torch.func.hessian(lambda v: m(v).sum())(z[:1]), models)


def test_ensemble(make: Any) -> None:
    models = [gankern.fuse(make().eval()) for _ in range(2)]
    z = noise()
    parameters, buffers = torch.func.stack_module_state(models)
    call = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (z,)))
    want = torch.stack([m(z) for m in models])
    torch.testing.assert_close(call(parameters, buffers), want, rtol=1e-4, atol=1e-5)


def test_forward_mode(models: Any) -> None:
    z = noise()

    def tangent(model: nn.Module) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(z, z)))

    assert_alike(tangent, models)


def test_unfused_needs_no_gankern(make: Any) -> None:
    model = gankern.fuse(make())
    model(noise())
    gankern.unfuse(model)
    for module in model.modules():
        assert not type(module).__module__.startswith("gankern")
        assert not any("gankern" in name for name in module.__dict__)
    assert b"gankern" not in pickle.dumps(model)
