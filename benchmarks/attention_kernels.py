"""Attention kernels against each other: TFLOP/s forward and backward, and what a document length not seen before costs.

    python benchmarks/attention_kernels.py                               # every kernel that fits, on the GPU
    python benchmarks/attention_kernels.py --kernels cudnn,varlen --mixes 2x65536,32x4096
    python benchmarks/attention_kernels.py --device cpu --mixes 1x512,4x128 --kernels cpu,math --dtype float32

One JSON object a line for each figure, ready for results.jsonl, then a table. Its last column is what a pack costs all
layers of a model when every document length in it is new, as lengths of real data are: where the cheapest kernel
changes between `cudnn` and `varlen` is where `CUDNN_MIN_WORK` belongs.

This file must not be called kernels.py: transformers imports a package of that name, and Python would find it here.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from ds_longft.batch import Documents
from ds_longft.sequence.kernels import (
    CUDNN_MIN_WORK,
    KERNELS,
    AttentionSpec,
    Job,
    Kernel,
    Saved,
    choose_kernel,
    kernel_by_name,
)

MIXES = "1x131072,2x65536,4x32768,8x16384,16x8192,64x2048,512x256"


def stamp(device: torch.device) -> dict[str, object]:
    """What every line of results.jsonl says about where it comes from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or None,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions,
        "command": f"python {shlex.join(sys.argv)}",
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Median wall time of a call that is waited for; 3 to 20 calls, fewer when they are slow."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < budget_s):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


class Pack:
    """Random q, k, v as slices of one buffer, as the exchange between ranks hands them over."""

    def __init__(self, args: argparse.Namespace, lengths: list[int]) -> None:
        device, dtype, tokens = torch.device(args.device), getattr(torch, args.dtype), sum(lengths)
        heads = [args.q_heads, args.kv_heads, args.kv_heads]
        wide = torch.randn(tokens, sum(heads), args.head_dim, device=device, dtype=dtype)
        self.q, self.k, self.v = wide.split(heads, 1)
        self.dout = torch.randn(tokens, args.q_heads, args.head_dim, device=device, dtype=dtype)
        borders = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        self.documents = Documents(borders, tuple(lengths))
        self.spec = AttentionSpec(args.head_dim**-0.5)
        # causal: half of the two products of L x L x d
        self.forward_tflop = sum(2 * n * n * args.q_heads * args.head_dim for n in lengths) / 1e12

    def forward(self, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.forward(self.q, self.k, self.v, self.documents, self.spec)

    def backward(self, kernel: Kernel, out: torch.Tensor, lse: torch.Tensor) -> object:
        saved = Saved(self.q, self.k, self.v, out, lse)
        return kernel.backward(self.dout, saved, self.documents, self.spec)


def first_ms(pack: Pack, kernel: Kernel, device: torch.device) -> float:
    """Wall time of forward and backward together, once."""
    wait(device)
    start = time.perf_counter()
    pack.backward(kernel, *pack.forward(kernel))
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def measure(kernel: Kernel, documents: int, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Steady times of one mix, and the price of one new document length."""
    device = torch.device(args.device)
    pack = Pack(args, [length] * documents)
    build_ms = first_ms(pack, kernel, device)  # compiles, plans, warms up
    out, lse = pack.forward(kernel)
    forward_ms = median_ms(lambda: pack.forward(kernel), device, args.budget_s)
    backward_ms = median_ms(lambda: pack.backward(kernel, out, lse), device, args.budget_s)
    fresh = Pack(args, [length - 8])
    first = first_ms(fresh, kernel, device)
    new_length_ms = max(0.0, first - first_ms(fresh, kernel, device))
    return {
        "forward": pack.forward_tflop / forward_ms * 1e3,
        "backward": 2.5 * pack.forward_tflop / backward_ms * 1e3,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "new_length_ms": new_length_ms,
        "first_call_ms": build_ms,
        "pack_ms": args.layers * (forward_ms + backward_ms) + documents * new_length_ms,
    }


UNITS = {"forward": "TFLOP/s", "backward": "TFLOP/s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", default=MIXES, help="documents x tokens, comma-separated")
    parser.add_argument("--kernels", default=",".join(kernel.name for kernel in KERNELS if kernel.name != "math"))
    parser.add_argument("--q-heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32, help="layers that share a plan, for the last column")
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds spent on repeating one measurement")
    args = parser.parse_args()
    device = torch.device(args.device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    mixes = [tuple(map(int, mix.split("x"))) for mix in args.mixes.split(",")]
    common = stamp(device)

    kernels = []
    for name in args.kernels.split(","):
        reason = kernel_by_name(name).refuses(
            Job(device.type, getattr(torch, args.dtype), args.head_dim, AttentionSpec(1.0), capability)
        )
        if reason is None:
            kernels.append(kernel_by_name(name))
        else:
            print(json.dumps({"what": f"attention, {name}", "refused": reason}), flush=True)

    rows = []
    for documents, length in mixes:
        for kernel in kernels:
            figures = measure(kernel, documents, length, args)
            rows.append((documents, length, kernel.name, figures))
            for what, value in figures.items():
                line = {"what": f"attention {what.removesuffix('_ms')}, {kernel.name}, {documents} x {length}"}
                line |= {"value": round(value, 3), "unit": UNITS.get(what, "ms")}
                line |= {"q_heads": args.q_heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
                print(json.dumps(line | {"dtype": args.dtype} | common), flush=True)

    print(f"\n{args.q_heads} q / {args.kv_heads} kv heads, d {args.head_dim}, {args.dtype}, {common['machine']}")
    print(
        f"the last column: {args.layers} layers, forward and backward, with every document length new; * is the least"
    )
    print(
        f"{'documents':>14} {'kernel':>13} {'fwd TFLOP/s':>12} {'bwd TFLOP/s':>12} {'new length ms':>14} {'pack ms':>9}"
    )
    for documents, length, name, figures in rows:
        best = min(row[3]["pack_ms"] for row in rows if row[:2] == (documents, length))
        print(
            f"{f'{documents} x {length}':>14} {name:>13} {figures['forward']:12.1f} {figures['backward']:12.1f} "
            f"{figures['new_length_ms']:14.1f} {figures['pack_ms']:10.1f}{'*' if figures['pack_ms'] == best else ''}"
        )
    tokens = round((CUDNN_MIN_WORK / (args.q_heads * args.head_dim)) ** 0.5)
    print(f"\nauto, with cudnn from a root mean square of {tokens} tokens on:")
    for documents, length in mixes:
        chosen, why = choose_kernel(
            "auto",
            device=device,
            dtype=getattr(torch, args.dtype),
            heads=args.q_heads,
            head_dim=args.head_dim,
            spec=AttentionSpec(1.0),
            lengths=[length] * documents,
        )
        print(f"{f'{documents} x {length}':>14} {chosen.name:>13}  {why}")


if __name__ == "__main__":
    main()
