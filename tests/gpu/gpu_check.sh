#!/usr/bin/env bash
# Run all checks that need a GPU, in about six minutes: bash tests/gpu/gpu_check.sh
# Every part has a time limit; a failed part does not stop the others. The last line is GPU_CHECK_JSON {...}; $OUT has the files.
#   SMALL=1: tiny sizes for a CPU. PY: the Python interpreter. TOTAL: seconds for all parts; parts beyond it are skipped.
#   ONLY="train runs": run only these parts. PARTS, WORK, OUT: folders for the results of parts, for runs, for the output.
#   A folder `whl` next to this script: packages to install first, for a machine without network access.
here=$(cd "$(dirname "$0")" && pwd)
export PARTS=${PARTS:-/tmp/gpu_parts} WORK=${WORK:-/tmp/gpu_work} OUT=${OUT:-/tmp/gpu_out}
export WANDB_MODE=disabled PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
PY=${PY:-python3}
end=$(($(date +%s) + ${TOTAL:-380}))
rm -rf "$PARTS" "$WORK"
mkdir -p "$PARTS" "$WORK" "$OUT"
if ls "$here"/whl/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$here"/whl/*.whl
  export PYTHONPATH=/tmp/site:$PYTHONPATH
fi
export PYTHONPATH=$PWD/src:$PWD:$PYTHONPATH

part() { # part NAME SECONDS [COMMAND ...]
  name=$1 limit=$2
  shift 2
  [ -n "$SMALL" ] && limit=$((10 * limit))
  [ -n "$ONLY" ] && [[ " $ONLY " != *" $name "* ]] && return
  left=$((end - $(date +%s)))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 8 ]; then
    echo '{"skipped": "no time"}' >"$PARTS/$name.json"
    return
  fi
  [ $# -eq 0 ] && set -- $PY "$here/gpu_check.py" "$name"
  begin=$(date +%s)
  UNTIL=$((begin + limit - 5)) timeout -k 5 "$limit" "$@" >"$PARTS/$name.log" 2>&1
  code=$?
  [ -s "$PARTS/$name.json" ] || printf '{"exit": %s, "limit": %s, "last": "%s"}' "$code" "$limit" \
    "$(tail -1 "$PARTS/$name.log" | LC_ALL=C tr -cd ' -~' | tr -d '"\\' | cut -c1-200)" >"$PARTS/$name.json"
  echo "-- $name: exit $code, $(($(date +%s) - begin)) s"
  [ $code -ne 0 ] && tail -3 "$PARTS/$name.log"
}

if [ -n "$SMALL" ]; then
  sizes="--batch-size 8 --steps 2 --image-size 32 --depth 1 --classes 250 --modes float32"
  loading="--batch-size 8 --steps 2 --image-size 32 --processes 0"
else
  sizes="" compiled="--modes bf16" loading="--steps 16 --processes 4 15"
fi
part machine 30
part pytest 60 $PY -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py tests/test_loading.py tests/test_cuda_double.py
part train 125 $PY -m cdc_mmpg benchmark $sizes --json "$PARTS/train.json"
part compiled 70 $PY -m cdc_mmpg benchmark $sizes --compile $compiled --rows fine_tuning.open_ended --json "$PARTS/compiled.json"
part clips 30
part runs 150
part syncs 40
part loading 50 $PY -m cdc_mmpg benchmark_loading $loading
grep "│" "$PARTS/loading.log"
part numerics 30
part profile 40
part deployment 30
$PY "$here/gpu_check.py" merge
