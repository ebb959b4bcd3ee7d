"""`ds-longft verify` on the first layers of Llama-8B shapes, once for every attention kernel that runs on this machine.

    python benchmarks/verify_kernels.py                            # all GPUs share each pack; bf16 and float32
    python benchmarks/verify_kernels.py --shape tiny --layers 1    # a rehearsal, also on CPUs

Random weights, text of the Python standard library. One JSON object for each type and kernel, with --append also into
a file; ends with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import SHAPES, append, commit, shape_of
from ds_longft.ranks.join import visible_gpus
from tests.tokenizer import tiny_tokenizer

KERNELS = {
    "bf16": ("flash-attn-4", "flash-attn-3", "flash-attn-2", "cudnn", "varlen", "math"),
    "fp32": ("math",),
}
ON_CPU = {"fp32": ("cpu", "math"), "bf16": ()}


def main() -> None:
    """One verify a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", default="8K")
    parser.add_argument("--kernels", help="only these, separated by commas")
    parser.add_argument("--append", help="append the results to this file")
    args = parser.parse_args()
    gpus = visible_gpus()
    ranks = gpus or 2
    wanted = args.kernels.split(",") if args.kernels else None
    failed = False
    with tempfile.TemporaryDirectory() as work:
        config = write_run(Path(work), args.shape, args.layers, ranks)
        for dtype, kernels in (KERNELS if gpus else ON_CPU).items():
            for kernel in kernels:
                if wanted and kernel not in wanted:
                    continue
                command = [
                    *(sys.executable, "-c", "from ds_longft.cli import main; main()", "verify"),
                    *("--config", str(config), "--sp", str(ranks), "--tokens", args.tokens, "--json"),
                    *("--model.random_weights", "true", "--model.dtype", dtype, "--model.kernel", kernel),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
                if not lines:  # not for this machine or not installed: it said which
                    print(f"{dtype} {kernel}: not run: {(done.stderr.strip().splitlines() or ['?'])[-1][:300]}")
                    continue
                row = result(json.loads(lines[-1]), dtype, kernel, args, ranks)
                failed |= not row["ok"]
                print(json.dumps(row), flush=True)
                if args.append:
                    append(args.append, row)
    raise SystemExit(int(failed))


def write_run(folder: Path, shape: str, layers: int, ranks: int) -> Path:
    """Config of the model (no weights), its tokenizer, texts, and run.yaml: LoRA with dropout, ZeRO-3."""
    from transformers import AutoConfig

    AutoConfig.for_model(**shape_of(shape, layers)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    modules = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    rows = [{"text": path.read_text(encoding="utf-8", errors="replace")[:20000]} for path in modules]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run: dict[str, Any] = {
        "ds_config": str(Path(__file__).resolve().parents[1] / "ds_configs" / "zero3_sp.json"),
        "output_dir": str(folder / "out"),
        "model": {"path": str(folder / "model")},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.05},
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "max_length_tokens": 8192,
            "overlong": "truncate",
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return folder / "run.yaml"


def result(report: dict[str, Any], dtype: str, kernel: str, args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """A line of results.jsonl: the worst gradient and the kernel's error, and what failed."""
    import deepspeed
    import torch
    import transformers

    found = report["findings"]
    worst = {
        check: max((f["value"] for f in found if f["check"].startswith(check) and f["value"] is not None), default=None)
        for check in ("1", "7")
    }
    leaks = [f["value"] for f in found if f["what"].startswith("states of other documents")]
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{ranks} x {report['device']}",
        "versions": {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)},
        "command": f"python {shlex.join(sys.argv)}",
        "what": f"verify {args.shape} {args.layers} layers sp{ranks} {dtype} {kernel}",
        "value": worst["1"],
        "unit": "worst relative error of check 1",
        "ok": report["ok"],
        "findings": len(found),
        "failed": [f"{f['check']}: {f['what']}: {f['measured']} ({f['note']})" for f in found if f["ok"] is False],
        "leak_of_check_2": max(leaks, default=None),
        "worst_kernel_error_of_check_7": worst["7"],
        "tokens": report["tokens"],
        "documents": report["documents"],
    }


if __name__ == "__main__":
    main()
