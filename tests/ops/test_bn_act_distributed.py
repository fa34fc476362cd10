"""Batch norm + activation over two gloo processes against one process on the joint batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gankern
from gankern import ops
from gankern.ops.conv_transpose_bn_act import reference

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

WORLD = 2
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.bfloat16: {"rtol": 2e-2, "atol": 4e-2},
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def case(op: str, **options: Any) -> dict[str, Any]:
    defaults = {"op": op, "dtype": torch.float64, "format": "contiguous", "activation": "relu", "sizes": (5, 2)}
    return defaults | {"channels": 6, "pixels": (4, 3), "mean": 3.0} | options


CASES: dict[str, dict[str, Any]] = {
    f"{dtype} {layout} {activation}": case("batch_norm_act", dtype=dtype, format=layout, activation=activation)
    for dtype, layout, activation in itertools.product(
        (torch.float32, torch.float64), FORMATS, ("relu", "leaky_relu", "tanh", "none")
    )
}
CASES |= {
    "bfloat16": case("batch_norm_act", dtype=torch.bfloat16, activation="leaky_relu"),
    "equal sizes": case("batch_norm_act", sizes=(3, 3)),
    "one value on a rank": case("batch_norm_act", sizes=(4, 1), pixels=()),
    "one value on each rank": case("batch_norm_act", sizes=(1, 1), pixels=()),
    "an empty rank": case("batch_norm_act", sizes=(4, 0)),
    "an empty rank, channels_last": case("batch_norm_act", sizes=(0, 4), format="channels_last"),
    "many channels": case("batch_norm_act", channels=40, dtype=torch.float32),
    "a large mean": case("batch_norm_act", mean=1e7, apart=10.0),
    "ranks far apart": case("batch_norm_act", apart=1e3),
    "no affine": case("batch_norm_act", affine=False),
    "no running statistics": case("batch_norm_act", running=False),
    "eval": case("batch_norm_act", training=False),
    "one pixel": case("batch_norm_act", pixels=(1, 1), format="channels_last"),
    "three dimensions": case("batch_norm_act", pixels=(2, 3, 2)),
    "reference": case("batch_norm_act", backend="reference"),
    "conv_transpose2d": case("conv_transpose2d_bn_act", activation="leaky_relu"),
    "conv_transpose2d float32": case("conv_transpose2d_bn_act", dtype=torch.float32, format="channels_last"),
    "conv2d": case("conv2d_bn_act", activation="tanh"),
    "conv2d, an empty rank": case("conv2d_bn_act", sizes=(3, 0)),
    "second order": case("batch_norm_act", activation="tanh", second=True),
    "second order, a large mean": case("batch_norm_act", activation="leaky_relu", second=True, mean=1e5),
    "second order, an empty rank": case("batch_norm_act", activation="tanh", second=True, sizes=(4, 0)),
    "second order of a convolution": case("conv_transpose2d_bn_act", activation="tanh", second=True),
}


def make(c: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Input, output gradient and direction of the joint batch; parameters; running statistics."""
    torch.manual_seed(0)
    dtype, wide = c["dtype"], torch.float64 if c["dtype"] == torch.float64 else torch.float32
    shape = (sum(c["sizes"]), c["channels"], *c["pixels"])
    x = torch.randn(shape, dtype=torch.float64) * 2 + c["mean"]
    x[: c["sizes"][0]] += c.get("apart", 0.0)
    parameters = [torch.randn(c["channels"], dtype=wide) for _ in range(2)] if c.get("affine", True) else []
    stats = [torch.randn(c["channels"], dtype=wide), torch.rand(c["channels"], dtype=wide) + 0.5]
    if c["op"] != "batch_norm_act":
        parameters.insert(0, torch.randn(c["channels"], c["channels"], 3, 3, dtype=dtype) / 5)
    grad, direction = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    return [t.to(dtype) for t in (x, grad, direction)], parameters, stats if c.get("running", True) else []


def call(
    functions: Any, c: dict[str, Any], x: Tensor, parameters: list[Tensor], stats: list[Tensor], **group: Any
) -> Tensor:
    running = stats or [None, None]
    options: dict[str, Any] = {"training": c.get("training", True), "activation": c["activation"], "momentum": 0.3}
    options |= {"eps": 1e-3} | group
    function: Callable[..., Tensor] = getattr(functions, c["op"])
    if c["op"] == "batch_norm_act":
        return function(x, *running, *parameters, **options)
    return function(x, parameters[0], None, *running, *parameters[1:], padding=1, **options)


def results(functions: Any, c: dict[str, Any], part: slice, **group: Any) -> dict[str, list[Tensor]]:
    """What a rank finds, by how the ranks' results make up the joint one."""
    images, parameters, stats = make(c)
    x, grad, direction = (t[part] for t in images)
    if x.dim() == 4:
        x = x.contiguous(memory_format=FORMATS[c["format"]])
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    output = call(functions, c, x, parameters, stats, **group)
    grads = torch.autograd.grad(output, leaves, grad, create_graph=c.get("second", False))
    found = {"joined": [output, grads[0]], "summed": list(grads[1:]), "equal": stats}
    if c.get("second"):
        # What a gradient penalty does: the gradients of a function of the input's gradient.
        value = (grads[0] * direction).sum() + grads[0].square().sum()
        second = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        found["joined"].append(second[0])
        found["summed"] += second[1:]
    return {kind: [t.detach() for t in tensors] for kind, tensors in found.items()}


def rank_part(c: dict[str, Any], rank: int) -> slice:
    begin = sum(c["sizes"][:rank])
    return slice(begin, begin + c["sizes"][rank])


def model(norm: type[nn.Module], momentum: float | None = 0.1, **options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [
        nn.ConvTranspose2d(5, 8, 4, 2, 1),
        norm(8, momentum=momentum, **options),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
        norm(3, momentum=momentum, **options),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers).double()


class ByHand(nn.Module):
    """A fused model whose gradients are added up over the ranks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = gankern.fuse(net)
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


MOMENTA = (0.1, None)
SIZES = (4, 2)


def train(net: nn.Module, part: slice) -> list[Tensor]:
    """Two steps on the sum over the images: parameters, running statistics, and the output in eval mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    torch.manual_seed(2)
    for _ in range(2):
        x, target = torch.randn(6, 5, 4, 4).double(), torch.randn(6, 3, 16, 16).double()
        optimizer.zero_grad()
        loss = (net(x[part]) - target[part]).square().sum()
        # DistributedDataParallel averages the ranks' gradients.
        (loss * WORLD if isinstance(net, DistributedDataParallel) else loss).backward()
        optimizer.step()
    tensors = [t.detach().clone() for t in net.state_dict().values()]
    net.eval()
    with torch.no_grad():
        return [*tensors, net(x)]


def failure(run: Callable[[], Any]) -> str:
    try:
        run()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def worker(rank: int, store: str, shared: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    world, alone = dist.group.WORLD, [dist.new_group([r]) for r in range(WORLD)][rank]
    answers: dict[str, Any] = {}
    for name, c in CASES.items():
        with gankern.backend(c.get("backend", "auto")):
            found = results(ops, c, rank_part(c, rank), process_group=world)
        if len(c["pixels"]) == 2:
            assert found["joined"][0].is_contiguous(memory_format=FORMATS[c["format"]]), name
        # NumPy has no bfloat16.
        answers[name] = {kind: [t.double().numpy() for t in tensors] for kind, tensors in found.items()}

    part = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    for momentum in MOMENTA:
        # DistributedDataParallel refuses to wrap a SyncBatchNorm on the CPU; what it has wrapped is converted.
        wrapped = DistributedDataParallel(gankern.fuse(model(nn.BatchNorm2d, momentum)))
        gankern.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module))
        assert all(isinstance(m, nn.SyncBatchNorm) for m in list(wrapped.module)[1::3])
        answers[f"model {momentum}"] = [t.numpy() for t in train(wrapped, part)]
        answers[f"by hand {momentum}"] = [t.numpy() for t in train(ByHand(model(nn.SyncBatchNorm, momentum)), part)]
    net = gankern.fuse(model(nn.SyncBatchNorm, process_group=alone))
    answers["alone"] = [t.numpy() for t in train(net, part)]

    x, stats = torch.randn(4, 3, 2, 2) + rank, (torch.zeros(3), torch.ones(3))

    def compiled(x: Tensor) -> Tensor:
        return ops.batch_norm_act(x * 2, *stats, training=True, process_group=world) + 1

    want = compiled(x)
    answers["compiled"] = bool(torch.allclose(torch.compile(compiled, backend="eager")(x), want))
    torch.compiler.reset()
    answers["whole graph"] = failure(lambda: torch.compile(compiled, backend="eager", fullgraph=True)(x))
    single = torch.randn(1 - rank, 3)
    answers["one value"] = failure(lambda: ops.batch_norm_act(single, *stats, training=True, process_group=world))
    shared[rank] = answers
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers() -> Any:
    return on_ranks(worker, WORLD)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_joint_batch(name: str, answers: Any) -> None:
    c = CASES[name]
    want = results(reference, c, slice(None))
    ranks = [answers[rank][name] for rank in range(WORLD)]
    tolerance = TOLERANCE[c["dtype"]]
    if c["mean"] > 1e4:
        # The input's own digits: those of the joint batch are lost as well.
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for kind, tensors in want.items():
        for number, tensor in enumerate(tensors):
            parts = [torch.from_numpy(rank[kind][number]) for rank in ranks]
            if kind == "equal":
                assert torch.equal(parts[0], parts[1]), name
                got = parts[0]
            else:
                got = torch.cat(parts) if kind == "joined" else parts[0] + parts[1]
            torch.testing.assert_close(
                got, tensor.double(), msg=lambda m, at=f"{kind} {number}": f"{at}: {m}", **tolerance
            )


@pytest.mark.parametrize("way", ["model", "by hand"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_fused_model_trains_as_on_the_joint_batch(momentum: float | None, way: str, answers: Any) -> None:
    want = train(model(nn.BatchNorm2d, momentum), slice(None))
    for rank in range(WORLD):
        for g, w in zip(answers[rank][f"{way} {momentum}"], want, strict=True):
            torch.testing.assert_close(torch.from_numpy(g), w, rtol=1e-9, atol=1e-10)


def test_a_group_of_one_rank_is_batch_norm(answers: Any) -> None:
    for rank in range(WORLD):
        want = train(model(nn.BatchNorm2d), slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1])))
        for g, w in zip(answers[rank]["alone"], want, strict=True):
            torch.testing.assert_close(torch.from_numpy(g), w, rtol=1e-9, atol=1e-10)


def test_compile_leaves_the_graph_or_names_the_reason(answers: Any) -> None:
    for rank in range(WORLD):
        assert answers[rank]["compiled"]
        assert "process_group" in answers[rank]["whole graph"]


def test_one_value_over_all_ranks_is_refused_on_each(answers: Any) -> None:
    for rank in range(WORLD):
        error = answers[rank]["one value"]
        assert error.startswith("ValueError: input must have more than 1 value per channel over all ranks")
        assert str((1 - rank, 3)) in error


def test_a_process_group_has_to_be_one() -> None:
    x, w = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 3, 3)
    for group in ("world", 1, [0, 1]):
        message = f"process_group must be a torch.distributed.ProcessGroup or None; got {type(group).__name__}"
        wrong: Any = {"training": True, "process_group": group}
        with pytest.raises(TypeError, match=message):
            ops.batch_norm_act(x, None, None, **wrong)
        with pytest.raises(TypeError, match=message):
            ops.batch_norm_act(x, None, None, **(wrong | {"training": False}))
        for op in (ops.conv_transpose2d_bn_act, ops.conv2d_bn_act):
            with pytest.raises(TypeError, match=message):
                op(x, w, None, None, None, None, None, **wrong)


def test_fuse_takes_sync_batch_norm_without_a_process_group() -> None:
    """As in stock, it is batch norm where torch.distributed has not been started."""
    net = gankern.fuse(model(nn.SyncBatchNorm))
    assert [run.reason for run in gankern.fusion_report(net)] == [None]
    part = slice(0, 4)
    for got, want in zip(train(net, part), train(model(nn.BatchNorm2d), part), strict=True):
        torch.testing.assert_close(got, want)


def test_converted_modules_run_as_one_op() -> None:
    block = gankern.nn.ConvTransposeBnAct2d(3, 4, 4, 2, 1)
    x = torch.randn(2, 3, 4, 4)
    want = block(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(block)(x), want)
