"""Time and peak memory of one optimizer step of the product, on random weights and random tokens.

    torchrun --nproc_per_node 2 benchmarks/step.py --tokens 131072            one document over two GPUs
    torchrun --nproc_per_node 2 benchmarks/step.py --documents 16384x8        packs
    torchrun --nproc_per_node 2 benchmarks/step.py --objective dpo --tokens 131072         a pair, each answer with its
                                                                              prompt 131072 tokens
    torchrun --nproc_per_node 2 benchmarks/step.py --objective dpo --documents 32768x2 --reference precomputed
    python benchmarks/step.py --shape smollm2 --tokens 8192                   one GPU
    python benchmarks/step.py --shape qwen3-30b-a3b --tokens 131072 --ds_config ds_configs/zero2_sp.json --host_gib 64
    python benchmarks/step.py --tokens 262144 --base host --cap_gib 24 --host_gib 96       as on a card of 24 GiB
    ... --profile trace.json                                                  and the top kernels of one step

The model is built, wrapped and stepped exactly as a run does (`train.engine.build`, the trainer's loss rule); only the
data loader and the records are left out. One JSON line per setting goes to stdout and, with --append, to
results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import (
    SEED,
    SHAPES,
    adapter_of,
    append,
    fingerprint,
    lengths_of,
    peak_gib,
    provenance,
    sample,
    save_gradients,
    shape_of,
    step_times,
    synchronize,
    take_steps,
)
from ds_longft.batch import Pack


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of this process, or of a command line that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, help="one document of so many tokens")
    parser.add_argument(
        "--documents",
        help="document lengths: 16384x8, or 70000,1000,60000, or longalign:131072 (one draw); dpo: chosen, "
        "rejected, ...",
    )
    parser.add_argument("--objective", default="sft", choices=["sft", "dpo"])
    parser.add_argument("--reference", default="auto", help="dpo.reference")
    parser.add_argument("--passes", default="auto", help="dpo.passes")
    parser.add_argument("--sp", type=int, help="default: all ranks")
    parser.add_argument("--ds_config", default="ds_configs/zero3_sp.json")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--recompute", default="auto")
    parser.add_argument("--targets", type=float, default=1.0, help="share of the tokens that are trained")
    parser.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA r16 on linears, experts")
    parser.add_argument("--steps", type=int, default=3, help="the first is warming up")
    parser.add_argument(
        "--settle", action="store_true", help="go on, to 10 steps at most, until the last two are within 2 %%"
    )
    parser.add_argument("--deterministic", action="store_true", help="train.deterministic")
    parser.add_argument("--no_rehearsal", action="store_true", help="no dry run first; auto keeps no linears then")
    parser.add_argument("--base", default="auto", help="model.base: where frozen weights lie")
    parser.add_argument("--quantize", default="auto", help="model.quantize; mxfp4: random weights as gpt-oss' files")
    parser.add_argument("--cap_gib", type=float, help="the GPU counts as one with so much memory, and has no more")
    parser.add_argument("--host_gib", type=float, default=0.0, help="host memory, with --base host the base's too")
    parser.add_argument("--offload_disk", help="folder for what neither GPU nor host memory holds")
    parser.add_argument("--tile", type=int, help="train.mlp_tile_tokens")
    parser.add_argument("--kv_heads", type=int, help="train.kv_heads_at_a_time")
    parser.add_argument("--liger", default="auto")
    parser.add_argument("--tag", default="")
    parser.add_argument("--profile", help="write a trace of the last step to this file and print the top kernels")
    parser.add_argument("--append", help="append the result to this file")
    parser.add_argument("--fingerprint", action="store_true", help="name the weights that the first step starts from")
    parser.add_argument("--grads", help="rank 0 writes gradients of the first step here (safetensors)")
    return parser.parse_args(words)


def document_lengths(args: argparse.Namespace) -> list[int]:
    """The pack's documents in tokens."""
    if args.tokens:
        return [args.tokens] * (2 if args.objective == "dpo" else 1)
    return lengths_of(args.documents)


def main() -> None:
    """Build, step, report."""
    args = arguments()
    lengths = document_lengths(args)

    from ds_longft.ranks.join import Agreement, Launch, join

    launch = Launch.from_environment()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, _ = join(launch)

    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers
    from transformers import AutoConfig

    from ds_longft.config.ds_file import load_ds_config
    from ds_longft.config.ds_json import merge_ds_config
    from ds_longft.config.run_config import RunConfig
    from ds_longft.data.deal import deal_documents
    from ds_longft.decide.plan_json import foresee_run
    from ds_longft.decide.setting import GIB, Gpu, Setting
    from ds_longft.decide.tensors import bytes_of_layers
    from ds_longft.layout import ParallelLayout
    from ds_longft.model.facts import ModelFacts
    from ds_longft.model.packed import FORMATS
    from ds_longft.model.peaks import peak_tflops
    from ds_longft.sequence.kernels import AttentionSpec, choose_kernel
    from ds_longft.train.device_memory import device_memory, own_memory_gib, total_and_outside_torch
    from ds_longft.train.disk_room import check_disk, measured_gb_s
    from ds_longft.train.engine import build
    from ds_longft.train.install import decided, known_run
    from ds_longft.train.make_optimizer import set_learning_rate
    from ds_longft.train.rehearse import choose_passes, rehearse, settle
    from ds_longft.train.step import backpropagate_pack

    if args.cap_gib and device.type == "cuda":  # the context lies in it, as on a smaller card; what NCCL will take too
        total, outside = total_and_outside_torch(device)
        own_bytes = args.cap_gib * GIB - outside - (Gpu.load("h200").nccl_gib * GIB if launch.world > 1 else 0)
        torch.cuda.set_per_process_memory_fraction(own_bytes / total, device)
    sp = args.sp or launch.world
    tokens = sum(lengths)
    longest = max(lengths)
    shape = shape_of(args.shape, args.layers)
    folder = Path(tempfile.gettempdir()) / f"shape-{args.shape}-{args.layers}-{launch.rank}"
    hf_config = AutoConfig.for_model(**shape)
    stored = args.quantize == "mxfp4"
    if stored:
        hf_config.quantization_config = {"quant_method": "mxfp4"}
    hf_config.save_pretrained(folder)
    weighed = Setting(lengths=(1,), quantize=args.quantize if args.quantize in FORMATS else "")
    base_gib = bytes_of_layers(ModelFacts.from_config(hf_config), weighed) / GIB
    config = RunConfig.model_validate(
        {
            "ds_config": args.ds_config,
            "sp": sp,
            "seed": SEED,
            "model": {
                "path": str(folder),
                "random_weights": True,
                "kernel": args.kernel,
                "liger": args.liger,
                "base": args.base,
                "quantize": "auto" if stored else args.quantize,
            },
            "lora": None if args.full else adapter_of(shape),
            "data": {
                "train": ["unused.jsonl"],
                "max_length_tokens": longest,
                "pack_tokens": max(tokens, 2 * longest) if args.objective == "dpo" else tokens,
            },
            "objective": args.objective,
            "dpo": {"reference": args.reference, "passes": args.passes} if args.objective == "dpo" else {},
            "train": {
                "recompute": args.recompute,
                "offload_host_gib": args.host_gib - base_gib if args.base == "host" else args.host_gib,
                "offload_disk": args.offload_disk,
                "mlp_tile_tokens": args.tile,
                "kv_heads_at_a_time": args.kv_heads,
                "deterministic": args.deterministic,
            },
        }
    )
    settings = merge_ds_config(
        load_ds_config(args.ds_config), config, world=launch.world, device=device.type, hidden_size=shape["hidden_size"]
    )
    layout = ParallelLayout.create(sp)
    started, start = time.time(), list[str]()
    memory, (memory_gib, _) = device_memory(device), own_memory_gib(device)
    kernel_name = "" if args.kernel == "auto" else args.kernel
    disk_gb_s = 0.0
    if args.offload_disk:
        disk_gb_s = measured_gb_s(args.offload_disk, device, launch.local_world, Agreement())
    known = known_run(
        config, settings, layout, device, memory_gib=memory_gib, kernel=kernel_name, disk_gb_s=disk_gb_s
    )  # fmt: skip
    facts = known.facts
    decisions = decided(known, device)
    disk = check_disk(known, decisions, device, Agreement())
    foreseen = foresee_run(replace(known, kernel=known.kernel or known.gpu.kernels[0]), decisions) or {}
    if launch.rank == 0:
        print(json.dumps({"foreseen": foreseen}), flush=True)
    built = build(
        known,
        layout,
        device,
        decisions=decisions,
        prepare=lambda model: start.append(fingerprint(model)) if args.fingerprint else None,
    )
    build_s = time.time() - started

    def prepare() -> tuple[Pack, float]:
        """This rank's pack, and the sum of weights over the packs of all ranks."""
        lengths = document_lengths(args)
        dealt = deal_documents(np.asarray(lengths), sp, -(-sum(lengths) // sp), cost_tokens) if sp > 1 else None
        if args.objective == "dpo":
            dealt = None  # pairs are always split
        order = [i for of_rank in dealt or [range(len(lengths))] for i in of_rank]
        lengths = [lengths[i] for i in order]
        pack = sample(lengths, shape["vocab_size"], dp_rank=layout.dp_rank, targets=args.targets)
        if dealt is not None:  # as the loader does: each rank holds whole documents
            ends = np.cumsum([len(of_rank) for of_rank in dealt])
            pack = replace(pack, rank_borders=(0, *(int(pack.cu_seqlens[end]) for end in ends)))
        if args.objective == "dpo":
            pack = with_pairs(pack, shape["vocab_size"], args.reference)
        weight = len(pack.pairs) if pack.pairs else pack.loss_weights.sum()
        total = torch.tensor(float(weight), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return pack, float(total) / sp  # every sp rank counted its whole pack

    cost_tokens = facts.equal_cost_tokens(lora=not args.full)
    pack, total_weight = prepare()
    targets = int(pack.loss_weights.sum())
    kept = passes = None
    if memory is not None and not args.no_rehearsal:
        settle(built.engine, layout, device)
        passes = choose_passes(built.engine, args.passes, pack, layout, device, memory)
        kept = rehearse(built.engine, built.recompute, pack, layout, device, memory)
    relief = built.recompute.relief(device) or nullcontext()

    def plain_step(i: int) -> float:
        with relief:
            total = backpropagate_pack(built.engine, pack, launch.world / total_weight, layout, device)
            total = total.reshape(-1)[0].double()
            dist.all_reduce(total)
            if args.grads and i == 0:
                save_gradients(built.model, args.grads, launch.rank)
            set_learning_rate(built.engine, config.optim.learning_rate)
            built.engine.step()
            return float(total) / total_weight

    def step(i: int) -> float:
        if not (args.profile and i == args.steps - 1):
            return plain_step(i)
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as prof:
            loss = plain_step(i)
            synchronize(device)
        if launch.rank == 0:
            print(prof.key_averages().table(sort_by="self_device_time_total", row_limit=24, max_name_column_width=60))
            print(shape_table(prof))
            prof.export_chrome_trace(args.profile)
        return loss

    times, losses = take_steps(args, step, device)
    timed = step_times(times[: len(times) - bool(args.profile)] or times)
    peak = peak_gib(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernel, reason = choose_kernel(
        args.kernel, device=device, dtype=dtype, heads=-(-facts.q_heads // sp), head_dim=facts.head_dim,
        spec=AttentionSpec(facts.head_dim**-0.5), lengths=lengths,
    )  # fmt: skip
    flops = facts.step_flops(lengths, lora=not args.full, targets=targets)
    if args.objective == "dpo" and built.engine.module.live_reference:
        flops += facts.forward_flops(lengths, targets=targets)
    flops *= layout.dp
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak_rate = peak_tflops(name)
    kind = "full" if args.full else "lora"
    if launch.rank == 0:
        torchrun = f"torchrun --nproc_per_node {launch.world} benchmarks/step.py"
        result = {
            **provenance(launch.world, torch, deepspeed, transformers, script=torchrun),
            "what": args.tag
            or (f"dpo pair {max(lengths)} sp{sp} {kind}" if args.objective == "dpo" else "")
            or f"step {args.shape} {tokens} x{len(lengths)} sp{sp} dp{layout.dp} {kind} {kernel.name}",
            **timed,
            "unit": "s",
            "tokens_per_s_per_gpu": round(tokens * layout.dp / timed["value"] / launch.world, 1),
            "peak_gib": peak,
            **{f"foreseen_{key}": foreseen[key] for key in ("step_s", "peak_gib") if key in foreseen},
            "mfu": round(flops / timed["value"] / launch.world / 1e12 / peak_rate, 4) if peak_rate else None,
            "kernel": f"{kernel.name}: {reason}",
            "recompute": kept or args.recompute,
            "base": known.base,
            **({"fetched_layers": [built.frozen.fetches, built.frozen.late]} if built.frozen else {}),
            **({"cap_gib": args.cap_gib} if args.cap_gib else {}),
            **({"disk": disk} if disk else {}),
            **({"reference": built.engine.module.reference, "passes": built.engine.module.passes, "why": passes}
               if args.objective == "dpo" else {}),
            "loss_first": round(losses[0], 5),
            "build_s": round(build_s, 1),
            "steps_s": [round(t, 3) for t in times],
            **({"fingerprint": start[0]} if start else {}),
        }  # fmt: skip
        print(json.dumps(result), flush=True)
        if args.append:
            append(args.append, result)
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


def with_pairs(pack: Pack, vocab_size: int, reference: str) -> Pack:
    """The documents two by two as preference pairs; `precomputed`: to the reference all tokens are equally likely."""
    from ds_longft.batch import Pairs

    counts = np.add.reduceat(pack.loss_weights, pack.cu_seqlens[:-1]).reshape(-1, 2)
    known = -np.log(vocab_size) * counts.astype(np.float64) if reference == "precomputed" else None
    return replace(pack, pairs=Pairs(np.ones(len(counts), dtype=np.float32), known))


if __name__ == "__main__":
    main()
