#!/usr/bin/env bash
# Builds gptc for this machine's GPU, checks it and measures it, in under eight minutes. Needs neither
# the network nor Python packages. With PyTorch, it compares the layers' errors with PyTorch's; with
# the packages that gptc needs too, also the speed of training.
#
#     tools/gpu/gpu_check.sh                      everything; the results are in gpu_check/
#     STAGES=correct tools/gpu/gpu_check.sh       some of: correct profile tune sanitize
#     REUSE=1 tools/gpu/gpu_check.sh              does not compile: what BUILD has is checked
#     OUT=/tmp/out tools/gpu/gpu_check.sh         the results are in /tmp/out
#     TEXT=book.txt tools/gpu/gpu_check.sh        text for the training comparison; default: the stories
#     LIMIT_S=1500 tools/gpu/gpu_check.sh         time limit in seconds; default: 470
#     EMULATE=1 tools/gpu/gpu_check.sh            no GPU: runs this script on emulated kernels
#
# A failed step does not stop the next one; the exit code is 1 if any failed. The results are
# gpu_check.md (the table, also printed), gpu_check.json and gpu_check.log; of some stages alone, their
# names are in the files' names. They are rewritten after each step, so that an interrupted run keeps
# its results.
#
# The CPU is only a reference here. It uses OpenBLAS if the Python package scipy-openblas32 is
# installed, else plain loops (-DGPTC_OPENBLAS=OFF). cuBLASLt comes from the toolkit, or from the
# Python package nvidia-cublas.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

EMULATE=${EMULATE:-0}
BUILD=${BUILD:-build/gpu_check}
OUT=${OUT:-gpu_check}
LIMIT_S=${LIMIT_S:-470} # for all steps together
ALL_STAGES="correct profile tune sanitize"
STAGES=${STAGES:-$ALL_STAGES}
REUSE=${REUSE:-0}
JOBS=$(nproc)
PYTHON=$(command -v python3 || true)

mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
base=gpu_check
[ "$STAGES" = "$ALL_STAGES" ] || base=gpu_check_${STAGES// /_}
results=$OUT/$base log=$OUT/$base.log
: >"$log"
rows=() steps=() failures=() n_failed=0
export PATH="$PATH:/usr/local/cuda/bin"

if [ -z "${TEXT:-}" ]; then
    TEXT=$work/text
    cat data/stories/*.txt docs/*.md >"$TEXT"
fi

# ---- steps ----

# report NAME STATE SECONDS DETAIL: adds a row to the table and an object to the JSON file. The
# step's output is in $work/NAME.json, whether JSON or not.
report() {
    local json=null detail
    detail=$(printf '%s' "$4" | tr -d '\000-\037' | tr '|\\"' "/ '")
    if [ -s "$work/$1.json" ] && [[ $(head -c1 "$work/$1.json")$(tail -c2 "$work/$1.json") == "{}"* ]]; then
        json=$(cat "$work/$1.json")
    fi
    rows+=("| $1 | $2 | $3 s | $detail |")
    steps+=("{\"name\": \"$1\", \"state\": \"$2\", \"seconds\": $3, \"detail\": \"$detail\", \"result\": $json}")
    printf '%-14s %-8s %4s s  %s\n' "$1" "$2" "$3" "$detail" >&2
    if [ "$2" = FAILED ]; then
        n_failed=$((n_failed + 1))
        if [ -e "$work/$1.err" ]; then
            failures+=("$1:"$'\n'"$(useful "$1" | sed 's/^/    /')")
            useful "$1" | sed 's/^/    /' >&2
        fi
    fi
    write_results
}

# The first lines of a step's output that look like an error; if there are none, the last lines.
useful() {
    local lines
    lines=$(cat "$work/$1.err" "$work/$1.json" 2>/dev/null | grep -a -E -m 10 \
        -e '(^|[^a-z_/])([Ee]rror|ERROR|[Ff]atal)[: ]' -e '\.(c|h|cu|cpp|py|cmake|txt):[0-9]+' \
        -e '\*\*\*Failed|Timeout|^SPILLS|"ok": false|^gpt_bench: ' -e 'Invalid|hazard|Uninitialized')
    [ -n "$lines" ] || lines=$(cat "$work/$1.json" "$work/$1.err" 2>/dev/null | tail -n 5)
    printf '%s\n' "$lines" | cut -c1-300
}

# step NAME SECONDS DESCRIBE COMMAND...: runs the command, for at most SECONDS and the time left.
# DESCRIBE NAME then prints the detail for the table.
step() {
    local name=$1 limit=$2 describe=$3 begin=$SECONDS state=ok rc left=$((LIMIT_S - SECONDS))
    shift 3
    if [ "$left" -lt 5 ]; then
        report "$name" FAILED 0 "no time was left"
        return 1
    fi
    [ "$limit" -le "$left" ] || limit=$left
    printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
    timeout -k 5 "$limit" "$@" >"$work/$name.json" 2>"$work/$name.err" </dev/null
    rc=$?
    cat "$work/$name.json" "$work/$name.err" >>"$log"
    local detail
    detail=$($describe "$name" 2>/dev/null | tr -s '\n' ' ' | sed 's/ $//')
    if [ $rc -ne 0 ]; then
        state=FAILED
        [ -n "$detail" ] || detail=$(useful "$name" | head -n1)
        if [ $rc -eq 124 ] || [ $rc -eq 137 ]; then
            detail="stopped after $limit s; $detail"
        else
            detail="exit code $rc; $detail"
        fi
    fi
    report "$name" $state $((SECONDS - begin)) "$detail"
    return $rc
}

skip() {
    report "$1" skipped 0 "$2"
}

# ---- details of the table, from a step's output ----

field() { # NAME FIELD: the first value of that field in the step's JSON
    sed -n -e "s/.*\"$2\": \"\([^\"]*\)\".*/\1/p" -e "s/.*\"$2\": \([^\",}]*\)[,}].*/\1/p" \
        "$work/$1.json" | head -n1
}
of_info() {
    local problem
    problem=$(field "$1" problem)
    [ -z "$problem" ] || { echo "$problem" && return; }
    echo "$(field "$1" gpu), compute capability $(field "$1" capability), cuBLASLt $(field "$1" products)"
}
of_build() {
    echo "$(grep -c 'Building .* object' "$work/$1.json") objects"
}
of_spills() { tail -n1 "$work/$1.json"; }
of_tests() { echo "$(grep -c ', 0 failed' "$work/$1.json") of ${#tests[@]} tests pass"; }
of_torch() {
    sed -n 's/.*"name": "\(torch[^"]*\)", "step_ms": \([^,]*\), "tokens_per_s": \([^,]*\),.*"ratio": \([^}]*\)}.*/\1 \2 ms, gptc is \4 x/p' \
        <(tr -d '\n' <"$work/$1.json" | sed 's/}/}\n/g; s/  */ /g') | paste -sd';' | sed 's/;/; /g'
}
of_parity() {
    echo "$(grep -c '"family".*"ok": true}' "$work/$1.json") of 6 curves within bounds: $(sed -n 's/.*"family": "\([^"]*\)", "dtype": "\([^"]*\)", "mean_difference": \([^,]*\), "allowed": \([^,]*\),.*/\1 \2 \3 of \4/p' "$work/$1.json" | paste -sd, | sed 's/,/, /g')"
}
of_repeat() { echo "$(grep -c '"repeats_bit_for_bit": true' "$work/parity.json") of 6 runs repeat bit for bit"; }
of_train() {
    echo "$(field "$1" tokens_per_s) tokens/s, $(field "$1" step_ms) ms a step, MFU $(field "$1" mfu)," \
        "$(field "$1" of_peak) of the measured $(field "$1" peak_tflops) TFLOP/s," \
        "$(($(field "$1" memory_bytes) / 1000000)) MB$(of_fallbacks "$1")"
}
# Products without their epilogue, or with an algorithm of an earlier architecture.
of_fallbacks() {
    local n
    n=$(field "$1" fallbacks)
    [ "${n:-0}" = 0 ] || echo ", $n PRODUCTS FALL BACK"
}
of_decode() {
    echo "$(field "$1" tokens_per_s) tokens/s, $(field "$1" step_ms) ms a step;" \
        "prompts of $(field "$1" prompt) $(field "$1" prompt_tokens_per_s) tokens/s"
}
of_layers() {
    echo "$(field "$1" within) of $(field "$1" of) results at most twice as far from float64 as PyTorch's in bf16;" \
        "the largest ratio is $(field "$1" worst_ratio): $(field "$1" worst)"
}
of_sanitizer() { grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$work/$1".* | tail -n1 | tr -d '='; }

# ---- tools and libraries ----

# The folder of cuBLASLt in the Python package, if the dynamic linker does not know the library.
find_cublas() {
    ldconfig -p 2>/dev/null | grep -q libcublasLt && return
    [ -n "$PYTHON" ] || return
    "$PYTHON" - <<'END'
from pathlib import Path
try:
    import nvidia
    print(next(str(f.parent) for p in nvidia.__path__ for f in Path(p).glob("*/lib/libcublasLt.so.*")))
except (ImportError, StopIteration):
    pass
END
}
cublas=$(find_cublas)
[ -z "$cublas" ] || export LD_LIBRARY_PATH="$cublas${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# The CMake that has made the folder: another would compile everything again.
cmake=$(sed -n 's/^CMAKE_COMMAND:INTERNAL=//p' "$BUILD/CMakeCache.txt" 2>/dev/null)
[ -x "$cmake" ] || cmake=cmake
configure=("$cmake" -S . -B "$BUILD" -DGPTC_TESTS=ON)
[ -z "$PYTHON" ] || configure+=("-DPython_EXECUTABLE=$PYTHON")
command -v ninja >/dev/null && configure+=(-G Ninja)
[ -n "$PYTHON" ] && "$PYTHON" -c 'import scipy_openblas32' 2>/dev/null || configure+=(-DGPTC_OPENBLAS=OFF)
names=(adamw attention attention_int8 context draws dropout embedding linear classifier muon norm quant blocks packed lora adapters dora experts rope sgd model session device)
if [ "$EMULATE" = 1 ]; then
    configure+=(-DGPTC_CUDA=OFF -DGPTC_EMULATE_CUDA=ON)
    [ -e "$BUILD/CMakeCache.txt" ] || configure+=(-DGPTC_CPU_LEVEL=portable)
    prefix=emulated_ bench=$BUILD/tests/cuda/emulated_gpt_bench layers=$BUILD/tests/cuda/emulated_layers
    names=(adamw device) clean=() # short ones: ctest runs all of them
else
    # From scratch, to have the compiler's report of every file.
    configure+=(-DGPTC_CUDA=ON -DGPTC_PTXAS_INFO=ON) clean=(--clean-first)
    prefix='' bench=$BUILD/gpt_bench layers=$BUILD/layers
fi
tests=("${names[@]/#/${prefix}test_}")

# An error in one file or test must not stop the others.
on=(-- -k)
[[ " ${configure[*]} " != *" Ninja "* ]] || on=(-- -k 0)
build() {
    "${configure[@]}" &&
        "$cmake" --build "$BUILD" -j "$JOBS" "${clean[@]}" --target "${prefix}gpt_bench" "${on[@]}"
}
build_tests() {
    "$cmake" --build "$BUILD" -j "$JOBS" --target "${prefix}layers" "${tests[@]}" "${on[@]}"
}

# ---- the results, after each step ----

gpu_name() { field info gpu 2>/dev/null; }
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n1)
nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
write_results() {
    local title name
    name=$(gpu_name)
    title="GPU check: ${name:-no GPU}"
    [ "$EMULATE" != 1 ] || title="Emulated on the host: these are not figures of a GPU"
    {
        printf '# %s\n\n' "$title"
        printf 'commit %s, %s, driver %s, nvcc %s, %s cores\n\n' "$commit" "$(date -u +%F)" "${driver:-none}" "${nvcc:-none}" "$JOBS"
        printf '| step | state | time | result |\n| --- | --- | --- | --- |\n'
        printf '%s\n' "${rows[@]}"
        printf '\n%s of %s steps failed, in %s s\n' "$n_failed" "${#rows[@]}" "$SECONDS"
        [ "$n_failed" = 0 ] || printf '\n%s\n' "${failures[@]}"
    } >"$results.md"
    {
        printf '{"title": "%s", "commit": "%s", "date": "%s", "driver": "%s", "nvcc": "%s", "emulated": %s,\n"failed": %s, "seconds": %s, "steps": [\n' \
            "$title" "$commit" "$(date -u +%FT%TZ)" "${driver:-none}" "${nvcc:-none}" "$([ "$EMULATE" = 1 ] && echo true || echo false)" "$n_failed" "$SECONDS"
        (IFS=, && printf '%s' "${steps[*]/#/$'\n'}")
        printf ']}\n'
    } >"$results.json"
}

# ---- the work ----

export GPTC_TEST_TABLES=cuda
for what in build build_tests; do
    printf '%s\n' "cd '$PWD'" "$(declare -p cmake configure clean on BUILD JOBS prefix tests)" "$(declare -f $what)" $what >"$work/$what.sh"
done

has() { [[ " $STAGES " == *" $1 "* ]]; }
needs() { [ -n "$PYTHON" ] && "$PYTHON" -c "import importlib.util as i; 1 / all(map(i.find_spec, '$*'.split()))" 2>/dev/null; }

# The tests one after the other: each wants the GPU, and one wants all of its memory.
run_tests() {
    local test failed=0
    for test in "${tests[@]}"; do
        "$folder/$test" || failed=1
    done
    return $failed
}

correct() {
    if [ "$EMULATE" = 1 ]; then
        sizes=(--steps 5 --batch 2 --seq 16 --width 32 --layers 1)
        skip spills "an emulation has no ptxas"
    else
        sizes=(--steps 100 --batch 8 --seq 128 --width 256 --layers 4)
        if [ "$REUSE" = 1 ]; then
            skip spills "nothing was compiled"
        elif [ -n "$PYTHON" ]; then
            cp "$work/build.json" "$work/build.log"
            step spills 20 of_spills "$PYTHON" tools/gpu/check_spills.py "$work/build.log"
        else
            skip spills "python3 is missing"
        fi
    fi
    step parity 120 of_parity "$bench" parity --text "$TEXT" "${sizes[@]}"
    step repeat 10 of_repeat bash -c \
        "[ \$(grep -c '\"repeats_bit_for_bit\": true' '$work/parity.json') = 6 ]"
    [ "$REUSE" = 1 ] || step build_tests 120 of_build bash "$work/build_tests.sh"
    if ! needs torch; then
        skip layers "PyTorch is missing, to compare the layers' errors with"
    else
        step layers 60 of_layers bash -c \
            "GPTC_TEST_TABLES='cuda bf16' '$layers' '$work/layers.bin' && '$PYTHON' tests/cuda/layers.py '$work/layers.bin'"
    fi
    printf '%s\n' "$(declare -p tests folder)" "$(declare -f run_tests)" run_tests >"$work/tests.sh"
    step tests 150 of_tests bash "$work/tests.sh"
}

# Each buffer of these tests is an allocation, so that memcheck sees what is read past one. racecheck
# and initcheck run every kernel of each family, at sizes that are not multiples of tiles; the third
# step replays a graph. The libraries' kernels are excluded: they take long, and racecheck reports
# their synchronisation as races.
sanitize() {
    local why_not="" test
    local ours=(--kernel-name-exclude kns=cublas,kns=cutlass,kns=nvjet,kns=gemm,kns=xmma)
    if [ "$EMULATE" = 1 ]; then
        why_not="compute-sanitizer needs a GPU"
    elif ! command -v compute-sanitizer >/dev/null; then
        why_not="compute-sanitizer is not installed"
    elif timeout 60 compute-sanitizer "$bench" info 2>&1 | grep 'not supported' >>"$log"; then
        why_not="compute-sanitizer reports that it does not work on this machine" # as in some sandboxes
    fi
    for test in attention norm classifier embedding linear; do
        if [ -n "$why_not" ]; then
            skip "memcheck_$test" "$why_not"
        else
            step "memcheck_$test" 60 of_sanitizer compute-sanitizer --tool memcheck --error-exitcode 9 \
                "${ours[@]}" "$folder/test_$test"
        fi
    done
    for tool in racecheck initcheck; do
        if [ -n "$why_not" ]; then
            skip $tool "$why_not"
        else
            step $tool 75 of_sanitizer compute-sanitizer --tool $tool --error-exitcode 9 "${ours[@]}" \
                "$bench" parity --text "$TEXT" --steps 3 --batch 2 --seq 67 --width 256 --layers 1
        fi
    done
}

profile() {
    if [ "$EMULATE" = 1 ]; then
        step train_fp32 60 of_train "$bench" train --preset tiny --dtype fp32 --batch 1 --seq 8 --steps 1 --warmup 1
        step decode_1 60 of_decode "$bench" decode --preset tiny --tokens 1 --prompt 2 --batch 1 --warmup 1
        skip torch_gpt2 "PyTorch is compared with a GPU"
        return
    fi
    step gpt2_bf16 60 of_train "$bench" train --preset gpt2 --batch 64 --seq 1024 --ops 1
    step byte_bf16 60 of_train "$bench" train --preset byte --batch 64 --seq 1024 --ops 1
    if needs torch cffi numpy xxhash click; then
        # The vocabulary is padded, as PyTorch wants it to be fast.
        step torch_gpt2 120 of_torch env GPTC_LIBRARY="$library" PYTHONPATH="python:${PYTHONPATH:-}" \
            "$PYTHON" -m gptc bench train --device cuda --dtype bf16 --vocab-size 50304 \
            --batch-size 64 --seq-len 1024 --against torch-bf16 --steps 10 --turns 3 --json
    else
        skip torch_gpt2 "PyTorch or a package of gptc's is missing"
    fi
    for dtype in bf16 int8 int4; do
        step decode_1_$dtype 30 of_decode "$bench" decode --preset gpt2 --dtype $dtype --batch 1 --prompt 512
        step decode_64_$dtype 30 of_decode "$bench" decode --preset gpt2 --dtype $dtype --batch 64 --prompt 512
    done
    step gpt2_fp32 60 of_train "$bench" train --preset gpt2 --dtype fp32 --batch 8 --seq 1024 --steps 10
    step gpt2_tf32 60 of_train env GPTC_TF32=1 \
        "$bench" train --preset gpt2 --dtype fp32 --batch 8 --seq 1024 --steps 10
}

tune() {
    if [ "$EMULATE" = 1 ]; then
        skip gpt2_tuned "an emulation has no cuBLASLt"
    else
        # The second run measures nothing: its plans are those that the first has kept.
        for run in gpt2_tuned gpt2_tuned_again; do
            step $run 60 of_train env GPTC_TUNE=1 GPTC_PLANS="$OUT/plans" \
                "$bench" train --preset gpt2 --batch 64 --seq 1024 --ops 1
        done
    fi
}

folder=$(dirname "$layers") library=$(cd "$BUILD" 2>/dev/null && pwd)/libgpt.so
if [ "$REUSE" != 1 ]; then
    # Do not measure binaries of an earlier build.
    rm -f "$bench" "$layers" "${tests[@]/#/$folder/}"
    step build 200 of_build bash "$work/build.sh"
    library=$(cd "$BUILD" 2>/dev/null && pwd)/libgpt.so
fi
if [ -x "$bench" ]; then
    step info 30 of_info "$bench" info
    for stage in $ALL_STAGES; do
        ! has $stage || $stage
    done
fi

cat "$results.md"
[ "$n_failed" = 0 ]
