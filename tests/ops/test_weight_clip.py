import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

import gankern
from gankern.ops.weight_clip import autograd, clip_weights_, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [0, 1, 7, 16, 63, 64, 65, 1000, 16383, 16384, 16385, 50000]


def tensors(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.ReLU())


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [0.0, 0.01, 0.5, 100.0])
def test_values_are_clamps(dtype, c):
    params = tensors(dtype)
    want = [p.clamp(-c, c) for p in params]
    clip_weights_(params, c)
    assert_same(params, want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_special_values(dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.01, -0.01, 0.0100001] * 5, dtype=dtype)
    want = x.clamp(-0.01, 0.01)
    clip_weights_([x], 0.01)
    assert_same(x, want)
    assert x.isnan().sum() == 5


def test_nothing_outside_is_written():
    memory = torch.full((3000,), 5.0)
    clip_weights_([memory[64:1000], memory[2000:2007]], 1.0)
    inside = torch.zeros(3000, dtype=torch.bool)
    inside[64:1000] = inside[2000:2007] = True
    assert (memory[inside] == 1).all() and (memory[~inside] == 5).all()


@pytest.mark.parametrize("make", [tensors, iter, tuple], ids=["list", "iterator", "tuple"])
def test_iterables(make):
    params = tensors()
    source = params if make is tensors else make(params)
    assert clip_weights_(source, 0.1) is source
    assert all(p.abs().max() <= 0.1 for p in params if p.numel())


def test_module_and_single_tensor():
    net = critic()
    assert clip_weights_(net, 0.01) is net
    assert all(p.abs().max() <= 0.01 for p in net.parameters())
    x = torch.randn(3, requires_grad=True)
    assert clip_weights_(x, 0.01) is x and x.abs().max() <= 0.01 and x.is_leaf


def test_param_groups():
    net = critic()
    optimizer = torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[2][0].weight}], lr=1.0)
    clip_weights_(optimizer.param_groups, 0.01)
    assert net[0].weight.abs().max() <= 0.01 and net[2][0].weight.abs().max() <= 0.01
    assert net[1].weight.max() == 1


@pytest.mark.parametrize("exclude", [nn.LayerNorm, (nn.LayerNorm, nn.BatchNorm2d), nn.Sequential])
def test_exclude(exclude):
    net = nn.ModuleDict({"body": critic(), "head": nn.Linear(8, 1)})
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(3.0)
    clip_weights_(net, 0.5, exclude=exclude)
    kept = exclude if isinstance(exclude, tuple) else (exclude,)
    inside = {id(p) for m in net.modules() if isinstance(m, kept) for p in m.parameters()}
    assert inside
    for p in net.parameters():
        assert (p == (3.0 if id(p) in inside else 0.5)).all()


def test_tied_weights():
    a, b = nn.Linear(40, 40), nn.Linear(40, 40)
    b.weight = a.weight
    clip_weights_(nn.Sequential(a, b), 0.01)
    clip_weights_([a.weight, b.weight, a.weight.t()], 0.005)
    assert a.weight.abs().max() <= 0.005


def test_mixed_dtypes_in_one_list():
    params = [t for dtype in (*DTYPES, torch.float16) for t in tensors(dtype, [5, 70])]
    want = [p.clamp(-0.3, 0.3) for p in params]
    clip_weights_(params[::2] + params[1::2], 0.3)
    assert_same(params, want)


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(30, 20).t(),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "rows sliced": lambda: torch.randn(40, 7)[::3],
    "columns sliced": lambda: torch.randn(40, 7)[:, 1:5],
    "transposed slice": lambda: torch.randn(40, 8)[:, ::2].t(),
    "size-1 dims": lambda: torch.randn(6, 5, 1, 1).contiguous(memory_format=torch.channels_last),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2).transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout]()
    base = x if x._base is None else x._base
    want_base = base.clone(memory_format=torch.preserve_format)
    want_base.as_strided(x.shape, x.stride(), x.storage_offset()).clamp_(-0.2, 0.2)
    clip_weights_([torch.randn(3), x], 0.2)
    assert_same(base, want_base)


def test_expanded_tensor_is_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="single memory location"):
        clip_weights_([torch.ones(3).expand(4, 3)], 0.1)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=4),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    dtype=st.sampled_from([*DTYPES, torch.float16]),
    c=st.floats(0, 2),
)
def test_any_shape_strides_and_dtype(shape, order, step, dtype, c):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    x = torch.randn(shape).to(dtype).permute(dims)
    x = x[::step] if x.dim() else x
    want = x.clamp(-c, c)
    clip_weights_([x, torch.randn(3)], c)
    assert_same(x, want)


def test_version_counters_and_stale_graphs():
    x = torch.randn(5, requires_grad=True)
    y = torch.randn(5, requires_grad=True)
    versions = x._version, y._version
    out = (x * y).sum()
    clip_weights_([x, y], 0.1)
    assert x._version > versions[0] and y._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_grad_mode_and_inference_mode():
    x = torch.randn(5, requires_grad=True)
    clip_weights_(x, 0.1)
    assert torch.is_grad_enabled() and x.requires_grad and x.grad_fn is None
    with torch.inference_mode():
        z = torch.randn(9)
        clip_weights_([z, x], 0.05)
    assert z.abs().max() <= 0.05 and x.abs().max() <= 0.05


def test_no_tensors():
    assert clip_weights_([], 0.1) == []
    clip_weights_(nn.ReLU(), 0.1)


def test_threads_and_runs_agree():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(clip_weights_(tensors(), 0.3))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_reference_backend_agrees():
    a, b = tensors(), tensors()
    clip_weights_(a, 0.2)
    with gankern.backend("reference"):
        clip_weights_(b, 0.2)
    assert_same(a, b)


def test_backend_asked_for_by_name_is_not_replaced():
    with gankern.backend("cpu"), pytest.raises(gankern.BackendUnavailable, match="float16"):
        clip_weights_(torch.randn(3, dtype=torch.float16), 0.2)


def test_explain():
    found = gankern.explain(clip_weights_, torch.randn(3))
    assert found.chosen == "cpu"
    assert gankern.explain("rmsprop_clip_", torch.randn(3, dtype=torch.float16)).chosen == "reference"


@pytest.mark.parametrize("exclude", [(), nn.LayerNorm])
def test_compiles_as_one_graph(exclude):
    net, eager = critic(), critic()

    def run(x):
        clip_weights_(net, 0.05, exclude=exclude)
        return net(x).sum()

    x = torch.randn(4, 6)
    clip_weights_(eager, 0.05, exclude=exclude)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), eager(x).sum())
    assert_same(net.state_dict(), eager.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_clip(dtype):
    opcheck(torch.ops.gankern.clip_weights_.default, (tensors(dtype, [7, 70]), 0.1))


@pytest.mark.parametrize("centered", [False, True])
def test_opcheck_rmsprop(centered):
    params, grads = tensors(sizes=[7, 70]), tensors(sizes=[7, 70])
    states = [[torch.rand_like(p) + 1 for p in params] if on else [] for on in (True, centered, centered)]
    options = (0.1, 0.9, 1e-8, 0.1, 0.5 if centered else 0.0, False, 0.3)
    opcheck(torch.ops.gankern.rmsprop_clip_.default, (params, grads, *states, *options))


def test_mixed_dtypes_in_the_update():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(40, generator=generator, dtype=dtype) for dtype in (torch.float32, torch.float64)] * 2
    params = [p.clone() for p in params]
    grads, square_avgs = [torch.ones_like(p) for p in params], [torch.ones_like(p) for p in params]
    want = copy.deepcopy((params, square_avgs))
    options = (0.1, 0.9, 1e-8, 0.0, 0.0, False, 0.3)
    autograd.rmsprop_clip_(params, grads, square_avgs, [], [], *options)
    reference.rmsprop_clip(want[0], grads, want[1], [], [], *options)
    torch.testing.assert_close((params, square_avgs), want)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3, 0.1), TypeError, "module_or_params must be a Module"),
        (("weights", 0.1), TypeError, "module_or_params must be a Module"),
        (({"params": []}, 0.1), TypeError, "module_or_params must be a Module"),
        (([3.0], 0.1), TypeError, "module_or_params must be a Tensor; got float"),
        (([{"weights": []}], 0.1), TypeError, "module_or_params must be a Tensor; got dict"),
        ((torch.ones(3, dtype=torch.int64), 0.1), TypeError, "module_or_params must have a floating-point dtype"),
        ((torch.ones(3, dtype=torch.complex64), 0.1), TypeError, "module_or_params must have a floating-point dtype"),
        ((torch.ones(3, 3).to_sparse(), 0.1), TypeError, "module_or_params must be a dense tensor"),
        ((torch.ones(3), "0.1"), TypeError, "c must be a number"),
        ((torch.ones(3), True), TypeError, "c must be a number"),
        ((torch.ones(3), -0.1), ValueError, "c must be at least 0"),
        ((torch.ones(3), math.nan), ValueError, "c must be at least 0"),
        ((torch.ones(3), math.inf), ValueError, "c must be at least 0"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        clip_weights_(*args)


@pytest.mark.parametrize("exclude", ["norm", [nn.LayerNorm], nn.LayerNorm(3), (int,)])
def test_bad_exclude(exclude):
    with pytest.raises(TypeError, match="exclude must be a type of module"):
        clip_weights_(critic(), 0.1, exclude=exclude)


def test_exclude_needs_a_module():
    with pytest.raises(ValueError, match="exclude needs a module"):
        clip_weights_(torch.ones(3), 0.1, exclude=nn.LayerNorm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_reference_clips_parameters(dtype: torch.dtype) -> None:
    """Which require gradients: float16 on the CPU, or where a backend is asked for by name."""
    parameter = torch.nn.Parameter(torch.tensor([-2.0, 0.1, 3.0], dtype=dtype))
    with gankern.backend("reference"):
        gankern.clip_weights_([parameter], 0.5)
    assert torch.equal(parameter, torch.tensor([-0.5, 0.1, 0.5], dtype=dtype))
