#!/usr/bin/env bash
# One session on a GPU that is lent or rented, some ten minutes: whether training is right there, how
# fast it is, and a real run that is stopped and goes on.
#
#     bash bench/gpu_session.sh OUT                      trains on the texts of the demo
#     bash bench/gpu_session.sh OUT TOKENS TOKENIZER     on shards of your own
#     DEVICE=cpu bash bench/gpu_session.sh OUT           tries the session itself, with tiny shapes
#
# Each stage has a limit of time, and a stage that fails costs the others nothing. OUT gets a file a
# stage, and the metrics of the run.
set -u
OUT=${1:?"where to write: bash bench/gpu_session.sh OUT"}
OUT=$(mkdir -p "$OUT" && cd "$OUT" && pwd)
cd "$(dirname "$0")/.."
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH=. NANOPHI_TEST_DEVICE=$DEVICE

stage() { # name, seconds, command ...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$OUT/$name.txt" 2>&1
  echo "   exit $?, $(tail -1 "$OUT/$name.txt" | cut -c1-150)"
}

facts() {
  date
  nvidia-smi
  $PYTHON - <<'END'
import platform, torch
from nanophi.model.backends import flash_kernel
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
print("cudnn", torch.backends.cudnn.version(), "flash kernel", flash_kernel() is not None)
print("linear_cross_entropy", hasattr(torch.nn.functional, "linear_cross_entropy"))
END
}

run() { # tokens, tokenizer
  local tokens=$1 tokenizer=$2 size=(--preset phi2-chinese-0.2b --steps 120) seconds=45
  if [ -z "$tokens" ]; then
    tokens=$WORK/tokens tokenizer=$WORK/tokenizer
    $PYTHON train_tokenizer.py --input data/demo/documents.jsonl --out "$tokenizer" --vocab-size 2048
    $PYTHON -m nanophi.text.shards --input data/demo/documents.jsonl --tokenizer "$tokenizer" --out "$tokens"
    size+=(--batch-tokens 16384)
  fi
  [ "$DEVICE" = cpu ] && size=(--preset demo --steps 20 --batch-tokens 1024) seconds=12
  local command=(pretrain.py --data "$tokens" --tokenizer "$tokenizer" --out "$WORK/run"
    "${size[@]}" --eval-every 50 --device "$DEVICE" --sample 春天)
  $PYTHON "${command[@]}" &
  local trained=$!
  sleep "$seconds"
  kill -TERM $trained
  wait $trained
  echo "stopped by SIGTERM: exit $? (143; 0 where it was done)"
  $PYTHON "${command[@]}" --resume
  cp "$WORK/run/metrics.jsonl" "$OUT/"
  $PYTHON generate.py --model "$WORK/run" --prompt 春天 --max-new-tokens 32 --device "$DEVICE"
}

export -f facts run
export PYTHON DEVICE WORK OUT
stage facts 40 bash -c facts
stage right 120 $PYTHON -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/infer/test_static.py
stage speed 250 $PYTHON bench/gpu.py --device "$DEVICE" --minutes 3
stage run 170 bash -c "run '${2:-}' '${3:-}'"
