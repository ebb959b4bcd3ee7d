"""Our step, the peer's step on the same sample, and the floor of the kernels: one table for the GPUs of this machine.

    python benchmarks/compare.py --append benchmarks/results.jsonl      every row that these GPUs can run
    python benchmarks/compare.py --only "131072 sp2" --steps 2          rows whose name holds this
    python benchmarks/compare.py --layers 4 --steps 1 --grads           are the gradients the same? seconds a row
    python benchmarks/compare.py --tiny --grads                         a rehearsal on 2 CPU ranks

Each measurement is a start of its own (step.py, peer_alst.py or peer_ringmaster.py, ceilings.py), so that one that
runs out of memory costs only its own cell. A row fails, and with it the command, when the two did not start from the
same weights, or when the first losses differ by more than 1e-4 of it (bf16; 1e-6 in the rehearsal's fp32). With --grads
every LoRA-B gradient is compared too (norms and keys in full fine-tuning): cosine at least 0.999, norm within 1%.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import append, compare_gradients, start
from ds_longft.ranks.join import visible_gpus

# our kernel, and transformers' name of the same one
FA4 = ("flash-attn-4", "flash_attention_4")
CUDNN = ("cudnn", "sdpa")  # torch's sdpa takes cuDNN on these GPUs
ON_CPU = ("cpu", "sdpa")

PASS = {
    # largest relative difference of losses, least cosine, largest relative difference of a gradient's norm
    "bf16": (1e-4, 0.999, 0.01),
    "fp32": (1e-6, 1 - 1e-6, 1e-4),
}


@dataclass(frozen=True)
class Row:
    """One step, as both sides' arguments."""

    name: str
    documents: str
    gpus: int = 2
    sp: int = 2
    kernels: tuple[str, str] = FA4
    full: bool = False
    shape: str = "llama8b"
    ringmaster: bool = False  # the peer is Axolotl's, which knows models with states; else DeepSpeed's ALST

    def ours(self) -> list[str]:
        """step.py's arguments; its DeepSpeed JSON is the default, zero3_sp.json."""
        return [*self._same(), "--kernel", self.kernels[0], "--fingerprint"]

    def peer(self, stage: int) -> tuple[str, list[str]]:
        """The peer's script and its arguments; `stage` of ZeRO where it has one."""
        same = [*self._same(), "--attn", self.kernels[1], "--fingerprint"]
        if self.ringmaster:
            return "peer_ringmaster.py", same
        return "peer_alst.py", [*same, "--stage", str(stage)]

    def peer_is(self, stage: int) -> str:
        """What the peer is made of."""
        ringmaster = "ringmaster, FSDP2, Liger, PEFT" if self.gpus > 1 else "transformers, Liger, PEFT"
        return ringmaster if self.ringmaster else f"DeepSpeed ALST, Liger, PEFT, ZeRO-{stage}"

    def floor(self) -> list[str]:
        """ceilings.py's arguments."""
        return [*self._same(), "--kernel", self.kernels[0]]

    def _same(self) -> list[str]:
        full = ["--full"] * self.full
        return ["--shape", self.shape, "--documents", self.documents, "--sp", str(self.sp), *full]


ROWS = (
    Row("131072 sp2 lora fa4", "131072"),
    Row("131072 sp2 lora cudnn", "131072", kernels=CUDNN),
    Row("8x16384 sp2 lora fa4", "16384x8"),
    Row("longalign 131072 sp2 lora fa4", "longalign:131072"),
    Row("16x8192 packs dp2", "8192x8", sp=1),
    Row("65536 sp2 full", "65536", full=True),
    Row("131072 sp2 hybrid8b lora fa4", "131072", shape="hybrid8b", ringmaster=True),
    Row("131072 sp1 hybrid8b lora fa4", "131072", gpus=1, sp=1, shape="hybrid8b", ringmaster=True),
    Row("65536 sp1 lora fa4", "65536", gpus=1, sp=1),
    Row("65536 sp1 lora cudnn", "65536", gpus=1, sp=1, kernels=CUDNN),
    Row("4x16384 sp1 lora fa4", "16384x4", gpus=1, sp=1),
    Row("longalign 65536 sp1 lora fa4", "longalign:65536", gpus=1, sp=1),
    Row("131072 sp1 lora fa4", "131072", gpus=1, sp=1),
    Row("8x8192 packs dp1", "8192x8", gpus=1, sp=1),
    Row("65536 sp1 full", "65536", gpus=1, sp=1, full=True),  # --layers 8: 16 bytes a weight beside the activations
)

TINY = (
    Row("256 sp2 lora", "256", kernels=ON_CPU, shape="tiny"),
    Row("256 sp2 full", "256", kernels=ON_CPU, shape="tiny", full=True),
    Row("8x64 packs dp2", "64x4", sp=1, kernels=ON_CPU, shape="tiny"),
    Row("2x128 sp2 lora, ringmaster", "128x2", kernels=ON_CPU, shape="tiny", ringmaster=True),
    Row("2x128 sp1 lora, ringmaster", "128x2", gpus=1, sp=1, kernels=ON_CPU, shape="tiny", ringmaster=True),
    Row("longalign 512 sp1 lora", "longalign:512", gpus=1, sp=1, kernels=ON_CPU, shape="tiny"),
)


def main() -> None:
    """Measure row by row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the row of this name, or rows whose name holds it")
    parser.add_argument("--gpus", type=int, help="rows that need no more than these; default: all of this machine")
    parser.add_argument("--steps", type=int, help="so many; left out, until the last two are within 2 %%, at least 4")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--peer_stage", type=int, default=3, help="ZeRO stage of the peer; its tutorial's is 3")
    parser.add_argument("--host_gib", type=float, default=0.0, help="host memory in which ours may keep outputs")
    parser.add_argument("--no_peer", action="store_true", help="ours and the floor only")
    parser.add_argument("--grads", action="store_true", help="compare gradients of the first step")
    parser.add_argument("--timeout_s", type=int, default=900, help="of one measurement")
    parser.add_argument("--append", help="append results to this file")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on 2 CPU ranks: rehearses everything")
    args = parser.parse_args()
    gpus = args.gpus or (2 if args.tiny else visible_gpus())
    rows = [row for row in (TINY if args.tiny else ROWS) if args.only in row.name and row.gpus <= gpus]
    rows = [row for row in rows if row.name == args.only] or rows
    if not rows:
        raise SystemExit(f"no row whose name holds {args.only!r} runs on {gpus} GPUs; names: {[r.name for r in ROWS]}")
    results = []
    for row in rows:
        results += [measured := measure(row, args)]
        lines = measured["lines"]
        for line in lines:
            print(json.dumps(line), flush=True)
        if args.append:
            append(args.append, *(line for line in lines if "error" not in line))
        print(f"{row.name}: {measured['elapsed_s']:.0f} s, {', '.join(measured['wrong']) or 'ok'}", flush=True)
    print("\n" + table(results))
    raise SystemExit(any(result["wrong"] for result in results))


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The row's result lines, what is wrong with it, and how long it took."""
    begin = time.monotonic()
    layers = ["--layers", str(args.layers)] if args.layers else []
    common = [*(["--steps", str(args.steps)] if args.steps else ["--settle"]), *layers]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        grads = {side: ["--grads", str(at / f"{side}.safetensors")] if args.grads else [] for side in ("ours", "peer")}
        host = ["--host_gib", str(args.host_gib)] if args.host_gib else []
        ours = start("step.py", row.gpus, [*row.ours(), *host, *common, *grads["ours"]], at, args.timeout_s)
        peer = {}
        if not args.no_peer:
            script, words = row.peer(args.peer_stage)
            peer = start(script, row.gpus, [*words, *common, *grads["peer"]], at, args.timeout_s)
        floor = start("ceilings.py", 0, [*row.floor(), *layers], at, args.timeout_s)
        compared = None
        if args.grads and "value" in ours and "value" in peer:
            compared = compare_gradients(at / "ours.safetensors", at / "peer.safetensors")
    elapsed_s = time.monotonic() - begin
    lines = result_lines(row, args, ours, peer, floor, compared)
    return {
        "row": row,
        "lines": lines,
        "wrong": wrong(ours, peer, floor, compared, PASS["fp32" if args.tiny else "bf16"]),
        "elapsed_s": elapsed_s,
    }


def result_lines(
    row: Row,
    args: argparse.Namespace,
    ours: dict[str, Any],
    peer: dict[str, Any],
    floor: dict[str, Any],
    compared: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Lines for results.jsonl: the step with its peer, its share of the floor, and how far gradients are apart."""
    name = row.name + (f", {args.layers} layers" if args.layers else "")
    name += f", {args.host_gib:g} GiB of host memory" if args.host_gib else ""
    if "error" in ours:
        return [{"what": f"step {name}", "error": ours["error"], "peer_value": peer.get("value")}]
    same = {key: ours[key] for key in ("date", "commit", "machine", "versions")}
    same["command"] = f"python benchmarks/compare.py {shlex.join(sys.argv[1:])}"
    step = {
        **same,
        "what": f"step {name}",
        "value": ours["value"],
        "unit": "s",
        "peer_value": peer.get("value"),
        "ratio": round(peer["value"] / ours["value"], 3) if "value" in peer else None,
        "loss": ours["loss_first"],
        "peer_loss": peer.get("loss_first"),
        "peak_gib": ours["peak_gib"],
        "peer_peak_gib": peer.get("peak_gib"),
        "floor_share": round(floor["value"] / ours["value"], 3) if "value" in floor else None,
        "tokens_per_s_per_gpu": ours["tokens_per_s_per_gpu"],
        "mfu": ours["mfu"],
        "kernel": ours["kernel"],
        "recompute": ours["recompute"],
        "min_s": ours["min_s"],
        "steps_s": ours["steps_s"],
        "ours": ours["command"],
        "peer_min_s": peer.get("min_s"),
        "peer_steps_s": peer.get("steps_s"),
        "peer": peer.get("error") or f"{row.peer_is(args.peer_stage)}: {peer.get('command')}",
    }
    if not peer:
        step = {key: value for key, value in step.items() if not (key.startswith("peer") or key == "ratio")}
    lines = [step]
    if "value" in floor:
        lines.append(
            {
                **same,
                "what": f"floor share {name}",
                "value": step["floor_share"],
                "unit": "share",
                "floor_s": floor["value"],
                **{key: floor[key] for key in floor if key.endswith(("_ms", "_tflops"))},
            }
        )
    if compared and "error" not in compared:
        worst = compared["worst_cosine"]
        lines.append({**same, "what": f"gradients {name}", "value": worst, "unit": "worst cosine", **compared})
    return lines


def wrong(
    ours: dict[str, Any],
    peer: dict[str, Any],
    floor: dict[str, Any],
    compared: dict[str, Any] | None,
    bounds: tuple[float, float, float],
) -> list[str]:
    """Everything that speaks against the row, empty where nothing does."""
    found = [f"{who}: {r['error']}" for who, r in (("ours", ours), ("peer", peer), ("floor", floor)) if "error" in r]
    if not peer or "error" in ours or "error" in peer:
        return found
    loss, cosine, norm = bounds
    if ours["fingerprint"] != peer["fingerprint"]:
        found.append("the weights at the start differ")
    apart = abs(ours["loss_first"] / peer["loss_first"] - 1)
    if apart > loss:
        found.append(f"losses {ours['loss_first']} and {peer['loss_first']} are {apart:.1e} apart")
    if compared and "error" in compared:
        found.append(f"gradients: {compared['error']}")
    elif compared and (compared["worst_cosine"] < cosine or compared["worst_norm_error"] > norm):
        found.append(
            f"gradients: cosine {compared['worst_cosine']} of {compared['worst_cosine_of']}, norm off by "
            f"{compared['worst_norm_error']} of {compared['worst_norm_error_of']}"
        )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """One row a step, as markdown."""
    rows = [
        "| step | ours s | peer s | ratio | floor share | loss | peer loss | GiB | peer GiB | cosine | norm off | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        of_kind = {line["what"].split()[0]: line for line in result["lines"]}
        step, grads = of_kind["step"], of_kind.get("gradients", {})
        cells = [step.get(key) for key in ("value", "peer_value", "ratio", "floor_share", "loss", "peer_loss")]
        cells += [
            step.get("peak_gib"),
            step.get("peer_peak_gib"),
            grads.get("worst_cosine"),
            grads.get("worst_norm_error"),
        ]
        shown = " | ".join("-" if cell is None else str(cell) for cell in [*cells, round(result["elapsed_s"])])
        rows.append(f"| {result['row'].name} | {shown} |")
        rows += [f"| | {problem} |" for problem in result["wrong"]]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
