#!/usr/bin/env bash
# Everything that needs a GPU, in parts of well under ten minutes each:
#
#     benchmarks/gpu_check.sh doctor | tests | soak | accuracy | bench | profile | cold | sanitize [TOOL] | peers | all
#
# doctor     the installation's self-test: begin here
# tests      the GPU tests, which write tests/gpu_report.json
# soak       10 000 calls over four threads (SWINCUPY_SOAK changes the number)
# accuracy   whole models against timm and transformers             -> benchmarks/accuracy.csv
# bench      models x batches x precisions, checked, then timed     -> benchmarks/bench.csv, .md
# profile    Swin-T and B, batch 1 and 32, call by call             -> benchmarks/profile-*.csv, .md
# cold       cold and warm start, sizes                             -> benchmarks/cold_start.csv
# sanitize   compute-sanitizer; a TOOL alone is memcheck, racecheck, initcheck or synccheck
# peers      PyTorch on the same GPU; again until nothing is left   -> benchmarks/peers.csv, .md, .png
#
# PYTHON names the interpreter (python3 where it is not set). OUT, where set, gets a copy of the results.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
limit() { timeout --signal INT --kill-after 20 "$@"; }

doctor() { limit 300 "$PYTHON" -m swincupy doctor; }
tests() {
    local code=0 spread=() # over processes where pytest-xdist is there
    "$PYTHON" -c 'import xdist' 2>/dev/null && spread=(-n "${WORKERS:-12}" --dist worksteal)
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 limit 560 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu -m 'not alone' "${spread[@]}" || code=1
    limit 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu -m alone || code=1
    return $code
}
soak() { SWINCUPY_SOAK=${SWINCUPY_SOAK:-10000} limit 570 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_engine.py -k soak; }
accuracy() { limit 570 "$PYTHON" benchmarks/accuracy.py; }
bench() {
    limit 570 "$PYTHON" -m swincupy bench --check --device cuda --precision fp16 bf16 tf32 fp32 --batch 1 8 32 64 128 \
        --model swin_tiny swin_small swin_base swin_large swinv2_tiny \
        swin_base_patch4_window12_384 swin_large_patch4_window12_384 \
        --csv benchmarks/bench.csv --markdown benchmarks/bench.md
}
profile() {
    local code=0
    for model in swin_tiny swin_base; do
        for batch in 1 32; do
            limit 140 "$PYTHON" -m swincupy bench --kernels --device cuda --model "$model" --batch "$batch" --precision fp16 \
                --csv "benchmarks/profile-$model-$batch.csv" --markdown "benchmarks/profile-$model-$batch.md" || code=1
        done
    done
    return $code
}
cold() { limit 300 "$PYTHON" benchmarks/cold_start.py --csv benchmarks/cold_start.csv; }
sanitize() { limit 580 benchmarks/sanitize.sh "$@"; }
peers() {
    limit 590 "$PYTHON" benchmarks/peers.py --csv benchmarks/peers.csv --markdown benchmarks/peers.md --seconds 450 || return 1
    "$PYTHON" benchmarks/plot.py benchmarks/peers.csv benchmarks/peers.png
}

results() {
    [ -n "${OUT:-}" ] || return 0
    tar -czf "$OUT/results.tar.gz" $(ls -d tests/gpu_report.json benchmarks/*.csv benchmarks/*.md benchmarks/*.png benchmarks/sanitize 2>/dev/null)
}

usage() { sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
[ $# -gt 0 ] || usage
part=$1
shift
case $part in
    doctor | tests | soak | accuracy | bench | profile | cold | sanitize | peers) parts=("$part") ;;
    all) parts=(doctor tests soak accuracy bench profile cold sanitize peers) ;;
    *) usage ;;
esac
code=0
for part in "${parts[@]}"; do
    echo "== $part"
    "$part" "$@" || { code=1; echo "FAILED: $part" >&2; }
done
results
exit $code
