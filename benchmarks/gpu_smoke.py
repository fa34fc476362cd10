"""Runs the GPU's kernels once against float64: every CUDA C++ kernel, and every Triton kernel by name.

    python benchmarks/gpu_smoke.py                        both backends, every type, in as many processes as there are
    python benchmarks/gpu_smoke.py --backend cuda --dtype float32 --jobs 1      for compute-sanitizer
    python benchmarks/gpu_smoke.py --compile              only compiles the CUDA C++ kernels into the cache

Exit 1 where a result is wrong or a kernel has not been launched. With --device cpu the kernels run without a GPU: in
Triton's interpreter, and by tests/cuda_on_cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BACKENDS = ("cuda", "triton")
# Relative error in norm; tf32 is float32 whose products may be rounded so.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float64": 1e-9, "bfloat16": 3e-2, "float16": 5e-3}

Draw = Callable[..., Any]
Check = Callable[[Any, Draw], list[Any]]


def checks() -> dict[str, tuple[str, Any, Check]]:
    """What is run, by name: an op, its reference, and its results by an adapter's functions and inputs drawn."""
    import torch
    import torch.nn.functional as F

    from gankern.ops.conv_act import reference as conv_reference
    from gankern.ops.conv_act.reference import ConvOptions
    from gankern.ops.conv_transpose_bn_act import reference as norm_reference
    from gankern.ops.critic_layers import reference as layer_reference
    from gankern.ops.gradient_penalty import reference as penalty_reference
    from gankern.ops.minibatch_discrimination import reference as minibatch_reference
    from gankern.ops.weight_clip import reference as clip_reference

    def batch_norm(shape: tuple[int, ...], last: bool, activation: str) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            form = torch.channels_last if last else torch.contiguous_format
            x, grad = (draw(*shape).contiguous(memory_format=form) for _ in range(2))
            weight, bias = draw(shape[1], wide=True), draw(shape[1], wide=True)
            act = (activation, 0.2)
            output, mean, invstd, var = m.forward_train(x, weight, bias, 1e-3, *act)
            wide = x.double().flatten(2).transpose(0, 1).flatten(1)
            sums = torch.stack([wide.sum(1), wide.square().sum(1)]).unsqueeze(0)
            from_sums = m.forward_train_from_sums(x, sums, weight, bias, 1e-3, *act)
            constant = m.forward_eval(x, weight, bias, mean, invstd, *act)
            grads = [m.backward(grad, x, weight, bias, mean, invstd, training, *act) for training in (True, False)]
            running = [draw(shape[1], wide=True), draw(shape[1], wide=True).abs()]
            getattr(m, "update_running", norm_reference.update_running)(*running, mean, var, 0.3, 1.1)
            found = [output, mean, invstd, var, *from_sums, constant, *m.statistics(x, 1e-3), *running]
            return found + [t for group in grads for t in group]

        return run

    def convolution(c: int, outputs: int, size: int, transposed: bool) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            options = ConvOptions((2, 2), (1, 1), (1, 1), transposed, (0, 0), 1)
            x, weight = draw(4, c, size, size), draw(*((c, outputs) if transposed else (outputs, c)), 4, 4) * 0.2
            bias = draw(outputs)
            output = m.conv(x, weight, bias, options, "leaky_relu", 0.2)
            grad = draw(*output.shape)
            if m is conv_reference:
                plain = m.conv(x, weight, bias, options)
                sums = torch.stack([plain.sum((0, 2, 3)), plain.square().sum((0, 2, 3))])
            else:
                plain, parts = m.conv_statistics(x, weight, bias, options)
                sums = parts.sum(0)
            grad_input = m.conv_input_grad(grad, weight, x, options)
            return [output, plain, sums, grad_input, m.conv_weight_grad(grad, x, weight, options)]

        return run

    def minibatch(n: int, b: int, c: int) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            x, tangent, grad = draw(n, b, c) * (1 / c), draw(n, b, c), draw(n, b)
            second = m.features_double_backward(tangent, grad, x)
            return [m.features(x, False), m.features_backward(grad, x), *second]

        return run

    def distance(n: int, b: int, c: int) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            x, tangent, grad = draw(n, b, c), draw(n, b, c), draw(n, n, b)
            return [m.distance(x), m.distance_tangent(tangent, x), m.distance_backward(grad, x)]

        return run

    def penalty(*shape: int) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            real, fake, alpha = draw(*shape), draw(*shape), draw(shape[0], wide=True).abs()
            return [m.interpolate(real, fake, alpha), *m.tail(real * 0.1, 10.0, 1.0, False, False)]

        return run

    def layer_norm(*shape: int) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            x, grad, tangent, weight, bias = draw(*shape), draw(*shape), draw(*shape), draw(shape[1]), draw(shape[1])
            y, *stats = m.layer_norm_forward(x, weight, bias, 1e-2)
            first = m.layer_norm_backward(grad, x, weight, *stats, True)
            return [y, *first, *m.layer_norm_double_backward(tangent, grad, x, weight, *stats, True)]

        return run

    def group_norm(groups: int, *shape: int) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            x, grad, tangent, weight, bias = draw(*shape), draw(*shape), draw(*shape), draw(shape[1]), draw(shape[1])
            y, *stats = m.group_norm_forward(x, weight, bias, groups, 1e-2)
            first = m.group_norm_backward(grad, x, weight, *stats, True)
            return [y, *first, *m.group_norm_double_backward(tangent, grad, x, weight, *stats, True)]

        return run

    def layers(m: Any, draw: Draw) -> list[Any]:
        x, weight, bias = draw(2, 3, 8, 8), draw(8, 3, 3, 3) * 0.2, draw(8)
        options = ConvOptions((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        grad = draw(2, 3, 4, 4)
        if m is layer_reference:
            acted = F.leaky_relu(F.conv2d(x, weight, bias, 1, 1), 0.2)
        else:
            acted = m.conv(x, weight, bias, options, "leaky_relu", 0.2)
        return [acted, m.avg_pool2d(x, [2, 2]), m.avg_pool2d_backward(grad, x.shape, [2, 2])]

    def clip(m: Any, draw: Draw) -> list[Any]:
        params = [draw(n) for n in (5, 4096, 9001)]
        m.clip_weights(params, 0.5)
        return params

    def rmsprop(centered: bool, momentum: bool) -> Check:
        def run(m: Any, draw: Draw) -> list[Any]:
            params, grads = ([draw(n) for n in (5, 4096, 9001)] for _ in range(2))
            square_avgs = [draw(n).square() + 1 for n in (5, 4096, 9001)]
            grad_avgs = [draw(n) * 0.1 for n in (5, 4096, 9001)] if centered else []
            buffers = [draw(n) for n in (5, 4096, 9001)] if momentum else []
            lists = (params, grads, square_avgs, grad_avgs, buffers)
            m.rmsprop_clip(*lists, 0.01, 0.9, 1e-3, 0.1, 0.5 * momentum, False, 1.5)
            return [*params, *square_avgs, *grad_avgs, *buffers]

        return run

    found: dict[str, tuple[str, Any, Check]] = {}
    for shape in ((4, 8, 8, 8), (3, 5, 3, 3)):
        for last in (False, True):
            check = batch_norm(shape, last, "relu" if last else "leaky_relu")
            found[f"batch norm {shape}{' channels_last' * last}"] = ("batch_norm_act", norm_reference, check)
    shapes = ((6, 10, 10, False), (16, 16, 32, False), (8, 3, 8, True), (8, 3, 8, False), (3, 8, 16, False))
    for c, outputs, size, transposed in shapes:
        name = f"convolution {c} to {outputs}{' transposed' * transposed}"
        found[name] = ("conv2d_act", conv_reference, convolution(c, outputs, size, transposed))
    for c in (3, 8, 12, 20):
        found[f"minibatch {c}"] = ("minibatch_discrimination", minibatch_reference, minibatch(150, 3, c))
    found["distance"] = ("l1_distance", minibatch_reference, distance(37, 5, 7))
    for shape in ((3, 4099), (4, 8192)):
        found[f"penalty {shape}"] = ("gradient_penalty", penalty_reference, penalty(*shape))
    for shape in ((5, 37), (6, 1024)):
        found[f"layer norm {shape}"] = ("critic_layers", layer_reference, layer_norm(*shape))
    for groups, *sizes in ((3, 5, 6, 37), (2, 4, 8, 64)):
        found[f"group norm {sizes}"] = ("critic_layers", layer_reference, group_norm(groups, *sizes))
    found["pooling and activation"] = ("critic_layers", layer_reference, layers)
    found["clip"] = ("clip_weights_", clip_reference, clip)
    for centered in (False, True):
        for momentum in (False, True):
            name = f"rmsprop{' centered' * centered}{' momentum' * momentum}"
            found[name] = ("rmsprop_clip_", clip_reference, rmsprop(centered, momentum))
    return found


def drawing(device: str, dtype: Any, kind: Any) -> Draw:
    """Draws the same numbers for every kind: rounded to the type, or the type of its arithmetic where `wide`."""
    import torch

    from gankern._native import acc_dtype

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, wide: bool = False) -> Any:
        rounded = torch.randn(shape, generator=generator, dtype=torch.float64).to(acc_dtype(dtype) if wide else dtype)
        return rounded.to(device, acc_dtype(kind) if wide else kind)

    return draw


def run(backend: str, type_name: str, device: str, only: str) -> dict[str, Any]:
    """Every check by one backend in one type; tells each as it goes."""
    import torch

    import gankern
    from gankern import _cuda, _triton, backends
    from gankern.bench.gpu import products_in_tf32

    if device == "cpu":
        from cuda_on_cpu.launcher import Launcher
        from triton_interpreter import mend

        _cuda.launcher = Launcher()
        mend()
    dtype = torch.float32 if type_name == "tf32" else getattr(torch, type_name)
    launched: set[str] = set()
    launch, start = _cuda.launch, _triton.start

    def launching(kernel: Any, *args: Any, **options: Any) -> None:
        launched.add(kernel.label)
        launch(kernel, *args, **options)

    def starting(kernel: Any, *args: Any, **options: Any) -> None:
        launched.add(kernel.__name__)
        start(kernel, *args, **options)

    _cuda.launch, _triton.start = launching, starting
    wrong: dict[str, str] = {}
    worst = 0.0
    named = {name: check for name, check in checks().items() if only in name}
    with products_in_tf32(type_name == "tf32"), gankern.backend(backend):
        for name, (op, reference, check) in named.items():
            began = time.perf_counter()
            try:
                probe = torch.empty(1, dtype=dtype, device=device)
                got = check(backends.select(op, probe), drawing(device, dtype, dtype))
                # On the CPU: compute-sanitizer would look at torch's kernels, too.
                want = check(reference, drawing("cpu", dtype, torch.float64))
                errors = [
                    float((g.cpu().double() - w).norm() / w.norm().clamp(min=1e-30))
                    for g, w in zip(got, want, strict=True)
                ]
                error = max(errors) if all(e == e for e in errors) else float("nan")
                worst = max(worst, error)
                # Not `error > tolerance`: a NaN must not pass.
                if not error <= TOLERANCE[type_name]:
                    wrong[name] = f"relative errors {' '.join(f'{e:.1e}' for e in errors)}"
            except Exception as failure:
                wrong[name] = f"{type(failure).__name__}: {failure}"[:2000]
            line = wrong.get(name, "right")
            print(f"{backend} {type_name} {name}: {line}, {time.perf_counter() - began:.2f} s", flush=True)
    every = expected(backend, type_name)
    return {"wrong": wrong, "worst": worst, "checks": len(named), "launched": len(launched), "left": every - launched}


def expected(backend: str, type_name: str) -> set[str]:
    """Labels of the kernels of a backend for a type; Triton's by name alone."""
    from gankern import _cuda, backends

    kernels = [k for adapter in backends.adapters(backend) for k in getattr(adapter, LISTS[backend])]
    if backend == "triton":
        return {k.kernel.__name__ for k in kernels if str(k.dtype).endswith("float32")}
    names = {str(dtype).removeprefix("torch."): name for dtype, name in _cuda.TYPES.items()}
    stored = ("STORAGE", names["float32" if type_name == "tf32" else type_name])
    of_type = {k for k in kernels if stored in k.defines and ("TF32", "1") not in k.defines}
    if type_name == "tf32":
        of_type = {k for k in kernels if ("TF32", "1") in k.defines}
    return {k.label for k in of_type}


LISTS = {"cuda": "KERNELS", "triton": "COMPILED"}


def compile_all(jobs: int, device: str, only: str) -> None:
    """The CUDA C++ kernels into the cache, so that no run waits for them."""
    import torch

    from gankern import backends

    kernels = [k for adapter in backends.adapters("cuda") for k in adapter.KERNELS if only in k.label]
    major, minor = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, kernels, [f"sm_{major}{minor}"] * len(kernels), chunksize=4))
    print(f"{len(kernels)} kernels compiled in {time.perf_counter() - began:.1f} s", flush=True)


def _compile(kernel: Any, arch: str) -> None:
    from gankern import _cuda

    _cuda.cubin(kernel, arch)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--dtype", action="append", choices=list(TOLERANCE))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", metavar="TEXT", help="checks, or kernels, whose names have it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if args.compile:
        compile_all(args.jobs, args.device, args.only)
        return 0
    pairs = [(b, t) for t in args.dtype or TOLERANCE for b in args.backend or BACKENDS]
    found: dict[str, Any] = {}

    def keep(pair: tuple[str, str], result: dict[str, Any]) -> None:
        found[" ".join(pair)] = {k: sorted(v) if isinstance(v, set) else v for k, v in result.items()}
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    def apart(pair: tuple[str, str]) -> None:
        """In a process of its own, whose result comes back by a file."""
        file = Path(f"{args.json or 'smoke'}.{'-'.join(pair)}")
        given = ["--device", args.device, "--only", args.only, "--jobs", "1", "--json", str(file)]
        command = [sys.executable, __file__, "--backend", pair[0], "--dtype", pair[1], *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(done.stdout, end="", flush=True)
        missing = {"wrong": {"process": f"exit {done.returncode}: {done.stdout[-2000:]}"}, "left": []}
        keep(pair, json.loads(file.read_text())[" ".join(pair)] if file.exists() else missing)
        file.unlink(missing_ok=True)

    failed = False
    pool = ThreadPoolExecutor(args.jobs)
    try:
        if len(pairs) == 1 or args.jobs == 1:
            for pair in pairs:
                keep(pair, run(*pair, args.device, args.only))
        else:
            list(pool.map(apart, pairs))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        failed = True
    finally:
        pool.shutdown(cancel_futures=True)
    for pair, result in found.items():
        failed |= bool(result["wrong"] or (result["left"] and not args.only))
        print(f"{pair}: {len(result['wrong'])} wrong of {result.get('checks', '?')}, not launched: {result['left']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
