#!/usr/bin/env bash
# Makes .venv with ds-longft and deepspeed in it.  launch/setup.sh [EXTRAS]   (default: dev,demo)
#   PYTHON=...  the interpreter to use (3.11 or newer)
# Without a GPU the CPU build of torch is named in the same pip command: a range alone would take gigabytes of CUDA.
# With a GPU an installed torch >= 2.11 is kept, because it fits the driver.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-dev,demo}
venv=.venv

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_torch() {
  "$1" -c 'import sys; from importlib.metadata import version; v = version("torch").split(".")
sys.exit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null
}

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ] || ! is_new_enough "$python"; then
  echo "setup: Python 3.11 or newer is needed, seen $(python3 --version 2>&1): install one, or set PYTHON=/path/to/python" >&2
  exit 1
fi

torch=()
if ! has_gpu; then
  echo "setup: no GPU seen, installing the CPU build of torch"
  torch=(torch==2.13.0)
  [ -x $venv/bin/python ] || "$python" -m venv $venv
elif has_torch "$python"; then
  echo "setup: GPU seen, keeping the installed torch"
  [ -x $venv/bin/python ] || "$python" -m venv --system-site-packages $venv
else
  echo "setup: GPU seen, no torch >= 2.11 in $python: installing one"
  [ -x $venv/bin/python ] || "$python" -m venv $venv
fi

echo "setup: installing into $venv, 3 to 6 minutes"
# setuptools warns at length of every editable install.
PYTHONWARNINGS=ignore $venv/bin/python -m pip install --quiet --disable-pip-version-check "${torch[@]}" -e ".[$extras]"
# A deepspeed found outside the venv satisfies pip, but leaves no launcher inside it.
if [ ! -x $venv/bin/deepspeed ]; then
  wanted=$($venv/bin/python -c 'from importlib.metadata import version; print(version("deepspeed"))')
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --ignore-installed --no-deps "deepspeed==$wanted"
fi
# Tests read its chat templates and rules; what it needs to run would not fit beside ours.
if [[ ,$extras, == *,dev,* ]] && [ ! -d $venv/peers/axolotl ]; then
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $venv/peers axolotl==0.19.0
fi
# Likewise, left packed: of lm-eval only the files of RULER and LongProc are read.
if [[ ,$extras, == *,dev,* ]] && ! compgen -G "$venv/peers/lm_eval-*.whl" >/dev/null; then
  $venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $venv/peers lm-eval==0.4.13
fi
touch $venv/.installed
echo "setup: done. $venv/bin/ds-longft --help, or: source $venv/bin/activate"
