import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import nn

import gankern
from gankern.optim import RMSprop

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(170, 97), (7,), (), (0, 3), (65,), (4, 3, 5, 5), (16384,), (1,)]
OPTIONS = [
    {"weight_decay": decay, "momentum": momentum, "centered": centered, "maximize": maximize}
    for decay, momentum, centered, maximize in itertools.product((0, 0.1), (0, 0.9), (False, True), (False, True))
]


def make(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) * 0.1) for s in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, steps, *, clip=None, first=0):
    """Steps on the same gradients for everyone; with `clip`, torch's clamp after each."""
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
        if clip is not None:
            with torch.no_grad():
                for p in params:
                    p.clamp_(-clip, clip)
    return params


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(k for k, v in o.items() if v) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_stocks(dtype, options):
    options = options | {"lr": 0.01, "alpha": 0.9}
    exact = make(dtype)
    exact = [nn.Parameter(p.detach().double()) for p in exact]
    stock, ours = make(dtype), make(dtype)
    for step in range(4):
        set_grads(stock, step)
        # Every side sees the same rounded gradients.
        for e, s, o in zip(exact, stock, ours, strict=True):
            e.grad, o.grad = s.grad.double(), s.grad.clone()
        if step == 0:
            optimizers = [torch.optim.RMSprop(ps, **options) for ps in (exact, stock)]
            optimizers.append(RMSprop(ours, clip=0.15, **options))
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for p in (*exact, *stock):
                p.clamp_(-0.15, 0.15)
    assert_as_accurate(*(torch.cat([p.detach().flatten() for p in params]) for params in (ours, stock, exact)))
    for e, o in zip(exact, ours, strict=True):
        for key, value in optimizers[0].state[e].items():
            got = optimizers[2].state[o][key]
            assert got.dtype == (torch.float32 if key == "step" else dtype)
            tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(got.double(), value.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "centered": True, "weight_decay": 0.01}])
def test_many_steps_as_stock(options, clip):
    stock, ours = make(torch.float64, SHAPES[1:6]), make(torch.float64, SHAPES[1:6])
    train(torch.optim.RMSprop(stock, lr=1e-3, **options), stock, 100, clip=clip)
    train(RMSprop(ours, lr=1e-3, clip=clip, **options), ours, 100)
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-10)
    if clip is not None:
        assert max(p.abs().max() for p in ours if p.numel()) == clip


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 1e-30, 1e30])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_special_gradients_as_stock(value, eps):
    stock, ours = make(shapes=[(40,)]), make(shapes=[(40,)])
    for params, cls in ((stock, torch.optim.RMSprop), (ours, RMSprop)):
        params[0].grad = torch.full((40,), value)
        cls(params, eps=eps).step()
    torch.testing.assert_close(ours, stock, equal_nan=True)


def test_clip_keeps_nan_and_bounds_infinity():
    (p,) = make(shapes=[(20,)])
    p.grad = torch.ones(20)
    with torch.no_grad():
        p[3], p[4] = math.nan, math.inf
    RMSprop([p], clip=0.01).step()
    assert p[3].isnan() and p[4] == torch.tensor(0.01) and p.isnan().sum() == 1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}])
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dict_moves_both_ways_in_mid_training(options, ours_first):
    classes = [RMSprop, torch.optim.RMSprop]
    if not ours_first:
        classes.reverse()
    want = make(torch.float64)
    train(torch.optim.RMSprop(want, lr=1e-3, **options), want, 10)
    params = make(torch.float64)
    first = classes[0](params, lr=1e-3, **options)
    train(first, params, 5)
    state = copy.deepcopy(first.state_dict())
    second = classes[1](params, lr=99.0)
    second.load_state_dict(state)
    train(second, params, 5, first=5)
    torch.testing.assert_close(params, want, rtol=1e-10, atol=1e-12)
    stock_state = torch.optim.RMSprop(params, lr=1e-3, **options)
    train(stock_state, params, 1)
    keys = {k for s in stock_state.state_dict()["state"].values() for k in s}
    assert all(set(s) == keys for s in second.state_dict()["state"].values())
    assert all(s["step"] == 10 for s in second.state_dict()["state"].values())


def test_loading_stocks_state_keeps_clip():
    params = make()
    ours = RMSprop([{"params": params[:2], "clip": 0.5}, {"params": params[2:]}], clip=0.25)
    stock = torch.optim.RMSprop([{"params": params[:2]}, {"params": params[2:]}])
    train(stock, params, 1)
    ours.load_state_dict(stock.state_dict())
    assert [g["clip"] for g in ours.param_groups] == [0.5, 0.25]
    ours.load_state_dict(RMSprop([{"params": params[:2]}, {"params": params[2:]}], clip=0.125).state_dict())
    assert [g["clip"] for g in ours.param_groups] == [0.125, 0.125]


def test_pickle_and_deepcopy():
    params = make()
    optimizer = RMSprop(params, lr=0.1, clip=0.05)
    train(optimizer, params, 2)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        others = other.param_groups[0]["params"]
        assert other.param_groups[0]["clip"] == other.defaults["clip"] == 0.05
        train(other, others, 1, first=2)
        mine = copy.deepcopy(params)
        again = RMSprop(mine, lr=0.1, clip=0.05)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(again, mine, 1, first=2)
        torch.testing.assert_close(others, mine, rtol=0, atol=0)


def test_learning_rate_scheduler():
    stock, ours = make(), make()
    for params, cls in ((stock, torch.optim.RMSprop), (ours, RMSprop)):
        optimizer = cls(params, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        for step in range(6):
            train(optimizer, params, 1, first=step)
            scheduler.step()
        assert math.isclose(optimizer.param_groups[0]["lr"], 1e-4)
    torch.testing.assert_close(ours, stock)


def test_tensor_learning_rate():
    a, b = make(), make()
    train(RMSprop(a, lr=torch.tensor(0.1, dtype=torch.float64)), a, 2)
    train(RMSprop(b, lr=0.1), b, 2)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_groups_have_their_own_options():
    stock, ours = make(), make()

    def groups(params, **clip):
        return [{"params": params[:3], "lr": 0.1, **clip}, {"params": params[3:], "momentum": 0.5, "centered": True}]

    train(torch.optim.RMSprop(groups(stock)), stock, 3)
    optimizer = RMSprop(groups(ours, clip=0.01))
    optimizer.add_param_group({"params": make(shapes=[(3,)]), "clip": 0.02})
    assert [g["clip"] for g in optimizer.param_groups] == [0.01, None, 0.02]
    train(optimizer, ours, 3)
    assert all(p.abs().max() <= 0.01 for p in ours[:3] if p.numel())
    torch.testing.assert_close(ours[3:], stock[3:])


def test_mixed_dtypes_in_one_group():
    params = [p for pair in zip(make(torch.float32), make(torch.float64), strict=True) for p in pair]
    params += make(torch.float16, [(33,)])
    want = copy.deepcopy(params)
    train(torch.optim.RMSprop(want, lr=0.01), want, 2, clip=0.1)
    train(RMSprop(params, lr=0.01, clip=0.1), params, 2)
    torch.testing.assert_close(params, want)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_changes_nothing(foreach):
    a, b = make(), make()
    train(RMSprop(a, foreach=foreach), a, 2)
    train(RMSprop(b), b, 2)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_closure_zero_grad_and_hooks():
    (p,) = make(shapes=[(5,)])
    optimizer = RMSprop([p], clip=0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert loss == before.square().sum() and calls == ["before", "after"]
    assert not torch.equal(p, before)
    optimizer.zero_grad()
    assert p.grad is None and p.requires_grad and p.is_leaf and torch.is_grad_enabled()
    assert optimizer.step() is None


def test_parameters_without_gradients_are_left_alone():
    params = make()
    optimizer = RMSprop(params, clip=0.001)
    optimizer.step()
    before = copy.deepcopy(params)
    set_grads(params[:1], 0)
    optimizer.step()
    torch.testing.assert_close(params[1:], before[1:], rtol=0, atol=0)
    assert list(optimizer.state) == params[:1] and params[0].abs().max() <= 0.001


def test_version_counters_and_stale_graphs():
    x, y = make(shapes=[(5,), (5,)])
    optimizer = RMSprop([x, y], clip=0.1, momentum=0.9, centered=True)
    set_grads([x, y], 0)
    optimizer.step()
    state = [t for t in optimizer.state[x].values()]
    versions = [t._version for t in (x, y, *state)]
    out = (x * y).sum()
    optimizer.step()
    assert all(t._version > v for t, v in zip((x, y, *state), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_tied_weights():
    torch.manual_seed(0)
    nets = []
    for cls in (torch.optim.RMSprop, RMSprop):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        net[1].weight = net[0].weight
        net(torch.ones(2, 5)).sum().backward()
        cls(net.parameters()).step()
        nets.append(net)
    torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict())


GRADS = {
    "contiguous": lambda g: g.contiguous(),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "expanded": lambda g: g[:1, :1].expand_as(g),
    "sliced": lambda g: torch.stack([g, g], -1)[..., 1],
    "transposed": lambda g: g.transpose(0, 3).contiguous().transpose(0, 3),
}
PARAMS = {k: v for k, v in GRADS.items() if k != "expanded"}


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}])
def test_layouts(param, grad, options):
    torch.manual_seed(0)
    x, g = torch.randn(4, 3, 5, 6), GRADS[grad](torch.randn(4, 3, 5, 6))
    stock, ours = (nn.Parameter(PARAMS[param](x.clone())) for _ in range(2))
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    for p, optimizer in (
        (stock, torch.optim.RMSprop([stock], **options)),
        (ours, RMSprop([other, ours], clip=0.5, **options)),
    ):
        for _ in range(2):
            p.grad = g.clone(memory_format=torch.preserve_format) if grad != "expanded" else g
            optimizer.step()
            with torch.no_grad():
                p.clamp_(-0.5, 0.5)
    torch.testing.assert_close(ours, stock)
    assert ours.stride() == stock.stride()


def test_state_left_in_an_older_layout():
    stock, ours = make(shapes=[(4, 3, 5, 5), (7,)]), make(shapes=[(4, 3, 5, 5), (7,)])
    for params, cls in ((stock, torch.optim.RMSprop), (ours, RMSprop)):
        optimizer = cls(params)
        train(optimizer, params, 1)
        params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        train(optimizer, params, 1, first=1)
    torch.testing.assert_close(ours, stock)


def test_state_of_another_dtype():
    stock, ours = make(), make()
    for params, cls in ((stock, torch.optim.RMSprop), (ours, RMSprop)):
        optimizer = cls(params)
        train(optimizer, params, 1)
        for state in optimizer.state.values():
            state["square_avg"] = state["square_avg"].double()
        train(optimizer, params, 1, first=1)
    torch.testing.assert_close(ours, stock)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=4),
    order=st.randoms(use_true_random=False),
    grad_order=st.randoms(use_true_random=False),
    step=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
    clip=st.one_of(st.none(), st.floats(0, 2)),
)
def test_any_shape_strides_and_dtype(shape, order, grad_order, step, dtype, options, clip):
    dims, grad_dims = list(range(len(shape))), list(range(len(shape)))
    order.shuffle(dims)
    grad_order.shuffle(grad_dims)
    torch.manual_seed(0)

    def strided(dims, shape):
        """A tensor of this shape whose memory order is dims."""
        x = torch.randn([shape[d] for d in dims]).to(dtype)
        return x.permute([dims.index(d) for d in range(len(dims))])

    x = strided(dims, shape)
    x = x[::step] if x.dim() else x
    g = strided(grad_dims, x.shape)
    stock = nn.Parameter(x.double())
    ours = nn.Parameter(x.clone(memory_format=torch.preserve_format) if step == 1 else x)
    stock.grad, ours.grad = g.double(), g
    torch.optim.RMSprop([stock], **options).step()
    RMSprop([ours], clip=clip, **options).step()
    want = stock.detach() if clip is None else stock.detach().clamp(-clip, clip)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.detach().double(), want, rtol=tolerance, atol=tolerance)


def test_threads_and_runs_agree():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            params = make(shapes=[*SHAPES, (50000,), (33,)])
            results.append(train(RMSprop(params, momentum=0.5, centered=True, clip=0.1), params, 2))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS[::3])
def test_reference_backend_agrees(options):
    a, b = make(), make()
    train(RMSprop(a, clip=0.1, **options), a, 2)
    with gankern.backend("reference"):
        train(RMSprop(b, clip=0.1, **options), b, 2)
    torch.testing.assert_close(a, b)


def test_compiled_step():
    a, b = make(), make()
    eager, compiled = RMSprop(a, clip=0.1), RMSprop(b, clip=0.1)
    step = torch.compile(compiled.step, backend="aot_eager")
    for seed in range(3):
        for params in (a, b):
            set_grads(params, seed)
        eager.step()
        step()
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert compiled.state[b[0]]["step"] == 3


def test_sparse_and_complex_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="RMSprop does not support sparse gradients"):
        RMSprop(embedding.parameters()).step()
    z = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(TypeError, match="params must be real where clip is given"):
        RMSprop([z], clip=0.1).step()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}], ids=str)
def test_complex_parameters_take_torchs_step(options):
    found = []
    for optimizer in (RMSprop, torch.optim.RMSprop):
        torch.manual_seed(0)
        z = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        step = optimizer([z], lr=0.1, **options)
        for _ in range(2):
            z.grad = torch.randn_like(z)
            step.step()
        found.append(z)
    assert torch.equal(*found)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_differentiable_step_takes_torchs(clip):
    found = []
    for optimizer, options in ((RMSprop, {"clip": clip}), (torch.optim.RMSprop, {})):
        start = torch.linspace(-0.1, 0.2, 5).requires_grad_()
        weight = start.clone()
        weight.grad = start.sin()
        optimizer([weight], lr=1e-3, differentiable=True, **options).step()
        if clip is not None and optimizer is torch.optim.RMSprop:
            weight.clamp_(-clip, clip)
        found.append((weight.detach(), *torch.autograd.grad(weight.square().sum(), start)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


BAD = [
    ({"lr": -1.0}, ValueError),
    ({"lr": math.nan}, ValueError),
    ({"lr": "fast"}, TypeError),
    ({"lr": torch.ones(2)}, ValueError),
    ({"alpha": -0.1}, ValueError),
    ({"alpha": None}, TypeError),
    ({"eps": -1e-8}, ValueError),
    ({"weight_decay": -0.1}, ValueError),
    ({"momentum": -0.1}, ValueError),
    ({"centered": 2}, TypeError),
    ({"foreach": "yes"}, TypeError),
    ({"maximize": "yes"}, TypeError),
    ({"differentiable": 1}, TypeError),
    ({"clip": -0.01}, ValueError),
    ({"clip": math.inf}, ValueError),
    ({"clip": "small"}, TypeError),
    ({"clip": torch.ones(2)}, ValueError),
    ({"clip": torch.tensor(-0.1)}, ValueError),
]


@pytest.mark.parametrize(("options", "error"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_arguments(options, error):
    (name,) = options
    params = make()
    with pytest.raises(error, match=f"{name} must"):
        RMSprop(params, **options)
    optimizer = RMSprop(params[:1])
    with pytest.raises(error, match=f"{name} must"):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1


def test_a_mode_that_comes_with_a_state_dict():
    params = make()
    state = torch.optim.RMSprop(params, capturable=True).state_dict()
    optimizer = RMSprop(params)
    optimizer.load_state_dict(state)
    set_grads(params, 0)
    with pytest.raises(ValueError, match="capturable must be False"):
        optimizer.step()


def test_bad_params():
    with pytest.raises(TypeError):
        RMSprop(torch.ones(3))
    with pytest.raises(TypeError):
        RMSprop([3.0])
    with pytest.raises(ValueError, match="empty parameter list"):
        RMSprop([])
