#!/usr/bin/env bash
# compute-sanitizer over every operation's cases and a small forward pass in each precision.
#
#     benchmarks/sanitize.sh [memcheck|racecheck|initcheck|synccheck ...] [-- fp16 ...]
#
# All four tools and precisions without arguments, JOBS runs (8) at a time on one GPU. A line for each run as
# it ends; the exit code is 1 where one found anything. Logs lie in benchmarks/sanitize/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ "${1:-}" = -- ] && shift
precisions=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
[ ${#precisions[@]} -gt 0 ] || precisions=(fp16 bf16 tf32 fp32)
command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not on the PATH' >&2; exit 2; }

export LOGS=benchmarks/sanitize PYTHON=${PYTHON:-python3} OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
mkdir -p "$LOGS"

compile() { # so that the sanitizer does not wait for it
    local products log=$LOGS/plain-$2-$1.log
    for products in '' --own-products; do
        "$PYTHON" benchmarks/sanitize.py "$2" $products --precision "$1" >"$log" 2>&1 && continue
        echo "without a sanitizer, $2 in $1 FAILED"
        tail -n 5 "$log"
        exit 255
    done
}
check() {
    local tool=$1 precision=$2 what=$3 log=$LOGS/$1-$3-$2.log began=$SECONDS found=clean code=0
    local options=(--tool "$tool" --error-exitcode 9 --target-processes all --print-limit 20) products=()
    # cuda-bindings asks the driver for functions that it may not have: no fault of a kernel
    [ "$tool" = memcheck ] && options+=(--padding 64 --report-api-errors no)
    [[ $tool = racecheck || $tool = initcheck ]] && products=(--own-products) # sanitize.py says why
    compute-sanitizer "${options[@]}" "$PYTHON" benchmarks/sanitize.py "$what" "${products[@]}" --precision "$precision" >"$log" 2>&1 ||
        code=1 found="FAILED, see $log: $(grep -m1 -E '^=+ (Error|Invalid|Uninit|Race|Barrier|ERROR|Host)' "$log" || tail -n1 "$log")"
    echo "$tool $what $precision: $found ($((SECONDS - began)) s)"
    return $code
}
export -f compile check

at_once() { xargs -P "${JOBS:-8}" -n "$1" bash -c "$2 \"\$@\"" -; }
for precision in "${precisions[@]}"; do echo "$precision ops $precision forward"; done | at_once 2 compile || exit 1
for tool in "${tools[@]}"; do
    for precision in "${precisions[@]}"; do
        echo "$tool $precision ops $tool $precision forward"
    done
done | at_once 3 check
