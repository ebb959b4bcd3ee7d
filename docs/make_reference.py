"""Writes docs/config.md from `RunConfig`, and the tables of other pages from the code and the results: `make docs`.

A test keeps them in step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.messages import describe, on_resume
from ds_longft.config.other_trainers import EXPLANATIONS, HOLDS_ANYWAY, KEYS_OF_OTHER_TOOLS
from ds_longft.config.proof import proofs
from ds_longft.config.run_config import RunConfig
from ds_longft.data.columns import EVERY_CHAT, EVERY_ROW, LAYOUTS
from ds_longft.tools.models import page as models_page

HEAD = """\
# Run config

Made from the code in `ds_longft/config` by `make docs`. The same keys stand in a YAML file, `mine.yaml` (nested),
on the command line (`--data.max_length_tokens 128K`) and in `ds-longft config --help`. The command line wins over the
file, the file over the defaults. Unknown keys are refused, and the nearest known one is named. 128K and 1M count tokens
(1024-based), `null` switches off.

On resume, another value of a key is *refused* (both values are named), compared *by content* (the rows, the weights
or the engine's settings it leads to), *applied* from the step on at which the run goes on (written down in
`changes.json`), equal to *rounding* (written down as well), or *free*: it decides nothing that is trained.
"""


COLUMNS_BEGIN, COLUMNS_END = "<!-- columns: written by make_reference.py -->", "<!-- end of columns -->"
PLANNED_BEGIN, PLANNED_END = "<!-- planned: written by make_reference.py -->", "<!-- end of planned -->"
KEYS_BEGIN, KEYS_END = "<!-- keys: written by make_reference.py -->", "<!-- end of keys -->"
ROOT = Path(__file__).resolve().parent.parent


TABLE = re.compile(r"(<!-- measured: `make docs` -->\n).*?(<!-- /measured -->)", re.DOTALL)
MODELS = re.compile(r"(<!-- models: `make docs` -->).*?(<!-- /models -->)", re.DOTALL)
MEASURED = (
    # what the row is called, and `what` of its line in benchmarks/results.jsonl; the newest of that name counts
    ("one sample of 131,072 tokens, 2 GPUs, sp 2", "step 131072 sp2 lora fa4 zero3"),
    (
        "one sample of 131,072 tokens, 2 GPUs, sp 2, 176 GiB of host memory",
        "step 131072 sp2 lora fa4 zero3, 176 GiB of host memory",
    ),
    ("8 documents of 16,384 tokens, 2 GPUs, sp 2", "step 8x16384 sp2 lora fa4 zero3"),
    (
        "8 documents of 16,384 tokens, 2 GPUs, sp 2, 176 GiB of host memory",
        "step 8x16384 sp2 lora fa4 zero3, 176 GiB of host memory",
    ),
    ("documents as long as LongAlign's, 131,072 tokens, 2 GPUs, sp 2", "step longalign 131072 sp2 lora fa4 zero3"),
    ("16 documents of 8,192 tokens, 2 GPUs, dp 2", "step 16x8192 dp2 lora fa4 zero3"),
    (
        "16 documents of 8,192 tokens, 2 GPUs, dp 2, 176 GiB of host memory",
        "step 16x8192 dp2 lora fa4 zero3, 176 GiB of host memory",
    ),
    ("one sample of 65,536 tokens, all weights, 2 GPUs, sp 2", "step 65536 sp2 full fa4 zero3"),
    (
        "one sample of 524,288 tokens, 2 GPUs, sp 2, 200 GiB of host memory",
        "step 524288 sp2 lora fa4 zero3, 200 GiB of host memory",
    ),
    (
        "one sample of 1,048,576 tokens, 4 layers, 2 GPUs, sp 2",
        "step 1048576 sp2 lora fa4 zero3, 4 layers",
    ),
    (
        "one sample of 2,097,152 tokens, 2 layers, 2 GPUs, sp 2",
        "step 2097152 sp2 lora fa4 zero3, 2 layers, 60 GiB of host memory",
    ),
    (
        "one sample of 131,072 tokens, gpt-oss-20B shapes, LoRA on experts too, 1 GPU",
        "step 131072 sp1 gpt-oss-20b lora on linears and experts fa4",
    ),
    (
        "one sample of 131,072 tokens, Qwen3-30B-A3B shapes, LoRA on experts too, 1 GPU, 48 GiB of host memory",
        "step 131072 sp1 qwen3-30b-a3b lora on linears and experts fa4, 48 GiB of host memory",
    ),
    ("a DPO pair of 2 x 131,072 tokens, 2 GPUs, sp 2", "dpo pair 2 x 131072 sp2 lora, live reference"),
    ("one sample of 131,072 tokens, 1 GPU, 88 GiB of host memory", "step 131072 sp1 lora fa4, 88 GiB of host memory"),
    (
        "one sample of 262,144 tokens, 1 GPU held to 24 GiB, base and activations in 96 GiB of host memory",
        "step 262144 sp1 lora fa4 zero3, base host, as on a GPU of 24 GiB, 96 GiB of host memory",
    ),
    ("one sample of 65,536 tokens, 1 GPU", "step 65536 sp1 lora fa4"),
    ("one sample of 65,536 tokens, 1 GPU, 88 GiB of host memory", "step 65536 sp1 lora fa4, 88 GiB of host memory"),
    ("4 documents of 16,384 tokens, 1 GPU", "step 4x16384 sp1 lora fa4"),
    ("8 documents of 8,192 tokens, 1 GPU", "step 8x8192 packs dp1"),
    ("one sample of 65,536 tokens, all weights of 8 layers, 1 GPU", "step 65536 sp1 full, 8 layers"),
)

MEASURED_SMALL = (
    (
        "Llama-8B, 262,144 tokens, bf16 base on the host, 1 GPU held to 24 GiB, 96 GiB of host memory",
        "step 262144 sp1 lora fa4 zero3, base host, as on a GPU of 24 GiB, 96 GiB of host memory",
    ),
    (
        "the same, base and attention outputs on the whole GPU",
        "step 262144 sp1 lora fa4 zero3, base resident, 96 GiB of host memory",
    ),
    (
        "Llama-8B, 294,912 tokens, nf4 base on the host, 1 GPU held to 23.5 GiB, 96 GiB of host memory",
        "step 294912 sp1 nf4 lora fa4 zero3, base host, as on a GPU of 24 GiB, 96 GiB of host memory",
    ),
    ("Llama-70B, 131,072 tokens, nf4, 1 GPU, 100 GiB of host memory", "step 131072 sp1 llama70b nf4 lora fa4 zero3"),
    (
        "Llama-70B, 131,072 tokens, bf16 base shared out, 2 GPUs, 100 GiB of host memory",
        "step 131072 sp2 llama70b lora fa4 zero3, base sharded",
    ),
    (
        "gpt-oss-20B, 524,288 tokens, MXFP4, LoRA on experts too, 1 GPU held to 79 GiB, 100 GiB of host memory",
        "step 524288 sp1 gpt-oss-20b mxfp4 lora on linears and experts fa4 zero3, as on a GPU of 79 GiB",
    ),
    (
        "4 layers of Llama-8B, 1,048,576 tokens, 1 GPU, 88 GiB of host memory",
        "step 1048576 sp1 lora fa4, 4 layers, kept tensors in host memory",
    ),
    (
        "the same, 8 GiB of host memory and a disk of 1.8 GB/s",
        "step 1048576 sp1 lora fa4, 4 layers, kept tensors on disk",
    ),
)


BESIDE_PLAN = (
    (
        "gpt-oss-20B shapes",
        "step 131072 sp1 gpt-oss-20b lora on linears and experts fa4",
        "floor gpt-oss-20b 131072 sp1 lora flash-attn-4",
    ),
    (
        "Qwen3-30B-A3B shapes, 48 GiB of host memory",
        "step 131072 sp1 qwen3-30b-a3b lora on linears and experts fa4, 48 GiB of host memory",
        "floor qwen3-30b-a3b 131072 sp1 lora flash-attn-4",
    ),
    (
        "Qwen3.5-like 8B, 24 of 32 layers gated deltas",
        "step 131072 sp1 hybrid8b lora fa4",
        "floor hybrid8b 131072 sp1 lora flash-attn-4",
    ),
    (
        "the same on two GPUs, sp 2, a piece of the backward pass in torch",
        "step 131072 sp2 hybrid8b lora fa4 zero3",
        "floor hybrid8b 131072 sp2 lora flash-attn-4",
    ),
    (
        "Nemotron-H-like 8B, 24 of 52 layers Mamba-2",
        "step 131072 sp1 mamba8b lora fa4",
        "floor mamba8b 131072 sp1 lora flash-attn-4",
    ),
)


def readme_page() -> str:
    """README.md with its table of measured steps made anew; no figure of it is typed by hand."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert TABLE.search(readme), "README.md has lost the marks around its table"
    assert MODELS.search(readme), "README.md has lost the marks around its sentence of models"
    readme = MODELS.sub(lambda marks: marks[1] + models_sentence() + marks[2], readme)
    return TABLE.sub(lambda marks: marks[1] + measured_table(MEASURED) + marks[2], readme)


def models_sentence() -> str:
    """How many model types are proved."""
    found = proofs()
    proved = [entry for entry in found["types"].values() if "proved" in entry]
    wrapped = sum("text" in entry for entry in proved)
    return (
        f"{len(proved)} types of transformers {found['versions']['transformers']} are proved equal to its own step "
        f"([docs/models.md](docs/models.md)), {wrapped} as the text model of a multimodal checkpoint, among them"
    )


def _results() -> dict[str, Any]:
    """The newest line of the result file of each name."""
    text = (ROOT / "benchmarks" / "results.jsonl").read_text(encoding="utf-8")
    return {line["what"]: line for line in map(json.loads, text.splitlines())}


def measured_table(steps: Sequence[tuple[str, str]]) -> str:
    """Steps of the result file with the peer beside them."""
    lines = _results()
    rows = ["| one optimizer step | time | tokens/s per GPU | peak memory | peer | code |", "|---|---|---|---|---|---|"]
    for name, what in steps:
        line = lines[what]
        peer = "not run"
        if line.get("peer_value"):
            peer = f"{line['peer_value']:.1f} s: {line['ratio']:.2f} times as fast"
        given = re.search(r"ds_configs/(\w+)_sp.json", line["command"])
        # left out: step.py takes zero3_sp.json, compare.py zero2_sp.json but for rows that say so
        third = "step.py" in line["command"] or any(word in what for word in ("zero3", "full", "dpo"))
        config = given[1] if given else "zero3" if third else "zero2"
        measured = (f"{line['value']:.1f} s", f"{line['tokens_per_s_per_gpu']:,.0f}", f"{line['peak_gib']:.0f} GiB")
        code = f"{line['commit']}, `{config}_sp.json`, {line['date']}"
        rows.append(f"| {' | '.join((name, *measured, peer, code))} |")
    return "\n".join(rows) + "\n"


def speed_page() -> str:
    """docs/speed.md with its table made anew: mixtures and hybrids as measured, as planned before, and their floor."""
    lines = _results()
    head = "| one sample of 131,072 tokens | time | planned | peak memory | planned | floor | share of the floor |"
    rows = [head, "|---" * 7 + "|"]
    for name, what, floor_of in BESIDE_PLAN:
        step, floor = lines[what], lines[floor_of]["value"]
        times = (f"{step['value']:.1f} s", f"{step['predicted_s']:.1f} s")
        peaks = (f"{step['peak_gib']:.0f} GiB", f"{step['predicted_peak_gib']:.0f} GiB")
        share = (f"{floor:.1f} s", f"{floor / step['value']:.2f}")
        rows.append(f"| {' | '.join((name, *times, *peaks, *share))} |")
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert TABLE.search(page), "docs/speed.md has lost the marks around its table"
    return TABLE.sub(lambda marks: marks[1] + "\n".join(rows) + "\n" + marks[2], page)


def config_page() -> str:
    """The whole text of docs/config.md."""
    return HEAD + _section(RunConfig, "", "The run")


def _section(model: type[BaseModel], prefix: str, title: str) -> str:
    """A table of the section's own keys, and the sections below it."""
    rows, below = [], []
    for name, field in model.model_fields.items():
        inner = _section_of(field)
        if inner is None:
            rows.append(_row(prefix + name, field))
            continue
        note = f"\n\n`{prefix}{name}`: {field.description}\n" if field.description else ""
        below.append(
            _section(inner, f"{prefix}{name}.", f"`{prefix}{name}`: {_one_line(inner.__doc__)}").rstrip() + note + "\n"
        )
    if model is not RunConfig and prefix == "data.":
        rows_of_source = [_row(f"{prefix}train[].{n}", f) for n, f in SourceConfig.model_fields.items()]
        below.append(_table(f"`data.train[]`, `data.eval[]`: {_one_line(SourceConfig.__doc__)}", rows_of_source))
    return _table(title, rows) + "".join(below)


def _table(title: str, rows: list[str]) -> str:
    return f"\n## {title}\n\n| key | default | expected | on resume | meaning |\n|---|---|---|---|---|\n" + "".join(
        rows
    )


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
    expected = describe(field.annotation, field.metadata)
    (mark,) = on_resume(field)
    return f"| `{key}` | {default} | {expected} | {mark.value} | {_one_line(field.description)} |\n"


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    branches = get_args(field.annotation) or (field.annotation,)
    models = [b for b in branches if isinstance(b, type) and b is not NoneType and issubclass(b, BaseModel)]
    return models[0] if models and get_args(field.annotation)[:1] != (SourceConfig,) else None


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def data_page() -> str:
    """The whole text of docs/data.md, its table of columns made from the list that rows are read by."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    before, rest = page.split(COLUMNS_BEGIN)
    rows = [
        f"| `{layout.format}` | {_code(layout.needs)} | {_code(layout.also)} |\n"
        for layout in LAYOUTS
        if (layout.format, layout.needs) != ("longalign", ("messages",))
    ]
    head = "\n| `format` | recognised by | read beside them |\n|---|---|---|\n"
    every = f"| every one | | {_code(EVERY_ROW)} |\n| every one but `text` | | {_code(EVERY_CHAT)} |\n"
    return before + COLUMNS_BEGIN + head + "".join(rows) + every + COLUMNS_END + rest.split(COLUMNS_END)[1]


GPUS = [("l40s", 4), ("a100-80", 8), ("h100-80", 1), ("h100-80", 4), ("h100-80", 8), ("h200", 8)]
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "Llama-3.1-70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "head_dim": 128,
    },
}  # fmt: skip
OF_ALL_SHAPES = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
LENGTH = 131072
SMALL_CARDS = [  # model, model.quantize, GPU, GPUs, host memory of the node in GiB
    *(("Llama-3.1-8B", form, "rtx4090", 1, host) for host in (0, 96) for form in ("", "nf4")),
    *(("Llama-3.1-8B", form, "rtx4090", 2, 96) for form in ("", "nf4")),
    ("Llama-3.1-8B", "nf4", "rtx5090", 1, 96),
    ("Llama-3.1-8B", "nf4", "rtxa6000", 1, 96),
    ("Llama-3.1-70B", "nf4", "rtxpro6000", 1, 120),
    ("Llama-3.1-70B", "nf4", "h100-80", 1, 120),
    ("Llama-3.1-70B", "nf4", "h200", 1, 120),
    ("Llama-3.1-70B", "", "h100-80", 2, 320),
]


def gpus_page() -> str:
    """The whole text of docs/gpus.md: what `ds-longft plan` says of common models and machines."""
    rows = [
        f"| {model} | {_machine(name, count)} | {_planned(model, name, count)} |\n"
        for model in SHAPES
        for name, count in GPUS
    ]
    return _with_plan("docs/gpus.md", "| model, LoRA | GPUs of one node | longest sample | 128K samples |", rows)


def small_cards_page() -> str:
    """The whole text of docs/small_cards.md: the same of quantised bases and host memory."""
    rows = [
        f"| {model} | {form or 'bf16'} | {_machine(name, count)} | {f'{host} GiB' if host else 'none'} "
        f"| {_planned(model, name, count, host, form)} |\n"
        for model, form, name, count, host in SMALL_CARDS
    ]
    head = "| model, LoRA | its base | GPUs | host memory for it | longest sample | 128K samples |"
    page = _with_plan("docs/small_cards.md", head, rows)
    return TABLE.sub(lambda marks: marks[1] + measured_table(MEASURED_SMALL) + marks[2], page)


def _with_plan(page: str, head: str, rows: list[str]) -> str:
    before, rest = (ROOT / page).read_text(encoding="utf-8").split(PLANNED_BEGIN)
    table = f"\n{head}\n{'|---' * (head.count('|') - 1)}|\n{''.join(rows)}"
    return before + PLANNED_BEGIN + table + PLANNED_END + rest.split(PLANNED_END)[1]


def _machine(name: str, count: int) -> str:
    card = name.upper().replace("-", " ").replace("RTX", "RTX ").replace("PRO", "PRO ")
    return f"{count} x {card}{' GB' if '-' in name else ''}"


def _planned(model: str, name: str, count: int, host_gib: int = 0, quantize: str = "") -> str:
    """Longest sample, and how fast the node trains samples of `LENGTH` tokens."""
    from transformers import LlamaConfig

    from ds_longft.decide.search import Question, fastest, longest_of_each
    from ds_longft.decide.setting import Gpu
    from ds_longft.model.facts import ModelFacts
    from ds_longft.tools.plan.fitting_kernels import with_fitting_kernels

    facts = ModelFacts.from_config(LlamaConfig(**{**OF_ALL_SHAPES, **SHAPES[model]}, attn_implementation="eager"))
    gpu = with_fitting_kernels(Gpu.load(name), facts, "", None)
    question = Question(facts, gpu, count, float(host_gib), quantize=quantize)
    longest = max((question.length(p.setting) for p in longest_of_each(question)), default=0)
    best = fastest(question, LENGTH) if longest >= LENGTH else None
    time = f"{best.time.tokens_per_s:,.0f} tokens/s, sp {best.setting.sp}" if best else "does not fit"
    return f"{longest // 1024:,}K | {time}" if longest else "does not fit | "


def migrating_page() -> str:
    """The whole text of docs/migrating.md, its table made from the names that `ds-longft migrate` reads."""
    page = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    theirs: dict[str, list[str]] = {}
    for name, ours in {**KEYS_OF_OTHER_TOOLS, **EXPLANATIONS}.items():
        if name in HOLDS_ANYWAY:  # a hint where it is given here; of another trainer's file nothing to carry over
            continue
        theirs.setdefault(f"`{ours}`" if name in KEYS_OF_OTHER_TOOLS else ours, []).append(name)
    rows = [f"| {_code(tuple(names))} | {ours} |\n" for ours, names in theirs.items()]
    held = _code(tuple(sorted(HOLDS_ANYWAY)))
    none = f"| {held} | nothing to set: it holds anyway, or changes nothing that is trained |\n"
    before, rest = page.split(KEYS_BEGIN)
    head = "\n| theirs | here |\n|---|---|\n"
    return before + KEYS_BEGIN + head + "".join(rows) + none + KEYS_END + rest.split(KEYS_END)[1]


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    (ROOT / "docs/config.md").write_text(config_page())
    (ROOT / "docs/data.md").write_text(data_page())
    (ROOT / "docs/models.md").write_text(models_page())
    (ROOT / "README.md").write_text(readme_page())
    (ROOT / "docs/speed.md").write_text(speed_page())
    (ROOT / "docs/migrating.md").write_text(migrating_page())
    (ROOT / "docs/gpus.md").write_text(gpus_page())
    (ROOT / "docs/small_cards.md").write_text(small_cards_page())
