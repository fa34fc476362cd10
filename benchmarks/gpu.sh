#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with a GPU, in one call and with nothing fetched.
#
#   bash benchmarks/gpu.sh [FOLDER]     results and logs go to FOLDER, $OUT or out/gpu; exit 1 where a step failed
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-out/gpu}}
mkdir -p "$out"
export PYTHONPATH=$PWD GANKERN_CACHE_DIR=${GANKERN_CACHE_DIR:-$PWD/build/kernel_cache}
python=${PYTHON:-python3}
status=0

step() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then
        echo "$name: ok, $((SECONDS - start)) s"
    else
        echo "$name: FAILED after $((SECONDS - start)) s"
        tail -n 25 "$out/$name.log"
        status=1
    fi
}

build() {
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/gankern" \
        -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
    cmake --build build/gpu
}

step build build
step warmup "$python" -m gankern.cli info --warmup --json
grep -h "ready in" "$out/warmup.log"
step test timeout 240 "$python" -m pytest -m gpu -q -p no:cacheprovider tests
tail -n 1 "$out/test.log"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer timeout 120 compute-sanitizer --error-exitcode 1 "$python" -m pytest -m gpu -q -x \
        -p no:cacheprovider tests/ops/test_weight_clip_gpu.py -k "cuda and bits"
fi
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')
for dtype in float32 bfloat16; do
    step "bench-$dtype" timeout 150 "$python" -m gankern.cli bench --device cuda --dtype "$dtype" --seconds 1 \
        --out "$out" --json "$out/$gpu-$dtype.json"
    cat "$out/bench-$dtype.log"
done
exit $status
