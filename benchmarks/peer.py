"""What the peers' steps share: the command line, the loop that times them, the result line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from benchmarks.work import append, is_settled, lengths_of, peak_gib, provenance, slowest, step_times


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


def take_steps(
    args: argparse.Namespace, step: Callable[[bool], Any], device: Any, rank: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step, of the slowest rank, and the mean of the ranks' losses.

    `step` is told whether it is the first; it returns this rank's loss, a tensor. The peak counts from the second on.
    """
    import torch
    import torch.distributed as dist

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times, losses = list[float](), list[float]()
    for i in range(10 if args.settle else args.steps):
        if args.settle and is_settled(times):
            break
        synchronize()
        begin = time.time()
        loss = step(i == 0)
        synchronize()
        times.append(slowest(time.time() - begin, device))
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
        if i == 0 and device.type == "cuda" and args.steps > 1:
            torch.cuda.reset_peak_memory_stats()
        if rank == 0:
            print(f"step {i} loss {losses[-1]:.4f} {times[-1]:.2f} s", flush=True)
    return times, losses


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
) -> dict[str, Any]:
    """The result, printed and appended by rank 0. Collective."""
    import json

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
    return result
