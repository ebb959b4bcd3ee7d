"""Time and peak memory of one optimizer step of the product, on random weights and random tokens.

    torchrun --nproc_per_node 2 benchmarks/step.py --tokens 131072            one document over two GPUs
    torchrun --nproc_per_node 2 benchmarks/step.py --documents 16384x8        packs
    torchrun --nproc_per_node 2 benchmarks/step.py --objective dpo --tokens 131072         a pair, each answer with its
                                                                              prompt 131072 tokens
    torchrun --nproc_per_node 2 benchmarks/step.py --objective dpo --documents 32768x2 --reference precomputed
    python benchmarks/step.py --shape smollm2 --tokens 8192                   one GPU
    ... --profile trace.json                                                  and the top kernels of one step

The model is built, wrapped and stepped exactly as a run does (`train.engine.build`, the trainer's loss rule); only the
data loader and the records are left out. One JSON line per setting goes to stdout and, with --append, to
results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPES = {
    "llama8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "qwen7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "smollm2": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1 << 22,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1 << 22,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, help="one document of so many tokens")
    parser.add_argument(
        "--documents", help="document lengths: 16384x8, or 70000,1000,60000; dpo: chosen, rejected, ..."
    )
    parser.add_argument("--objective", default="sft", choices=["sft", "dpo"])
    parser.add_argument("--reference", default="auto", help="dpo.reference")
    parser.add_argument("--passes", default="auto", help="dpo.passes")
    parser.add_argument("--sp", type=int, help="default: all ranks")
    parser.add_argument("--ds_config", default="ds_configs/zero3_sp.json")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--recompute", default="auto")
    parser.add_argument("--targets", type=float, default=1.0, help="share of the tokens that are trained")
    parser.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA r16 on all linears")
    parser.add_argument("--steps", type=int, default=3, help="the first is warming up")
    parser.add_argument("--host_gib", type=float, default=0.0, help="host memory for kept outputs")
    parser.add_argument("--tile", type=int, help="train.mlp_tile_tokens")
    parser.add_argument("--kv_heads", type=int, help="train.kv_heads_at_a_time")
    parser.add_argument("--liger", default="auto")
    parser.add_argument("--tag", default="")
    parser.add_argument("--profile", help="write a trace of the last step to this file and print the top kernels")
    parser.add_argument("--append", help="append the result to this file")
    parser.add_argument("--grads", help="rank 0 writes the first step's LoRA-B gradients here (safetensors)")
    return parser.parse_args()


def document_lengths(args: argparse.Namespace) -> list[int]:
    """The pack's documents in tokens."""
    if args.tokens:
        return [args.tokens] * (2 if args.objective == "dpo" else 1)
    return lengths_of(args.documents)


def lengths_of(documents: str) -> list[int]:
    """`16384x8` or `70000,1000` -> lengths in tokens."""
    lengths: list[int] = []
    for part in documents.split(","):
        length, _, times = part.partition("x")
        lengths += [int(length)] * int(times or 1)
    return lengths


def main() -> None:
    """Build, step, report."""
    args = arguments()
    lengths = document_lengths(args)

    from ds_longft.train.ranks import Launch, join

    launch = Launch.from_environment()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, _ = join(launch)

    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers
    from transformers import AutoConfig

    from ds_longft.batch import IGNORE_INDEX, Pack, Pairs
    from ds_longft.config import RunConfig
    from ds_longft.ds_config import load_ds_config, merge_ds_config
    from ds_longft.layout import ParallelLayout
    from ds_longft.model.flops import forward_flops, peak_tflops, step_flops
    from ds_longft.sequence.kernels import AttentionSpec, choose_kernel
    from ds_longft.train.engine import build
    from ds_longft.train.speed import choose_passes, rehearse
    from ds_longft.train.step import backpropagate_pack

    sp = args.sp or launch.world
    tokens = sum(lengths)
    shape = {**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
    folder = Path(tempfile.gettempdir()) / f"shape-{args.shape}-{args.layers}-{launch.rank}"
    AutoConfig.for_model(**shape).save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "ds_config": args.ds_config,
            "sp": sp,
            "model": {"path": str(folder), "random_weights": True, "kernel": args.kernel, "liger": args.liger},
            "lora": None if args.full else {"r": 16, "alpha": 32},
            "data": {
                "train": ["unused.jsonl"],
                "max_length_tokens": max(lengths),
                "pack_tokens": max(tokens, 2 * max(lengths)) if args.objective == "dpo" else tokens,
            },
            "objective": args.objective,
            "dpo": {"reference": args.reference, "passes": args.passes} if args.objective == "dpo" else {},
            "train": {
                "recompute": args.recompute,
                "offload_host_gib": args.host_gib,
                "mlp_tile_tokens": args.tile,
                "kv_heads_at_a_time": args.kv_heads,
            },
        }
    )
    settings = merge_ds_config(
        load_ds_config(args.ds_config), config, world=launch.world, device=device.type, hidden_size=shape["hidden_size"]
    )
    layout = ParallelLayout.create(sp)
    started = time.time()
    built = build(config, settings.engine, layout, device, resident_if_fits=settings.resident_if_fits)
    build_s = time.time() - started

    rng = np.random.default_rng(1 + layout.dp_rank)
    ids = rng.integers(0, shape["vocab_size"], tokens)
    cu = np.cumsum([0, *lengths])
    labels = np.append(ids[1:], IGNORE_INDEX)
    labels[cu[1:] - 1] = IGNORE_INDEX
    labels[rng.random(tokens) >= args.targets] = IGNORE_INDEX
    pack = Pack(
        input_ids=ids,
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        labels=labels,
        loss_weights=(labels != IGNORE_INDEX).astype(np.float32),
        cu_seqlens=cu.astype(np.int32),
        padding_tokens=0,
    )
    targets = int(pack.loss_weights.sum())
    if args.objective == "dpo":
        counts = np.add.reduceat(pack.loss_weights, cu[:-1]).reshape(-1, 2)
        known = -np.log(shape["vocab_size"]) * counts.astype(np.float64) if args.reference == "precomputed" else None
        pack = replace(pack, pairs=Pairs(np.ones(len(counts), dtype=np.float32), known))
    weight = torch.tensor(float(len(lengths) / 2 if pack.pairs else targets), dtype=torch.float64, device=device)
    dist.all_reduce(weight)
    total_weight = float(weight) / sp  # every sp rank counted its whole pack
    passes = choose_passes(built.engine, args.passes, pack, layout, device)
    kept = rehearse(built.engine, built.recompute, pack, layout, device)

    def step() -> float:
        total = (
            backpropagate_pack(built.engine, pack, launch.world / total_weight, layout, device).reshape(-1)[0].double()
        )
        dist.all_reduce(total)
        if args.grads and not hasattr(step, "saved"):
            step.saved = True  # type: ignore[attr-defined]
            save_gradients(built.model, args.grads, launch.rank)
        built.engine.step()
        return float(total) / total_weight

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times, losses = [], []
    for i in range(args.steps):
        synchronize()
        begin = time.time()
        if args.profile and i == args.steps - 1:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as prof:
                losses.append(step())
                synchronize()
            if launch.rank == 0:
                print(
                    prof.key_averages().table(sort_by="self_device_time_total", row_limit=24, max_name_column_width=60)
                )
                print(shape_table(prof))
                prof.export_chrome_trace(args.profile)
        else:
            losses.append(step())
        synchronize()
        times.append(time.time() - begin)
        if i == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if launch.rank == 0:
            print(f"step {i} loss {losses[-1]:.4f} {times[-1]:.2f} s", flush=True)
    timed = sorted(times[1 : -1 if args.profile else None] or times[-1:])
    step_s = timed[len(timed) // 2]
    peak = torch.tensor(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head_dim = built.hf_config.hidden_size // built.hf_config.num_attention_heads
    kernel, reason = choose_kernel(
        args.kernel, device=device, dtype=dtype, head_dim=head_dim, spec=AttentionSpec(head_dim**-0.5), lengths=lengths
    )
    flops = step_flops(built.shape, lengths, lora=not args.full, targets=targets)
    if args.objective == "dpo" and built.engine.module.live_reference:
        flops += forward_flops(built.shape, lengths, targets=targets)
    flops *= layout.dp
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak_rate = peak_tflops(name)
    kind = "full" if args.full else "lora"
    if launch.rank == 0:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        result = {
            "date": date.today().isoformat(),
            "commit": commit.stdout.strip() or os.environ.get("COMMIT"),
            "machine": f"{launch.world} x {name}",
            "versions": {m.__name__: m.__version__ for m in (torch, deepspeed, transformers)},
            "command": f"torchrun --nproc_per_node {launch.world} benchmarks/step.py {' '.join(sys.argv[1:])}",
            "what": args.tag
            or (f"dpo pair {max(lengths)} sp{sp} {kind}" if args.objective == "dpo" else "")
            or f"step {args.shape} {tokens} x{len(lengths)} sp{sp} dp{layout.dp} {kind} {kernel.name}",
            "value": round(step_s, 3),
            "unit": "s",
            "tokens_per_s_per_gpu": round(tokens * layout.dp / step_s / launch.world, 1),
            "peak_gib": round(float(peak) / 2**30, 2),
            "mfu": round(flops / step_s / launch.world / 1e12 / peak_rate, 4) if peak_rate else None,
            "kernel": f"{kernel.name}: {reason}",
            "recompute": kept or args.recompute,
            **({"reference": built.engine.module.reference, "passes": built.engine.module.passes, "why": passes}
               if args.objective == "dpo" else {}),
            "loss_first": round(losses[0], 5),
            "build_s": round(build_s, 1),
            "steps_s": [round(t, 3) for t in times],
        }  # fmt: skip
        print(json.dumps(result), flush=True)
        if args.append:
            with open(args.append, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def shape_table(prof: Any) -> str:
    """Device time of torch's own ops by input shapes, ms: where matrix products, copies and adds go."""
    by_shape = prof.key_averages(group_by_input_shape=True)
    rows = [r for r in by_shape if r.key.startswith("aten::") and r.self_device_time_total > 4000]
    rows.sort(key=lambda r: -r.self_device_time_total)
    return "\n".join(
        f"{r.self_device_time_total / 1e3:9.1f} ms {r.count:5d} x {r.key:28s} {r.input_shapes}" for r in rows[:40]
    )


def save_gradients(model: object, path: str, rank: int) -> None:
    """Every LoRA-B gradient as the engine has it after reduction, whole, in float32."""
    from deepspeed.utils import safe_get_full_grad
    from safetensors.torch import save_file

    grads = {}
    for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
        if "lora_B" in name:
            grad = safe_get_full_grad(parameter)
            if rank == 0 and grad is not None:
                grads[name] = grad.detach().float().cpu().contiguous()
    if rank == 0:
        save_file(grads, path)


if __name__ == "__main__":
    main()
