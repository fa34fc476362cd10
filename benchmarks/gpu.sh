#!/usr/bin/env bash
# Builds, checks and measures on a machine with a GPU, in one call of at most 9 minutes and with nothing fetched.
#
#   bash benchmarks/gpu.sh [FOLDER]              results go to FOLDER, $OUT or out/gpu: at most 8 files
#   bash benchmarks/gpu.sh --rehearse [FOLDER]   the same shell, limits and files without a GPU, on a few small pieces
#
# Parts run in the order of their worth. One that fails, hangs or is cut off loses nothing of the others; what each has
# written until then is kept. Exit 1 where a part failed. Needs python3 with torch, triton, CuPy and pytest. The extension
# is built in the background to see that it builds there; the parts on the GPU do without.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=
[ "${1:-}" = --rehearse ] && { rehearse=1; shift; }
out=$(realpath -m "${1:-${OUT:-out/gpu}}")
work=$(mktemp -d "${TMPDIR:-/tmp}/gankern-gpu.XXXXXX")
mkdir -p "$out" "$work/logs"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export GANKERN_CACHE_DIR=$work/cache TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
cores=$(nproc)
device=cuda
# Seconds: of everything, and of each part.
total=530 kill_after=10
declare -A limit=([compile]=60 [smoke]=100 [sanitize]=60 [test]=150 [bench]=70 [tune]=45)
if [ "$rehearse" ]; then
    # What the GPU machine has not is not there either; parts that need a GPU run what stands in for it.
    export GANKERN_REHEARSE=1 PYTHONPATH=$PWD/benchmarks/rehearsal:$PYTHONPATH
    device=cpu cores=2 kill_after=3 total=${REHEARSE_SECONDS:-$total}
    limit=([compile]=60 [smoke]=120 [sanitize]=60 [test]=120 [bench]=120 [tune]=60)
fi
for pair in ${LIMITS:-}; do limit[${pair%=*}]=${pair#*=}; done
status=0

# What there is by now, in the files that come back: $OUT takes 8.
pack() {
    local files
    for files in "$work"/*.json "$GANKERN_CACHE_DIR"/fastest-*.json; do
        [ -f "$files" ] && cp "$files" "$out/$(basename "$files")"
    done
    tar -C "$work" -czf "$out/.logs" logs && mv "$out/.logs" "$out/logs.tar.gz"
}

finish() {
    trap - EXIT INT TERM
    # Whatever still runs: timeout hands the signal on.
    jobs -p | xargs -r kill -TERM 2>/dev/null
    [ -n "${builder:-}" ] && kill -- "-$builder" 2>/dev/null
    pack
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT
trap 'status=130; finish' INT
trap 'status=143; finish' TERM

# part NAME COMMAND...: within the part's limit and what is left of everything, then packed.
part() {
    local name=$1 start=$SECONDS kind=${1%%-*} seconds
    shift
    seconds=${limit[$kind]}
    ((seconds > total - SECONDS)) && seconds=$((total - SECONDS))
    if ((seconds < 5)); then
        echo "$name: left out, no time"
        status=1
        return
    fi
    # Python takes SIGINT for Ctrl-C and keeps what it has; a shell in the background hands it on ignored. In the
    # background of this one, so that its traps run at once.
    timeout -s INT --kill-after="$kill_after" "$seconds" env --default-signal=INT "$@" >"$work/logs/$name.log" 2>&1 &
    wait $!
    local code=$?
    case $code in
    0) echo "$name: ok, $((SECONDS - start)) s" ;;
    124 | 137) echo "$name: CUT OFF after $((SECONDS - start)) s" ;;
    *) echo "$name: FAILED ($code) after $((SECONDS - start)) s" ;;
    esac
    if ((code)); then
        status=1
        tail -n 12 "$work/logs/$name.log"
    fi
    pack
}

build() {
    cmake -S . -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/built" \
        -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
        nice cmake --build "$work/build" -j $((cores > 6 ? cores - 4 : 1)) && ls -l "$work/built"
}

{
    nvidia-smi
    "$python" --version
    "$python" -c 'import gankern, json; print(json.dumps(gankern.info(), indent=1))'
} >"$work/logs/machine.log" 2>&1
if [ ! "$rehearse" ]; then
    export -f build
    export work python cores
    setsid bash -c build >"$work/logs/build.log" 2>&1 &
    builder=$!
fi

smoke=("$python" benchmarks/gpu_smoke.py --device "$device")
# pytest-benchmark warns beside xdist, which would be an error; pytest-timeout's option is unknown where it is not.
tests=("$python" -m pytest -q -p no:cacheprovider -p no:benchmark -o addopts=--import-mode=importlib
    -W ignore::pytest.PytestUnknownMarkWarning -W ignore::pytest.PytestConfigWarning
    -m gpu -rfE --durations=15 --junitxml="$work/logs/tests.xml")
bench=("$python" -m gankern.cli bench --device "$device" --seconds 0.7 --repeat 15 --out "$work/bench")
cases=(batch_norm_act.training conv_transpose2d_bn_act.training minibatch_discrimination.training
    gradient_penalty.residual gradient_penalty.conv rmsprop_clip.step critic_step.wgan-gp generator_step.dcgan)
tuned=(conv2d_act.training batch_norm_act.training minibatch_discrimination.training l1_distance.training)
variants=(eager channels_last graph capturable)
types=(float32 tf32 bfloat16)
sanitizer=(compute-sanitizer --error-exitcode 1) sanitized=(--backend cuda --dtype float32 --dtype tf32 --dtype bfloat16)
if [ "$rehearse" ]; then
    smoke+=(--only clip --backend triton --dtype float32)
    bench+=(--quick)
    cases=(clip_weights.step rmsprop_clip.step)
    types=(float32)
    sanitizer=(env) sanitized=()
    part test-collection "${tests[@]}" --collect-only tests
    tests+=(tests/test_capture.py)
    part compile "${smoke[@]}" --compile --only clip_weights --jobs 2
    smoke_types=(--dtype tf32)
else
    tests+=(tests)
    smoke_types=()
    part compile "${smoke[@]}" --compile --jobs "$cores"
fi
part smoke "${smoke[@]}" "${smoke_types[@]}" --json "$work/smoke.json" --jobs "$cores"
if command -v "${sanitizer[0]}" >/dev/null; then
    for tool in memcheck racecheck; do
        if [ "$rehearse" ]; then command=("${sanitizer[@]}"); else command=("${sanitizer[@]}" --tool "$tool"); fi
        part "sanitize-$tool" "${command[@]}" "${smoke[@]}" --jobs 1 "${sanitized[@]}"
    done
fi
if "$python" -c 'import xdist' 2>/dev/null; then
    part test "${tests[@]}" -n $((cores > 12 ? 12 : cores)) --dist worksteal
else
    part test "${tests[@]}"
fi
for type in "${types[@]}"; do
    part "bench-$type" "${bench[@]}" --dtype "$type" --json "$work/bench-$type.json" \
        --against "$(IFS=,; echo "${variants[*]}")" "${cases[@]}"
done
if [ ! "$rehearse" ]; then
    # By worth: TF32 is what convolutions of float32 run in where nobody asks for less.
    part tune-bfloat16 "$python" -m gankern.bench.tune bfloat16 "${tuned[@]}"
    part tune-tf32 "$python" -m gankern.bench.tune tf32 conv2d_act.training
    part tune-float32 "$python" -m gankern.bench.tune float32 "${tuned[@]}"
fi
exit "$status"
