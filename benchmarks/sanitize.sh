#!/usr/bin/env bash
# compute-sanitizer over every operation's cases and a small forward pass in each precision.
#
#     benchmarks/sanitize.sh [memcheck|racecheck|initcheck|synccheck ...] [-- --precision fp16 ...]
#
# All four tools without arguments. One line each at the end; the exit code is 1 where one found anything.
# Logs lie in benchmarks/sanitize/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ "${1:-}" = -- ] && shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not on the PATH' >&2; exit 2; }

logs=benchmarks/sanitize
mkdir -p "$logs"
python=${PYTHON:-python3}
echo 'compiling first, so that the sanitizer does not wait for it'
"$python" benchmarks/sanitize.py forward "$@" >/dev/null || exit 1
"$python" benchmarks/sanitize.py ops "$@" >/dev/null || exit 1

code=0 summary=()
for tool in "${tools[@]}"; do
    options=(--tool "$tool" --error-exitcode 9 --target-processes all --print-limit 20)
    # cuda-bindings asks the driver for functions that it may not have: no fault of a kernel
    [ "$tool" = memcheck ] && options+=(--padding 64 --report-api-errors no)
    for what in forward ops; do
        log=$logs/$tool-$what.log
        began=$SECONDS
        if compute-sanitizer "${options[@]}" "$python" benchmarks/sanitize.py "$what" "$@" >"$log" 2>&1; then
            found=clean
        else
            found="FAILED, see $log" code=1
            tail -n 20 "$log"
        fi
        summary+=("$tool $what: $found ($((SECONDS - began)) s)")
        echo "${summary[-1]}"
    done
done
printf '%s\n' '' "${summary[@]}"
exit $code
