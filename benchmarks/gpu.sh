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
    # Every op by every backend, on small shapes.
    step sanitizer timeout 150 compute-sanitizer --error-exitcode 1 "$python" -m pytest -m gpu -q -x \
        -p no:cacheprovider tests/ops/test_gpu_contract.py -k opcheck
fi
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')
for dtype in float32 bfloat16; do
    step "bench-$dtype" timeout 150 "$python" -m gankern.cli bench --device cuda --dtype "$dtype" --seconds 1 --tune \
        --out "$out" --json "$out/$dtype.json" --html "$out/$dtype.html"
    cat "$out/bench-$dtype.log"
done
step json "$python" - "$out" "$gpu" <<'EOF'
import sys
from pathlib import Path

from gankern.bench.results import Report

out, gpu = Path(sys.argv[1]), sys.argv[2]
report, *others = (Report.load(path) for path in sorted(out.glob("*float*.json")))
for other in others:
    report.cases += other.cases
report.save(out / f"{gpu}.json")
EOF
exit $status
