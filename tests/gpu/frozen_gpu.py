"""Three steps of a small Llama read from disk, its frozen weights where they are asked for. Prints a JSON line: losses, a
name of the adapters, and of streamed weights: layers brought, layers that came late, and the share of the copies' time in
which the GPU computed beside them. Waiting for the host while weights are sent for raises.

    torchrun --nproc_per_node 1 -m tests.gpu.frozen_gpu MODEL_FOLDER host
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.run_config import RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.ranks.join import Launch, join
from ds_longft.sequence.frozen import FrozenLayers
from ds_longft.train.engine import build
from ds_longft.train.install import known_run
from ds_longft.train.step import apply_step, backpropagate
from tests.distributed.models import make_pack

TOKENS = int(os.environ.get("FROZEN_TOKENS", "32768"))


@contextmanager
def no_host_waits() -> Iterator[None]:
    """Inside, an operation that waits for the GPU raises; on CPUs nothing does."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch(frozen: FrozenLayers) -> None:
    """Raise from now on where the host waits while a layer's weights are put in place and the next ones' sent for."""
    enter = frozen._enter

    def watched(index: int) -> None:
        with no_host_waits():
            enter(index)

    frozen._enter = watched  # type: ignore[method-assign]


def share_beside_compute(events: Any, copy: str) -> float:
    """Of the time of GPU events named so, how much other GPU work ran in."""
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [(e.time_range.start, e.time_range.end) for e in on_gpu if copy in e.name]
    work = sorted((e.time_range.start, e.time_range.end) for e in on_gpu if copy not in e.name)
    covered = total = 0.0
    for start, end in copies:
        total += end - start
        at = start
        for a, b in work:
            if b > at and a < end:
                covered += min(b, end) - max(a, at)
                at = max(at, min(b, end))
    return covered / total if total else 0.0


def main(folder: str, base: str) -> None:
    device, _ = join(Launch.from_environment())
    world = torch.distributed.get_world_size()
    config = RunConfig.model_validate(
        {
            "sp": world,
            "model": {"path": folder, "base": base},
            "lora": {"r": 8},
            "optim": {"learning_rate": 0.01},
            "data": {"train": ["unused.jsonl"], "max_length_tokens": TOKENS},
            "train": {"deterministic": True, "recompute": "keep_attention"},
        }
    )
    settings = merge_ds_config(
        load_ds_config("ds_configs/zero2_sp.json"), config, world=world, device=device.type, hidden_size=2048
    )
    layout = ParallelLayout.create(world)
    built = build(known_run(config, settings, layout, device, memory_gib=30.0), layout, device)
    pack, losses = make_pack([TOKENS], seed=0, multiple=world), []

    def step() -> None:
        total = backpropagate(built.engine, [pack], float(pack.loss_weights.sum()), layout, device)
        losses.append(float(total))
        apply_step(built.engine, losses[-1], skip=False)

    step()  # which layer follows which is learned
    found: dict[str, Any] = {}
    if built.frozen is not None:
        brought = built.frozen.fetches, built.frozen.late
        watch(built.frozen)
    step()
    if built.frozen is not None:
        found = {"fetched": built.frozen.fetches - brought[0], "late": built.frozen.late - brought[1]}
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda" and built.frozen is not None:
        name = "Memcpy HtoD" if base == "host" else "AllGather"
        found["beside_compute"] = round(share_beside_compute(profiled.events(), name), 3)
    weights = [p.detach().float().cpu().numpy().tobytes() for p in built.model.parameters() if p.requires_grad]
    name = hashlib.sha256(b"".join(weights)).hexdigest()[:16]
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"base": base, "losses": losses, "adapters": name, **found}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
