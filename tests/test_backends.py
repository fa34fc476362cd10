from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import gankern
from gankern import _native, backends, ops
from gankern._info import format_info

ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(autouse=True)
def automatic() -> Any:
    yield
    gankern.set_backend("auto")


def test_auto_picks_the_kernels_and_says_why_not_others() -> None:
    x = torch.randn(2, 3)
    found = gankern.explain(ops.batch_norm_act, x)
    assert found.chosen == "cpu"
    assert set(found.refused) == {"cuda", "triton", "reference"}
    assert "cpu" in str(found)
    half = gankern.explain("batch_norm_act", x.half())
    assert half.chosen == "reference"
    assert "float16" in half.refused["cpu"]


def test_ops_are_known_before_they_are_used() -> None:
    code = "import gankern, torch; from gankern import backends\n"
    code += "assert gankern.explain('batch_norm_act', torch.ones(2, 3)).chosen == 'cpu'\n"
    code += "assert len({k for a in backends.adapters('cuda') for k in a.KERNELS}) > 200"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_block_tells_what_runs_each_of_its_parts() -> None:
    options = {"training": True, "stride": 2, "padding": 1}
    for op, shape in ((ops.conv_transpose2d_bn_act, (4, 6, 4, 4)), (ops.conv2d_bn_act, (6, 4, 4, 4))):
        x, w = torch.randn(2, 4, 6, 6), torch.randn(shape)
        found = gankern.explain(op, x, w, None, None, None, None, None, **options)
        assert found.chosen == "cpu"
        assert "convolution: backend cpu" in str(found)
        for different in ({"x": x.double(), "w": w.double()}, {"groups": 2}):
            given = {"x": x, "w": w, **different}
            more = {k: v for k, v in given.items() if k == "groups"}
            found = gankern.explain(op, given["x"], given["w"], None, None, None, None, None, **options, **more)
            assert "convolution: torch's own" in str(found)
            assert "batch norm and activation: cpu" in str(found)


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 3)
    call = lambda x: ops.batch_norm_act(x, None, None, training=True)  # noqa: E731
    with gankern.backend("triton"), pytest.raises(gankern.BackendUnavailable, match=r"triton.*batch_norm_act"):
        call(x)
    gankern.set_backend("cpu")
    with pytest.raises(gankern.BackendUnavailable, match="float16"):
        call(x.half())
    with gankern.backend("reference"):
        assert gankern.explain("batch_norm_act", x).chosen == "reference"
        reference = call(x)
    gankern.set_backend("auto")
    monkeypatch.setenv("GANKERN_BACKEND", "cuda")
    assert gankern.explain("batch_norm_act", x).chosen is None
    with pytest.raises(gankern.BackendUnavailable, match="cuda"):
        call(x)
    monkeypatch.delenv("GANKERN_BACKEND")
    torch.testing.assert_close(call(x), reference)


def test_a_named_backend_never_falls_back_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w, stat = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.ones(4)

    def block() -> torch.Tensor:
        with torch.no_grad():
            return ops.conv2d_bn_act(x, w, None, stat, stat, stat, stat, training=False)

    with gankern.backend("triton"), pytest.raises(gankern.BackendUnavailable, match="triton"):
        block()
    with gankern.backend("reference"):
        reference = block()
    torch.testing.assert_close(block(), reference)


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "import_error", "the compiled kernels do not import: gone")
    found = gankern.explain("batch_norm_act", torch.randn(2, 3))
    assert found.chosen == "reference"
    assert "gone" in found.refused["cpu"]


def test_bad_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        gankern.set_backend("gpu")
    with pytest.raises(ValueError, match="name must be one of"), gankern.backend("gpu"):
        pass
    with pytest.raises(ValueError, match="op must be one of"):
        gankern.explain("softmax")
    monkeypatch.setenv("GANKERN_BACKEND", "fast")
    with pytest.raises(ValueError, match="GANKERN_BACKEND must be one of"):
        backends.requested()


def test_info_is_json_and_one_page() -> None:
    report = gankern.info()
    assert json.loads(json.dumps(report)) == report
    assert report["backends"]["cpu"] is None
    assert report["cpu"]["isa"] in ISAS
    assert report["cpu"]["threading"] == "openmp"
    assert report["cpu"]["isa"] in format_info()
    assert len(format_info().splitlines()) < 25


def test_kernels_share_torchs_threads() -> None:
    code = "import gankern.ops, os; print([l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(set(eval(loaded))) == 1, "two OpenMP runtimes in one process"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_under_every_instruction_set(isa: str) -> None:
    if isa == _native.kernels.cpu_isa():
        pytest.skip("all other tests run under it")
    # Threads share the work in the same way under each: both counts of them run in all other tests.
    environment = {**os.environ, "GANKERN_CPU_ISA": isa, "GANKERN_TEST_THREADS": "2"}
    asked = [sys.executable, "-c", "from gankern import _native; print(_native.kernels.cpu_isa())"]
    if isa != "baseline" and subprocess.run(asked, env=environment, capture_output=True, check=False).returncode:
        pytest.skip("not an instruction set of this processor")
    command = [sys.executable, "-m", "pytest", "-qm", "kernel", "-pno:cacheprovider", "tests/ops", "tests/optim"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, f"{isa}:\n{done.stdout[-4000:]}"


def test_an_unknown_instruction_set_is_an_error() -> None:
    code = "from gankern import _native; _native.kernels.cpu_isa()"
    environment = {**os.environ, "GANKERN_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "GANKERN_CPU_ISA must be one of" in done.stderr
    assert "mmx" in done.stderr


SIGNATURES = {
    "ops.conv_transpose2d_bn_act": "input weight bias running_mean running_var bn_weight bn_bias * stride=1 padding=0 "
    "output_padding=0 groups=1 dilation=1 training momentum=0.1 eps=1e-05 activation='relu' negative_slope=0.2 "
    "process_group=None",
    "ops.batch_norm_act": "input running_mean running_var weight=None bias=None * training momentum=0.1 eps=1e-05 "
    "activation='relu' negative_slope=0.2 process_group=None",
    "ops.l1_distance": "m",
    "ops.minibatch_discrimination": "m * include_self=False",
    "ops.minibatch_stddev": "input group_size=4 num_channels=1 eps=1e-08",
    "nn.MinibatchDiscrimination": "in_features out_features kernel_dims * bias=False weight_norm=False "
    "include_self=False process_group=None device=None dtype=None",
    "nn.MinibatchStdDev": "group_size=4 num_channels=1 eps=1e-08",
    "gradient_penalty": "critic real fake *inputs weight=10.0 target=1.0 one_sided=False alpha=None generator=None "
    "params=None create_graph=False **critic_kwargs",
    "penalties.r1": "critic real *inputs weight=10.0 params=None create_graph=False **critic_kwargs",
    "penalties.r2": "critic fake *inputs weight=10.0 params=None create_graph=False **critic_kwargs",
    "penalties.dragan": "critic real *inputs weight=10.0 target=1.0 scale=0.5 generator=None params=None "
    "create_graph=False **critic_kwargs",
    "penalties.zero_centered": "critic real fake *inputs weight=10.0 alpha=None generator=None params=None "
    "create_graph=False **critic_kwargs",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name: str) -> None:
    function: Any = gankern
    for part in name.split("."):
        function = getattr(function, part)
    words, star = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        star = star or p.kind is p.VAR_POSITIONAL
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(stars + p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    assert " ".join(words) == SIGNATURES[name]


def test_every_public_name_has_a_docstring() -> None:
    for module in (gankern, ops, gankern.penalties, gankern.optim, gankern.nn):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_a_choice_reaches_the_threads_of_autograd() -> None:
    """As those of a GPU: nested deeply enough, backward passes go on in another thread."""
    seen = set()

    class Deep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            seen.add((threading.get_ident(), backends.requested()))
            if ctx.depth:
                with torch.enable_grad():
                    inner = Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1)
                inner.backward()
            return grad, None

    def run() -> set[str]:
        seen.clear()
        Deep.apply(torch.ones(1, requires_grad=True), 80).backward()
        assert len({thread for thread, _ in seen}) == 2
        return {name for _, name in seen}

    with gankern.backend("reference"):
        with gankern.backend("cpu"):
            assert run() == {"cpu"}
        assert run() == {"reference"}
    assert run() == {"auto"}


def test_what_is_handed_on_keeps_its_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 takes none, and gives one up when the next object comes: names would be freed under others."""
    name = backends.NAMES[0]
    monkeypatch.setattr(torch._C, "_stash_obj_in_tls", lambda key, value: None)
    before = sys.getrefcount(name)
    for _ in range(3):
        with gankern.backend("".join(list(name))):
            assert gankern.backends.requested() is name
    assert sys.getrefcount(name) in (before, before + 3)  # as it is where it never dies
    given = object()
    held = sys.getrefcount(given)
    backends.hand_on("gankern_test", given)  # type: ignore[arg-type]
    assert sys.getrefcount(given) == held + 1


@pytest.mark.by_size
def test_few_elements_are_one_threads() -> None:
    assert _native.threads(100) == 1 and _native.threads(1 << 20) == torch.get_num_threads()
