"""The plan against measurement, setting by setting, on the GPUs of this machine, and the working set per token.

    python benchmarks/length.py --gpu h200 --append benchmarks/results.jsonl     every setting that these GPUs can run
    python benchmarks/length.py --gpu h200 --only 1M                             those whose name holds "1M"
    python benchmarks/length.py --again benchmarks/results.jsonl                 today's plan against steps timed before
    python benchmarks/length.py --gpus 8 --only sp8 --steps 3                    a million tokens on eight GPUs
    python benchmarks/length.py --tiny                                           a rehearsal on CPU ranks

Each setting is one start of benchmarks/step.py, so that one that runs out of memory costs only itself. Settings with
`calibrating` were used to make the shipped H200 rates and count in no error. Prints a table; with --append one line a
setting, and "plan peak error max", "plan time error max" (fractions over the others), "working set kib per token sp2",
"longest tokens".
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import append, lengths_of, shape_of, start

K = 1024


@dataclass(frozen=True)
class Case:
    """One setting, as step.py's arguments."""

    name: str
    documents: str  # as step.py takes them
    gpus: int = 2
    sp: int | None = None  # None: all GPUs share a sample
    shape: str = "llama8b"
    recompute: str = "auto"
    stage: int = 2
    full: bool = False
    host_gib: float = 0.0
    tile: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    kernel: str = "flash-attn-4"
    reference: str = "none"  # of pairs, as dpo.reference; none: supervised
    passes: str = "one"
    calibrating: bool = False

    def arguments(self) -> list[str]:
        """step.py's command line."""
        config = {2: "ds_configs/zero2_sp.json", 3: "ds_configs/zero3_sp.json"}[self.stage]
        words = ["--shape", self.shape, "--documents", self.documents, "--ds_config", config]
        words += ["--recompute", self.recompute, "--host_gib", str(self.host_gib), "--kernel", self.kernel]
        words += ["--sp", str(self.sp)] if self.sp else []
        words += ["--full"] * self.full + ["--no_rehearsal"] * (self.recompute != "auto")
        if self.reference != "none":
            words += ["--objective", "dpo", "--reference", self.reference, "--passes", self.passes]
        for flag, value in (("--tile", self.tile), ("--kv_heads", self.kv_heads), ("--layers", self.layers)):
            words += [flag, str(value)] if value is not None else []
        return words


CASES = (
    Case("128K sp2", f"{128 * K}", calibrating=True),
    Case("16K sp1", f"{16 * K}", gpus=1),
    Case("64K sp1", f"{64 * K}", gpus=1),
    Case("64K sp1 sqrt", f"{64 * K}", gpus=1, recompute="sqrt"),
    Case("32K sp2", f"{32 * K}"),
    Case("64K sp2 zero3", f"{64 * K}", stage=3),
    Case("128K sp2 cudnn", f"{128 * K}", kernel="cudnn"),
    Case("128K sp2 full recompute", f"{128 * K}", recompute="full"),
    Case("128K sp2 host", f"{128 * K}", host_gib=180),
    Case("128K sp2 tiles, turns", f"{128 * K}", recompute="keep_attention", tile=8 * K, kv_heads=1),
    Case("128K sp2 full recompute, tiles, turns", f"{128 * K}", recompute="full", tile=8 * K, kv_heads=1),
    Case("8 x 16K sp2", f"{16 * K}x8"),
    Case("32 x 4K sp2", f"{4 * K}x32"),
    Case("256K sp2 host", f"{256 * K}", host_gib=180),
    Case("128K sp2 qwen7b", f"{128 * K}", shape="qwen7b"),
    Case("64K sp1 qwen7b full recompute", f"{64 * K}", gpus=1, shape="qwen7b", recompute="full"),
    Case("32K sp2 all weights, 16 layers", f"{32 * K}", stage=3, full=True, recompute="full", layers=16),
    Case("128K sp1 full recompute, tiles, turns", f"{128 * K}", gpus=1, recompute="full", tile=8 * K, kv_heads=1),
    Case("8 x 64K sp1 host", f"{64 * K}x8", gpus=1, recompute="keep_attention", host_gib=100, tile=8 * K, kv_heads=1),
    Case("512K sp1 4 layers", f"{512 * K}", gpus=1, recompute="full", tile=8 * K, kv_heads=1, layers=4),
    Case("512K sp1 host", f"{512 * K}", gpus=1, recompute="keep_attention", host_gib=100, tile=8 * K, kv_heads=1),
    Case("pair 2 x 64K sp2 one pass", f"{64 * K}x2", reference="adapter_off"),
    Case("pair 2 x 64K sp2 two passes", f"{64 * K}x2", reference="adapter_off", passes="two"),
    Case("pair 2 x 128K sp2 auto", f"{128 * K}x2", reference="adapter_off", passes="auto"),
    Case("4 pairs 2 x 16K sp2 precomputed", f"{16 * K}x8", reference="precomputed"),
    Case(
        "pair 2 x 16K sp2 all weights, 16 layers",
        f"{16 * K}x2",
        stage=3,
        full=True,
        recompute="full",
        layers=16,
        reference="model",
    ),
    Case("1M sp2 host", f"{1024 * K}", recompute="full", host_gib=230, tile=8 * K, kv_heads=1),
    Case("2M sp2 4 layers", f"{2048 * K}", recompute="full", host_gib=60, tile=8 * K, kv_heads=1, layers=4),
    Case("128K sp2 all weights qwen3-8b", f"{128 * K}", shape="qwen3-8b", stage=3, full=True, host_gib=200),
    Case("1M sp8 all weights qwen3-8b", f"{1024 * K}", gpus=8, shape="qwen3-8b", stage=3, full=True),
    Case("1M sp8 qwen3-8b", f"{1024 * K}", gpus=8, shape="qwen3-8b", stage=3),
    Case("1M sp8 qwen3-30b-a3b", f"{1024 * K}", gpus=8, shape="qwen3-30b-a3b", stage=3),
    Case("2M sp8 all weights qwen3-8b", f"{2048 * K}", gpus=8, shape="qwen3-8b", stage=3, full=True, host_gib=400),
)

MADE_RATES = ("step 131072 sp2 lora fa4", "step smollm2 131072 sp1 full fa4")
"""Steps that the shipped H200 rates and `decide.time` were made with; they count in no error."""

TINY = (
    Case("tiny sp2", "256", shape="tiny", kernel="cpu"),
    Case("tiny sp1 tiles", "128,64", gpus=1, shape="tiny", recompute="full", tile=32, kernel="cpu"),
    Case("tiny pair sp2 two passes", "64x2", shape="tiny", reference="adapter_off", passes="two", kernel="cpu"),
    Case("tiny sp8 all weights", "1024", gpus=8, shape="tiny", stage=3, full=True, kernel="cpu"),
    Case("tiny sp2 turns, all weights", "64x4", shape="tiny", stage=3, full=True, kv_heads=1, kernel="cpu"),
)


def main() -> None:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200", help="rates of the prediction: a shipped type or a calibration file")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs here; settings that need more are left out")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--steps", type=int, default=2, help="the first is warming up")
    parser.add_argument("--timeout_s", type=int, default=600)
    parser.add_argument("--append", help="append results to this file")
    parser.add_argument(
        "--again", metavar="RESULTS", help="predict the steps of this file on this type of GPU; runs nothing"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on CPU ranks: rehearses the script")
    args = parser.parse_args()
    if args.again:
        again = timed_before(Path(args.again), args.gpu)
        lines = [compare(case, line, args.gpu, tiny=False) for case, line in again if args.only in case.name]
        found = summary(lines)
        print(table(lines + found))
    else:
        lines = []
        for case in (c for c in (TINY if args.tiny else CASES) if args.only in c.name and c.gpus <= args.gpus):
            measured = run(case, args.steps, args.timeout_s)
            lines.append(compare(case, measured, args.gpu, tiny=args.tiny))
            print(json.dumps(lines[-1]), flush=True)
        found = summary(lines)
        print(table(lines + found))
        found = lines + found
    if args.append:
        append(args.append, *found)


def timed_before(results: Path, gpu: str) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Settings that step.py has timed on this type of GPU, by itself or for compare.py, and what it found."""
    from benchmarks import step
    from ds_longft.decide.setting import Gpu

    for text in results.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        launch, found, words = line.get("ours", line.get("command", "")).partition("benchmarks/step.py ")
        if not found or len(line.get("steps_s", [])) < 2 or not line["machine"].endswith(Gpu.load(gpu).name):
            continue
        a = step.arguments(shlex.split(words))
        documents = a.documents or ",".join([str(a.tokens)] * (2 if a.objective == "dpo" else 1))
        yield (
            Case(
                name=line["what"],
                documents=documents,
                gpus=int(launch.split("--nproc_per_node")[1].split()[0]),
                sp=a.sp,
                shape=a.shape,
                recompute=a.recompute,
                stage=3 if "zero3" in a.ds_config else 2,
                full=a.full,
                host_gib=a.host_gib,
                tile=a.tile,
                kv_heads=a.kv_heads,
                layers=a.layers,
                kernel=line.get("kernel", a.kernel).partition(":")[0],
                reference=line.get("reference", "none"),
                passes=line.get("passes", "auto"),
                calibrating=line["what"] in MADE_RATES,
            ),
            line,
        )


def run(case: Case, steps: int, timeout_s: int) -> dict[str, Any]:
    """step.py's result, or {"error": its last words}."""
    with tempfile.TemporaryDirectory() as folder:
        return start("step.py", case.gpus, [*case.arguments(), "--steps", str(steps)], Path(folder), timeout_s)


def compare(case: Case, measured: dict[str, Any], gpu: str, *, tiny: bool) -> dict[str, Any]:
    """One line: what was predicted, what was measured, how far apart."""
    from transformers import AutoConfig

    from ds_longft.decide.memory import predict, stays_resident
    from ds_longft.decide.search import fastest_saver
    from ds_longft.decide.setting import GIB, Gpu, Setting
    from ds_longft.decide.tensors import ATTENTION, LAYER_INPUTS, LINEARS, REFERENCE, TRAINABLE, WEIGHTS
    from ds_longft.decide.time import predict_time
    from ds_longft.model.facts import ModelFacts

    shape = shape_of(case.shape, case.layers)
    model, rates = ModelFacts.from_config(AutoConfig.for_model(**shape)), Gpu.load(gpu)
    kernel = case.kernel if case.kernel in rates.attention_tflops else next(iter(rates.attention_tflops))
    whole = stays_resident(2 * model.weights, lora=not case.full, offload_params=False, memory_gib=rates.memory_gib)
    setting = Setting(
        lengths=tuple(lengths_of(case.documents)),
        sp=case.sp or case.gpus,
        world=case.gpus,
        lora_r=None if case.full else 16,
        stage=2 if whole else case.stage,
        resident=False,
        recompute=case.recompute,
        host_gib=case.host_gib,
        tile_tokens=case.tile,
        kv_heads=case.kv_heads,
        kernel=kernel,
        fused=not tiny,
        element_bytes=4 if tiny else 2,
        pairs=case.reference != "none",
        reference=case.reference,
        passes=case.passes,
    )
    if case.recompute == "auto":
        setting = fastest_saver(model, setting, rates)
    memory = predict(model, setting, rates)
    time = predict_time(model, setting, rates, memory.keep)
    beside = sum(
        memory.parts.get(part, 0.0) for part in (WEIGHTS, REFERENCE, TRAINABLE, LAYER_INPUTS, ATTENTION, LINEARS)
    )
    line = {
        "date": date.today().isoformat(),
        "what": f"plan {case.name}",
        "value": measured.get("value"),
        "unit": "s",
        "predicted_s": round(time.total_s, 3),
        "peak_gib": measured.get("peak_gib"),
        "predicted_peak_gib": round(memory.peak_gib, 2),
        "predicted_host_gib": round(memory.host / GIB * case.gpus, 1),
        "predicted_fits": memory.fits(rates),
        "tokens": setting.tokens,
        "sp": setting.sp,
        "layers": case.layers,
        "calibrating": case.calibrating,
        "rates": rates.name,
        "predicted_working_kib_per_token": round((memory.peak - beside) / setting.of_a_pass.local_tokens / 1024, 1),
    }
    if "error" in measured:
        return {**line, "error": measured["error"]}
    line |= {key: measured[key] for key in ("commit", "machine", "versions", "command")}
    if len(measured["steps_s"]) > 1:  # the first builds kernels and pins host memory
        line["time_error"] = round(time.total_s / measured["value"] - 1, 4)
    if measured.get("peak_gib"):
        line["peak_error"] = round(memory.peak_gib / measured["peak_gib"] - 1, 4)
        if case.recompute == "full" and not (case.host_gib or case.full):
            kib = (measured["peak_gib"] * GIB - beside) / setting.local_tokens / 1024
            line["working_kib_per_token"] = round(kib, 1)
    return line


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest errors over settings that the rates were not made of; the smallest working set; the longest pack."""
    ran = [line for line in lines if "error" not in line]
    same = {key: ran[-1][key] for key in ("date", "commit", "machine", "versions")} if ran else {}
    found: list[dict[str, Any]] = []
    for key, what in (("peak_error", "plan peak error max"), ("time_error", "plan time error max")):
        errors = [abs(line[key]) for line in ran if key in line and not line["calibrating"]]
        if errors:
            found.append({**same, "what": what, "value": max(errors), "unit": "fraction", "settings": len(errors)})
    for sp in (1, 2):
        kib = [x["working_kib_per_token"] for x in ran if "working_kib_per_token" in x and x["sp"] == sp]
        if kib:
            found.append({**same, "what": f"working set kib per token sp{sp}", "value": min(kib), "unit": "KiB"})
    whole = [line["tokens"] for line in ran if line["layers"] is None]
    if whole:
        found.append({**same, "what": "longest tokens", "value": max(whole), "unit": "tokens"})
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Measured and predicted side by side, as markdown."""
    rows = ["| setting | s | predicted | off | peak GiB | predicted | off |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        if "predicted_s" not in line:
            rows.append(f"| {line['what']} | {line['value']} {line['unit']} | | | | | |")
            continue
        off = [f"{line[k]:+.1%}" if k in line else "-" for k in ("time_error", "peak_error")]
        name = line["what"] + (" (calibrating)" if line["calibrating"] else "")
        seen = line.get("error") or f"{line['value']:.2f}"
        rows.append(
            f"| {name} | {seen} | {line['predicted_s']:.2f} | {off[0]} | {line['peak_gib'] or '-'} | "
            f"{line['predicted_peak_gib']:.1f} | {off[1]} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
