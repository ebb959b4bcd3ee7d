#!/usr/bin/env bash
# Trains on this machine under torchrun, one rank for each GPU.   launch/local.sh --config run.yaml [--key value ...]
#   NPROC=4          so many ranks
# torchrun turns every failure into exit code 1; this script hands on the run's own (75: stopped and saved, start it again).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
ranks=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')}
folder=$(ds-longft config "$@" | python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["output_dir"])') || exit 64

code=0
torchrun --standalone --nproc-per-node "$((ranks > 0 ? ranks : 1))" launch/train.py "$@" || code=$?
if [ "$code" -ne 0 ] && [ -f "$folder/run_status.json" ]; then
  code=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"] or 1)' "$folder/run_status.json")
fi
exit "$code"
