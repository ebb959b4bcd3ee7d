#!/usr/bin/env bash
# Behind half.sh: the run of all rows goes on with mend.yaml, lists with many keys, links and counts; RULER by task, of the
# base, of that run and of the mended one, and short questions. One GPU; run again, it goes on where it stopped.
#
#   TEXTS=/path/to/longdocs examples/extend_smollm2/mend.sh
#   LENGTH=2048 MEND_ROWS=12 STEPS=1 RULER="--lengths 2K --tasks fwe --rows 1" SHORT=2 examples/extend_smollm2/mend.sh   # rehearsal on a CPU
#
# OUT: that of half.sh. ONLY=data makes the rows alone, without a GPU. LENGTH, STEPS, MODEL as in run.sh; of data made before,
# OUT/data-mend/train.jsonl and run.yaml are read.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-python} LENGTH=${LENGTH:-65536} SP=1
OUT=${OUT:-runs/half_of_smollm2}
RULER=${RULER:---lengths 4K,16K,64K --rows 4 --batch_tokens 512K}
SHORT=${SHORT:-64}
longft() { "$PYTHON" -m ds_longft.cli "$@"; }

if [ ! -f "$OUT/data-mend/run.yaml" ]; then
  longft data mix examples/extend_smollm2/mend.yaml --root "$OUT/data-all/texts" --out "$OUT/data-mend" \
    --tokenizer "${MODEL:-$HOME/.cache/ds_longft/quickstart/SmolLM2-135M-Instruct}" --max_length_tokens "$LENGTH" \
    --total_rows "${MEND_ROWS:-600}"
fi
if [ "${ONLY:-all}" = data ]; then exit; fi
ONLY=train RUN="$OUT/mended" DATA="$OUT/data-mend" examples/extend_smollm2/run.sh \
  --data.pack_tokens $((LENGTH / 2)) --train.gradient_accumulation_steps 1 \
  --lora.init_from "$OUT/all" --optim.learning_rate 5e-4
longft eval ruler "$OUT/mended" $RULER
longft eval short "$OUT/mended" --texts "$SHORT"
$PYTHON - "$OUT" <<'PY'
import json, sys
from pathlib import Path

names = ("all/eval/{}-before", "all/eval/{}", "mended/eval/{}")
ruler, short = ([json.loads((Path(sys.argv[1]) / f"{n.format(kind)}.json").read_text()) for n in names] for kind in ("ruler", "short"))
for task in ruler[0]["by_length"]:
    print(f"{task:<16}", *(" ".join(f"{x:5.0f}" for x in one["by_length"][task].values()) for one in ruler), sep="  | ")
for one, asked, name in zip(ruler, short, ("before", "all", "mended"), strict=True):
    print(f"{name}: RULER {one['averages']}, {one['intervals']}; short questions {asked['right_percent']} %, loss {asked['loss']}")
PY
