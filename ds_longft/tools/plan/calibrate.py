"""`ds-longft plan --calibrate FILE`: this machine's rates, measured in under a minute, as a file for `--gpu FILE`.

One process measures products, attention kernels, elementwise bandwidth and host copies. The exchange needs two GPUs:
started under a launcher, every rank takes part and rank 0 writes; alone, the links are those of the nearest type.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_longft.batch import Documents
from ds_longft.decide.setting import GIB, Gpu, shipped_gpus
from ds_longft.errors import ConfigError, ModelError
from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.kernels.base import AttentionSpec, Job, Saved
from ds_longft.sequence.kernels.table import KERNELS

LENGTHS_TOKENS = (4096, 16384, 65536)
HEADS = (16, 4, 128)  # query heads, key/value heads, head size
PRODUCT = (32768, 4096, 14336)  # rows, in, out
COPY_BYTES = 1 << 30
WARM_S = 3.0  # clocks settle under load before the sustained product is timed


def calibrate(path: str) -> None:
    """Measure and write; prints each rate as it comes.

    Raises:
        ConfigError: no GPU here.
    """
    if not torch.cuda.is_available():
        raise ConfigError("plan --calibrate measures this machine's GPU, and torch sees none")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl", device_id=device)
    gpu = measure(device, ranks)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(path).write_text(json.dumps(asdict(gpu), indent=2) + "\n", encoding="utf-8")
        print(f"written: {path}. Use it with --gpu {path}")
    if ranks > 1:
        dist.destroy_process_group()


def measure(device: torch.device, ranks: int) -> Gpu:
    """Every rate of one `Gpu`."""
    properties = torch.cuda.get_device_properties(device)
    name = properties.name
    near = _nearest(name)
    say = print if int(os.environ.get("RANK", "0")) == 0 else (lambda *_: None)
    short, sustained = products(device)
    say(f"bf16 product {PRODUCT}: {short:.0f} TFLOP/s, after {WARM_S:.0f} s of load {sustained:.0f}")
    attention = {}
    for kernel in KERNELS:
        rates = attention_rates(kernel, device)
        if rates:
            attention[kernel.name] = rates
            say(f"{kernel.name}: {rates}")
    memory, host = elementwise_gb_s(device), host_gb_s(device)
    say(f"elementwise {memory:.0f} GB/s, host copies {host:.1f} GB/s")
    exchange, gather = links(device, ranks) if ranks > 1 else (near.all_to_all_gb_s, near.all_gather_gb_s)
    say(f"all-to-all sent {exchange:.0f} GB/s, all-gather received {gather:.0f} GB/s" + (" (shipped)" * (ranks == 1)))
    free, total = torch.cuda.mem_get_info(device)
    others = (total - free - torch.cuda.memory_reserved(device)) / GIB
    return replace(
        near,
        name=name,
        source="measured",
        about=f"{ranks} x {name}, torch {torch.__version__}; by ds-longft plan --calibrate",
        capability=(properties.major, properties.minor),
        memory_gib=properties.total_memory / GIB,
        context_gib=others if ranks == 1 else near.context_gib,
        nccl_gib=max(0.0, others - near.context_gib) if ranks > 1 else near.nccl_gib,
        gemm_tflops=short,
        attention_tflops=attention or near.attention_tflops,
        memory_gb_s=memory,
        all_to_all_gb_s=exchange,
        all_gather_gb_s=gather,
        host_gb_s=host,
        sustained={**near.sustained, "gemm": min(1.0, sustained / short)},
    )


def timed(work: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Median seconds of a call, after one that warms up."""
    work()
    seconds = []
    for _ in range(times):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[times // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(
    device: torch.device, shape: tuple[int, int, int] = PRODUCT, warm_s: float = WARM_S
) -> tuple[float, float]:
    """TFLOP/s of a large bf16 product: cold, and when the GPU has been busy for a while."""
    rows, width, out = shape
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    w = torch.randn(width, out, device=device, dtype=torch.bfloat16)
    work = 2 * rows * width * out / 1e12
    short = work / timed(lambda: x @ w, device)
    until = time.perf_counter() + warm_s
    while time.perf_counter() < until:
        for _ in range(10):
            x @ w
        _wait(device)
    return short, work / timed(lambda: x @ w, device)


def attention_rates(
    kernel: Any, device: torch.device, lengths: tuple[int, ...] = LENGTHS_TOKENS, heads: tuple[int, int, int] = HEADS
) -> dict[str, list[list[float]]]:
    """[tokens of a document, TFLOP/s], forward and backward; empty where the kernel does not run here.

    In packs of the longest length: one short document by itself does not fill a GPU, and nobody trains that.
    """
    q_heads, kv_heads, d = heads
    spec = AttentionSpec(d**-0.5)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if kernel.name == "math" or kernel.refuses(Job(device.type, dtype, d, spec, capability)):
        return {}
    rates: dict[str, list[list[float]]] = {"forward": [], "backward": []}
    for tokens in lengths:
        docs = max(lengths) // tokens
        q, dout = (torch.randn(docs * tokens, q_heads, d, device=device, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(docs * tokens, kv_heads, d, device=device, dtype=dtype) for _ in range(2))
        cu = torch.arange(docs + 1, device=device, dtype=torch.int32) * tokens
        pairs = docs * q_heads * d * tokens * (tokens + 1) / 2 / 1e12
        own = (Documents(cu, (tokens,) * docs), spec)
        try:
            out, lse = kernel.forward(q, k, v, *own)
            forward = timed(lambda: kernel.forward(q, k, v, *own), device)  # noqa: B023 - called here
            backward = timed(lambda: kernel.backward(dout, Saved(q, k, v, out, lse), *own), device)  # noqa: B023
        except (ModelError, RuntimeError) as error:  # a kernel that imports but was built for another GPU
            print(f"{kernel.name} does not run here: {str(error).splitlines()[0]}")
            return {}
        rates["forward"].append([tokens, float(f"{4 * pairs / forward:.4g}")])
        rates["backward"].append([tokens, float(f"{10 * pairs / backward:.4g}")])
    return rates


def elementwise_gb_s(device: torch.device, size: int = COPY_BYTES) -> float:
    """GB/s read and written by a sum of two tensors."""
    a, b = (torch.randn(size // 4, device=device, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(a)
    return 3 * size / timed(lambda: torch.add(a, b, out=out), device) / 1e9


def host_gb_s(device: torch.device, size: int = COPY_BYTES) -> float:
    """GB/s of the slower direction, through the memory that kept tensors use."""
    x = torch.empty(size, device=device, dtype=torch.uint8)
    memory = HostStore(device).buffer("calibration", x)
    out = timed(lambda: memory.copy_(x, non_blocking=True), device)
    back = timed(lambda: x.copy_(memory, non_blocking=True), device)
    return size / max(out, back) / 1e9


def links(device: torch.device, ranks: int, size: int = COPY_BYTES) -> tuple[float, float]:
    """GB/s that each rank sends in an all-to-all, and receives in an all-gather."""
    sent = torch.empty(size // 2 // ranks * ranks, device=device, dtype=torch.bfloat16)
    received = torch.empty_like(sent)
    exchange = timed(lambda: dist.all_to_all_single(received, sent), device)
    part = sent[: len(sent) // ranks]
    gather = timed(lambda: dist.all_gather_into_tensor(received, part), device)
    away = 2 * len(sent) * (ranks - 1) / ranks
    return away / exchange / 1e9, away / gather / 1e9


def _nearest(name: str) -> Gpu:
    """The shipped type whose name shares most words with this GPU's."""
    words = set(name.replace("-", " ").split())
    return max((Gpu.load(n) for n in shipped_gpus()), key=lambda g: len(words & set(g.name.replace("-", " ").split())))
