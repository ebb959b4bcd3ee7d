#!/usr/bin/env bash
# Do half of the tokens, chosen by what context gains on them, train as well as all of them? Three runs of the recipe: all
# rows, of each source the half that `ds-longft data score` puts first (read by the model that all rows made), and a half that
# is drawn; RULER and short questions of each and of the base. One GPU; run again, it goes on where it stopped.
#
#   TEXTS=/path/to/longdocs examples/extend_smollm2/half.sh
#   LENGTH=2048 ROWS=60 STEPS=1 RULER="--lengths 2K --tasks fwe --rows 1" SHORT=2 examples/extend_smollm2/half.sh   # rehearsal on a CPU
#
# PARALLEL=1 does side by side what need not wait: models so small leave most of a GPU idle.
# OUT: where all of it goes. LENGTH, ROWS, STEPS, TEXTS, MODEL as in run.sh. Of data made before (ONLY=data of run.sh),
# OUT/data-all/train.jsonl and run.yaml are read.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-python} LENGTH=${LENGTH:-65536} ROWS=${ROWS:-1000} SP=1
OUT=${OUT:-runs/half_of_smollm2}
RULER=${RULER:---lengths 4K,16K,64K --rows 4 --batch_tokens 512K}
SHORT=${SHORT:-64}
longft() { "$PYTHON" -m ds_longft.cli "$@"; }
jobs=()
go() { if [ "${PARALLEL:-0}" = 0 ]; then "$@"; else "$@" & jobs+=($!); fi; }
all_done() { for job in "${jobs[@]}"; do wait "$job"; done; jobs=(); }
# One pack of half the length a step, where run.sh takes two of a quarter: steps of a model so small wait for the host.
train() {
  ONLY=train RUN="$OUT/$1" DATA="$OUT/data-$1" examples/extend_smollm2/run.sh \
    --data.pack_tokens $((LENGTH / 2)) --train.gradient_accumulation_steps 1
}
evaluate() { # evaluate RUN [--before]
  longft eval ruler "$OUT/$1" $RULER "${@:2}"
  longft eval short "$OUT/$1" --texts "$SHORT" "${@:2}"
}

ONLY=data DATA="$OUT/data-all" examples/extend_smollm2/run.sh
train all
go evaluate all --before
go evaluate all
longft data score "$OUT/all" "$OUT/data-all/train.jsonl" "$OUT/scored.jsonl" --short $((LENGTH / 16)) --length "$LENGTH"
$PYTHON - "$OUT" <<'PY'
import json, random, sys
from pathlib import Path

out = Path(sys.argv[1])
scored = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
for name, rows in (("scored", scored), ("drawn", random.Random(0).sample(scored, len(scored)))):
    kept = []
    for source in {row["source"]: None for row in scored}:  # half of each, as `data mix` with choose: context_gain
        of_it = [row for row in rows if row["source"] == source]
        half, tokens = sum(row["tokens"] for row in of_it) / 2, 0
        while tokens < half:
            kept.append(of_it.pop(0))
            tokens += kept[-1]["tokens"]
    (out / f"data-{name}").mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in random.Random(1).sample(kept, len(kept))]
    (out / f"data-{name}" / "train.jsonl").write_text("".join(lines))
    print(f"{name}: {len(kept)} of {len(scored)} rows, {sum(row['tokens'] for row in kept):,} tokens")
PY
go train scored
go train drawn
all_done
go evaluate scored
go evaluate drawn
all_done
$PYTHON - "$OUT" <<'PY'
import json, sys
from pathlib import Path

for run, before in (("all", "-before"), ("all", ""), ("scored", ""), ("drawn", "")):
    ruler, short = (json.loads((Path(sys.argv[1]) / run / "eval" / f"{name}{before}.json").read_text()) for name in ("ruler", "short"))
    means = ", ".join(f"{n}: {mean:.1f} {ruler['intervals'][n]}" for n, mean in ruler["averages"].items())
    print(f"{run + before}: RULER {means}; short questions {short['right_percent']} %, loss {short['loss']}")
PY
