"""What the step benchmarks share: model shapes, samples, the proof of an equal start, gradients, result lines.

Ours (step.py) and the peer (peer_alst.py) train the tokens made here, from the weights and adapters that
one seed gives.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import psutil

from ds_longft.batch import IGNORE_INDEX, Pack

ROOT = Path(__file__).resolve().parent.parent

RAISED = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b")
"""Begins the last line of a traceback, and no warning that tells of an error."""

FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>\S+)')
"""A call in a stack of faulthandler's."""

SEED = 0  # of the weights and of the adapters
SETTLED = 0.02  # steps that differ by no more of each other are taken to be equal
ADAPTER = {"r": 16, "alpha": 32}  # on all linears, no dropout

SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "llama70b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "qwen7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 1 << 22, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "smollm2": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1 << 22,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "max_position_embeddings": 1 << 22, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 1 << 22, "rope_parameters": {"rope_type": "default", "rope_theta": 1.5e5},
    },
    "tiny-moe": {
        "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
        "max_position_embeddings": 1 << 22, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    # Qwen3.5's layers in the size of an 8B: three of four carry a state (gated delta rule), heads as Llama-8B's
    "hybrid8b": {
        "model_type": "qwen3_5_text", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
    # Nemotron-H-8B's: 24 layers of Mamba-2, 24 of MLP, 4 of attention
    "mamba8b": {
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504,
        "num_hidden_layers": 52,
        "layers_block_type": [
            {"M": "mamba", "-": "mlp", "*": "attention"}[kind]
            for kind in "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
        ],
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128,
        "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
        "max_position_embeddings": 1 << 22,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
}  # fmt: skip


def adapter_of(shape: dict[str, Any]) -> dict[str, Any]:
    """`lora` of the run config: on all linears, of mixtures of experts on these too."""
    return {**ADAPTER, "experts": True} if "num_experts_per_tok" in shape else ADAPTER


def shape_of(name: str, layers: int | None) -> dict[str, Any]:
    """The model config, with another number of layers where one is given."""
    shape = SHAPES[name]
    kinds = {key: shape[key][:layers] for key in ("layer_types", "layers_block_type") if key in shape}
    return {**shape, **kinds, **({"num_hidden_layers": layers} if layers else {})}


def lengths_of(documents: str) -> list[int]:
    """`16384x8`, `70000,1000` or `longalign:131072` (one draw) -> document lengths."""
    if documents.startswith("longalign:"):
        return longalign_draw(int(documents.removeprefix("longalign:")), seed=0)
    lengths: list[int] = []
    for part in documents.split(","):
        length, _, times = part.partition("x")
        lengths += [int(length)] * int(times or 1)
    return lengths


def longalign_draw(tokens: int, seed: int) -> list[int]:
    """A full pack of documents of 1K to 64K tokens, their lengths spread as LongAlign's are, any number of tokens.

    The last document is cut so that the pack is full. Small packs (rehearsals) get documents of 1/64 to 1/2 of it.
    """
    shortest, longest = min(1024, tokens // 64), min(65536, tokens // 2)
    rng, lengths = np.random.default_rng(seed), list[int]()
    while sum(lengths) < tokens:
        drawn = int(np.clip(np.exp(rng.normal(np.log(longest / 6), 0.9)), shortest, longest))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def sample(lengths: list[int], vocab_size: int, *, dp_rank: int, targets: float = 1.0) -> Pack:
    """One pack of random tokens, the same wherever it is made; labels shifted inside each document.

    `targets`: share of the tokens that are trained. The last token of a document never is.
    """
    tokens = sum(lengths)
    rng = np.random.default_rng(1 + dp_rank)
    ids = rng.integers(0, vocab_size, tokens)
    cu = np.cumsum([0, *lengths])
    labels = np.append(ids[1:], IGNORE_INDEX)
    labels[cu[1:] - 1] = IGNORE_INDEX
    labels[rng.random(tokens) >= targets] = IGNORE_INDEX
    return Pack(
        input_ids=ids,
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        labels=labels,
        loss_weights=(labels != IGNORE_INDEX).astype(np.float32),
        cu_seqlens=cu.astype(np.int32),
        padding_tokens=0,
    )


def fingerprint(model: Any) -> str:
    """Of all weights, whole and before the engine partitions them: equal where two models start alike.

    Sums in float64: a weight held in float32 here and in bf16 there counts as equal when its value is.
    """
    sums = sorted((name, float(p.detach().double().abs().sum())) for name, p in model.named_parameters())
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def compared(name: str) -> bool:
    """Whether this parameter's gradient is compared: LoRA's B (A's is zero at first); norms and keys of full tuning."""
    return "lora_B" in name or (name.endswith(("norm.weight", "k_proj.weight")) and "lora" not in name)


def save_gradients(model: Any, path: str, rank: int) -> None:
    """The compared gradients as the engine has them after reduction, whole, in float32. Collective."""
    from deepspeed.utils import safe_get_full_grad
    from safetensors.torch import save_file

    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and compared(name):
            grad = safe_get_full_grad(parameter)
            if rank == 0 and grad is not None:
                grads[name] = grad.detach().float().cpu().contiguous()
    if rank == 0:
        save_file(grads, path)


def compare_gradients(ours: Path, peer: Path) -> dict[str, Any]:
    """The worst cosine and the worst norm difference over all modules of two files of `save_gradients`."""
    from safetensors.torch import load_file

    one, other = load_file(ours), load_file(peer)
    if one.keys() != other.keys():
        return {"error": f"other parameters: {sorted(one.keys() ^ other.keys())[:4]}"}
    rows = []
    for name, mine in one.items():
        a, b = mine.double().flatten(), other[name].double().flatten()
        lengths = float(a.norm()), float(b.norm())
        if not 0 < min(lengths) <= max(lengths) < math.inf:
            return {"error": f"{name}: gradients of norm {lengths[0]:.3e} and {lengths[1]:.3e}"}
        rows.append((float(a @ b) / math.prod(lengths), abs(lengths[0] / lengths[1] - 1), name))
    cosine, norm = min(rows), max(rows, key=lambda row: row[1])
    return {
        "modules": len(rows),
        "worst_cosine": round(cosine[0], 7),
        "worst_cosine_of": cosine[2],
        "worst_norm_error": round(norm[1], 7),
        "worst_norm_error_of": norm[2],
    }


def is_settled(times: list[float]) -> bool:
    """Whether nothing compiles or plans any more: at least four steps, the last two within `SETTLED` of each other."""
    return len(times) >= 4 and abs(times[-1] / times[-2] - 1) <= SETTLED


def step_times(times: list[float]) -> dict[str, Any]:
    """The settled steps, those at the end that are within `SETTLED` of the last: their median, minimum and number."""
    tail = [times[-1]]
    for seconds in reversed(times[:-1]):
        if abs(seconds / times[-1] - 1) > SETTLED:
            break
        tail.append(seconds)
    return {"value": round(median(tail), 3), "min_s": round(min(tail), 3), "settled_steps": len(tail)}


def slowest(seconds: float, device: Any) -> float:
    """Of all ranks, so that they go on or stop together. Collective."""
    import torch
    import torch.distributed as dist

    box = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box)


def take_steps(args: Any, step: Callable[[int], float], device: Any) -> tuple[list[float], list[float]]:
    """Seconds of each step, of the slowest rank, and its loss: `args.steps` of them, or until they settle. Collective.

    `step` is told its number and returns the loss. The peak counts from the second step on.
    """
    import torch
    import torch.distributed as dist

    times, losses = list[float](), list[float]()
    for i in range(10 if args.settle else args.steps):
        if args.settle and is_settled(times):
            break
        synchronize(device)
        begin = time.time()
        losses.append(step(i))
        synchronize(device)
        times.append(slowest(time.time() - begin, device))
        if i == 0 and args.steps > 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if dist.get_rank() == 0:
            print(f"step {i} loss {losses[-1]:.4f} {times[-1]:.2f} s", flush=True)
    return times, losses


def synchronize(device: Any) -> None:
    """Wait for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: Any) -> float | None:
    """The highest peak of any rank since the last reset, None without GPUs. Collective."""
    import torch
    import torch.distributed as dist

    if device.type != "cuda":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return round(float(peak) / 2**30, 2)


def provenance(ranks: int, *modules: ModuleType, script: str = "") -> dict[str, Any]:
    """What every line of results.jsonl says about where it comes from."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{ranks} x {name}",
        "versions": {m.__name__: m.__version__ for m in modules},
        "command": f"{script or 'python benchmarks/' + Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip(),
    }


def commit() -> str:
    """The code's; `COMMIT` names it where there is no git."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    return (
        os.environ.get("COMMIT")
        or subprocess.run(head, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    )


def start(script: str, ranks: int, arguments: list[str], folder: Path, timeout_s: int) -> dict[str, Any]:
    """A script's result, or {"error": its last words}. `ranks` 0: without a launcher."""
    out = folder / f"{script}.jsonl"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / "benchmarks" / script), *arguments, "--append", str(out)]
    log = folder / f"{script}.log"
    late = False
    # what is ended by SIGABRT, below, leaves no core file of a GPU's address space
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, env=environment)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
            end_with_stacks(process.pid)
    if out.exists():  # written last: what goes wrong when ranks part costs no result
        return dict(json.loads(out.read_text().splitlines()[-1]))
    words = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    print("\n".join(words[-40:]), file=sys.stderr, flush=True)
    if late:
        steps = [line for line in words if line.startswith("step ")]
        behind = f"behind {steps[-1]}" if steps else "before its first step"
        return {"error": f"longer than {timeout_s} s, {behind}{where(words)}"}
    errors = [line for line in words if RAISED.match(line)]
    return {"error": (errors[:1] or words[-1:] or ["no result"])[0][:300]}


def end_with_stacks(pid: int) -> None:
    """End a process and all that it started. Each rank tells where it was: faulthandler's answer to SIGABRT.

    The launcher goes first. Killed alone, it would leave its ranks behind, with the memory of the GPUs.
    """
    launcher = psutil.Process(pid)
    below = launcher.children(recursive=True)
    if below:
        launcher.kill()
    for process in below or [launcher]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
    for process in psutil.wait_procs([launcher, *below], timeout=10)[1]:
        process.kill()


def where(words: list[str]) -> str:
    """Of the first stack among the lines, the four calls at its top."""
    if "Fatal Python error: Aborted" not in words:
        return ""
    stack = words[words.index("Fatal Python error: Aborted") :]
    frames = [m for m in map(FRAME.match, stack) if m][:4]
    return ", in " + " < ".join(f"{Path(m['file']).name}:{m['line']} {m['name']}" for m in frames)


def append(path: str | Path, *results: dict[str, Any]) -> None:
    """One JSON object a line behind those already there."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(result) + "\n" for result in results))
