"""What the peers' steps share: the command line, the loss, the result line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from benchmarks.work import append, lengths_of, peak_gib, provenance, step_times


def parser(description: str, shapes: Sequence[str], attn: str) -> argparse.ArgumentParser:
    """The arguments that every peer takes."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shape", default=shapes[0], choices=shapes)
    found.add_argument("--layers", type=int, help="fewer layers than the shape has")
    found.add_argument("--documents", default="131072", help="document lengths, as step.py takes them")
    found.add_argument("--sp", type=int, help="default: all ranks")
    found.add_argument("--attn", default=attn, help="transformers' name of the attention kernel")
    found.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA r16 on all linears")
    found.add_argument("--steps", type=int, default=3, help="the first is warming up")
    found.add_argument(
        "--settle", action="store_true", help="go on, to 10 steps at most, until the last two are within 2 %%"
    )
    found.add_argument("--append", help="append the result to this file")
    found.add_argument("--fingerprint", action="store_true", help="name the weights that the first step starts from")
    found.add_argument("--grads", help="rank 0 writes gradients of the first step here (safetensors)")
    return found


def mean_loss(loss: Any) -> float:
    """Of the ranks' losses, each a tensor. Collective."""
    import torch.distributed as dist

    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def report(
    args: argparse.Namespace,
    name: str,
    script: str,
    modules: Sequence[ModuleType],
    steps: tuple[list[float], list[float]],
    device: Any,
    *,
    sp: int,
    build_s: float,
    start: str | None,
) -> None:
    """Rank 0 prints the result and appends it. Collective."""
    import torch.distributed as dist

    world, (times, losses) = dist.get_world_size(), steps
    peak, timed = peak_gib(device), step_times(times)
    tokens = sum(lengths_of(args.documents)) * world // sp
    result = {
        **provenance(world, *modules, script=f"torchrun --nproc_per_node {world} benchmarks/{script}"),
        "what": f"peer {name} {args.shape} {args.documents} sp{sp} {'full' if args.full else 'lora'} {args.attn}",
        **timed,
        "unit": "s",
        "tokens_per_s_per_gpu": round(tokens / timed["value"] / world, 1),
        "peak_gib": peak,
        "loss_first": round(losses[0], 5),
        "build_s": round(build_s, 1),
        "steps_s": [round(t, 3) for t in times],
        **({"fingerprint": start} if start else {}),
    }
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
        if args.append:
            append(args.append, result)
