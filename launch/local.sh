#!/usr/bin/env bash
# Trains on this machine, one rank for each GPU.   launch/local.sh run.yaml [--key value ...]
#   NPROC=4          so many ranks
# Signals reach the ranks, and the run's own exit code is handed on (75: stopped and saved, start it again).
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$clone/.venv/bin:$PATH" PYTHONPATH="$clone${PYTHONPATH:+:$PYTHONPATH}"
exec python -m ds_longft.ranks.launch --ranks "${NPROC:-all}" "$@"
