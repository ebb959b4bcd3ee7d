"""From the command to the first step: a model on local disk, by phase.

    python benchmarks/startup.py --folder /tmp/startup --append benchmarks/results.jsonl     Llama-8B, on these GPUs
    python benchmarks/startup.py --folder /tmp/startup --shape tiny --tokens 512             a rehearsal on the CPU

Writes a model of random weights and a small data set to the folder, once, then starts a run as users start it and
takes the time until its first step begins, launcher and rehearsal included. First with the files dropped from the page
cache (root alone can do that), then as they are after it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import ADAPTER, ROOT, SHAPES, append, provenance
from ds_longft.ranks.join import visible_gpus

CHARACTERS_A_TOKEN = 2  # fewer than the tokenizer's, so that no row is too long
POLL_S = 0.05


def main() -> None:
    """Write what is missing, start twice, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where model, data and runs go, on the disk to be read from")
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=65536, help="data.max_length_tokens, and of the longest pack")
    parser.add_argument("--append", help="append results to this file")
    args = parser.parse_args()
    folder = Path(args.folder).expanduser().resolve()
    model = folder / args.shape
    if not (model / "tokenizer_config.json").exists():
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(model, args.shape))
        writer.start()  # a process of its own: what it held of the GPU is free again when it has ended
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"the model could not be written to {model}")
    config = write_run(folder, model, args.tokens)
    starts = [("from page cache", False)]
    if drop_page_cache():
        starts.insert(0, ("from disk", True))
    for shown, cold in starts:
        if cold:
            drop_page_cache()
        result = start(config, folder / "run", f"start-up {args.shape} {args.tokens} lora, {shown}")
        print(json.dumps(result), flush=True)
        if args.append:
            append(args.append, result)


def write_model(folder: Path, shape: str) -> None:
    """Random weights in bf16 as safetensors, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tokenizer import tiny_tokenizer

    with torch.device("cuda" if visible_gpus() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_run(folder: Path, model: Path, tokens: int) -> Path:
    """Eight texts, each a pack of nearly the longest length, and a run config."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text *= CHARACTERS_A_TOKEN * tokens // len(text) + 1
    rows = [json.dumps({"text": text[i : i + CHARACTERS_A_TOKEN * tokens // 2]}) for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = folder / "run.yaml"
    content = {
        "ds_config": str(ROOT / "ds_configs/zero3_sp.json"),
        "output_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "lora": ADAPTER,
        "data": {"train": [str(folder / "train.jsonl")], "max_length_tokens": tokens},
        "train": {"max_steps": 1, "resume": "never"},
    }
    config.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return config


def drop_page_cache() -> bool:
    """Whether files will be read from the disk again."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def start(config: Path, run: Path, what: str) -> dict[str, Any]:
    """One run of one step; seconds until that step begins. Raises RuntimeError when it fails."""
    import deepspeed
    import torch
    import transformers

    shutil.rmtree(run, ignore_errors=True)
    gpus = visible_gpus()
    launcher = (
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus)] if gpus else [sys.executable]
    )
    command = [*launcher, str(ROOT / "launch/train.py"), "--config", str(config)]
    log = run.with_suffix(".log")
    begun = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)
        status: dict[str, Any] = {}
        while not status.get("start_up_s") and process.poll() is None:
            time.sleep(POLL_S)
            if (run / "run_status.json").exists():
                status = json.loads((run / "run_status.json").read_text())
        seconds = time.monotonic() - begun
        code = process.wait()
    if code or not status.get("start_up_s"):
        raise RuntimeError(f"{what}: exit code {code}\n" + log.read_text(errors="replace")[-3000:])
    phases: dict[str, float] = status["start_up_s"]
    return {
        **provenance(max(gpus, 1), torch, deepspeed, transformers),
        "what": what,
        "value": round(seconds, 2),
        "unit": "s",
        "phases_s": {"launcher": round(seconds - sum(phases.values()), 2), **phases},
    }


if __name__ == "__main__":
    main()
