"""The least time a step can take with these kernels: attention and matrix products at the rates measured here, alone.

    python benchmarks/ceilings.py --documents 131072 --sp 2 --kernel flash-attn-4       one GPU measures for all
    python benchmarks/ceilings.py --shape qwen3-30b-a3b --documents 131072 --kernel flash-attn-4    a mixture
    python benchmarks/ceilings.py --shape tiny --documents 64x4 --sp 2 --kernel cpu     a rehearsal on a CPU

The floor of a step is, for each layer, the attention forward once and its backward on exactly the heads and document
lengths that a rank has under --sp, and each linear's product forward and for its input's gradient (with --full for the
weight's own gradient too) on the rank's tokens; once more for the head. Of experts it is the grouped products, in the
tiles of training, with as many tokens for each. Layers with a window are measured with it. Nothing is computed twice,
nothing is communicated, norms, activations, adapters and the optimizer take no time. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.attention_kernels import Pack, first_ms, median_ms
from benchmarks.work import SHAPES, append, lengths_of, provenance, shape_of
from ds_longft.sequence.experts import grouped, tile_of
from ds_longft.sequence.kernels import AttentionSpec, kernel_by_name

MAX_ELEMENTS = 1 << 31  # of a product's result at a time: the head's is computed in parts, here as in training


def main() -> None:
    """Measure, add up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--documents", required=True, help="document lengths, as step.py takes them")
    parser.add_argument("--sp", type=int, default=1)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--full", action="store_true", help="weights are trained: their gradients count too")
    parser.add_argument("--budget_s", type=float, default=2.0, help="seconds spent on repeating one measurement")
    parser.add_argument("--append", help="append the result to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape_of(args.shape, args.layers)
    lengths = lengths_of(args.documents)
    if args.full and "num_experts_per_tok" in shape:
        parser.error("--full: gradients of experts' weights are not measured")
    windows = [shape["sliding_window"] if kind == "sliding_attention" else None for kind in layers_of(shape)]
    of_window = {window: attention_ms(args, shape, lengths, device, window) for window in dict.fromkeys(windows)}
    forward_ms, backward_ms = of_window.get(None, of_window[windows[0]])
    tokens = sum(lengths) // args.sp
    linears = {name: product_ms(args, sizes, tokens, device) for name, sizes in linears_of(shape).items()}
    linear_ms = sum(ms for name, (ms, _) in linears.items() if name != "lm_head")
    experts_ms, experts_tflops = grouped_ms(args, shape, tokens, device)
    all_attention_ms = sum(sum(of_window[window]) for window in windows)
    floor_s = 1e-3 * (all_attention_ms + len(windows) * (linear_ms + experts_ms) + linears["lm_head"][0])
    tflop = 1e-12 * forward_flops(shape, lengths, args.sp)
    result = {
        **provenance(1, torch),
        "what": f"floor {args.shape} {args.documents} sp{args.sp} {'full' if args.full else 'lora'} {args.kernel}",
        "value": round(floor_s, 4),
        "unit": "s",
        "attention_forward_ms": round(forward_ms, 3),
        "attention_backward_ms": round(backward_ms, 3),
        "attention_forward_tflops": round(tflop / forward_ms * 1e3, 1),
        "attention_backward_tflops": round(2.5 * tflop / backward_ms * 1e3, 1),
        "linears_of_a_layer_ms": round(linear_ms, 3),
        "experts_of_a_layer_ms": round(experts_ms, 3),
        "experts_tflops": round(experts_tflops, 1),
        "head_ms": round(linears["lm_head"][0], 3),
        "linear_tflops": {name: round(rate, 1) for name, (_, rate) in linears.items()},
    }
    print(json.dumps(result), flush=True)
    if args.append:
        append(args.append, result)


def attention_ms(
    args: argparse.Namespace, shape: dict[str, Any], lengths: list[int], device: torch.device, window: int | None
) -> tuple[float, float]:
    """Forward and backward of one layer's attention over a whole pack, with the heads of one of the sp ranks."""
    heads = SimpleNamespace(
        q_heads=shape["num_attention_heads"] // args.sp,
        kv_heads=max(1, shape["num_key_value_heads"] // args.sp),
        head_dim=head_dim_of(shape),
        device=device.type,
        dtype="bfloat16" if device.type == "cuda" else "float32",
    )
    kernel, pack = kernel_by_name(args.kernel), Pack(heads, lengths)
    pack.spec = AttentionSpec(pack.spec.scale, window)
    first_ms(pack, kernel, device)  # compiles, plans, warms up
    out, lse = pack.forward(kernel)
    return (
        median_ms(lambda: pack.forward(kernel), device, args.budget_s),
        median_ms(lambda: pack.backward(kernel, out, lse), device, args.budget_s),
    )


def forward_flops(shape: dict[str, Any], lengths: list[int], sp: int) -> float:
    """Of one layer's causal attention with the heads of one rank: half of two products of L x L x d a head."""
    head_dim = head_dim_of(shape)
    return sum(2.0 * n * n for n in lengths) * head_dim * (shape["num_attention_heads"] // sp)


def head_dim_of(shape: dict[str, Any]) -> int:
    """Size of a head."""
    return int(shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"])


def layers_of(shape: dict[str, Any]) -> list[str]:
    """Kind of each layer."""
    return list(shape.get("layer_types") or ["full_attention"] * shape["num_hidden_layers"])


def linears_of(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) features of a layer's linears and of the head."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = head_dim_of(shape)
    wide = head_dim * shape["num_attention_heads"]
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {
        "q_proj": (hidden, wide),
        "k_proj": (hidden, shape["num_key_value_heads"] * head_dim),
        "v_proj": (hidden, shape["num_key_value_heads"] * head_dim),
        "o_proj": (wide, hidden),
        **({} if "num_experts_per_tok" in shape else mlp),
        "lm_head": (hidden, shape["vocab_size"]),
    }


def product_ms(
    args: argparse.Namespace, sizes: tuple[int, int], tokens: int, device: torch.device
) -> tuple[float, float]:
    """Of one linear on all of the rank's tokens: forward and gradients together, and TFLOP/s."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parts = -(-tokens * sizes[1] // MAX_ELEMENTS)
    rows = -(-tokens // parts)
    x = torch.randn(rows, sizes[0], device=device, dtype=dtype)
    dy = torch.randn(rows, sizes[1], device=device, dtype=dtype)
    weight = torch.randn(sizes[1], sizes[0], device=device, dtype=dtype)
    products = [lambda: x @ weight.T, lambda: dy @ weight]  # out of place, as training has it
    if args.full:
        products.append(lambda: dy.T @ x)
    ms = 0.0
    for product in products:
        product()
        ms += median_ms(product, device, args.budget_s / 4)
    flops = 2.0 * rows * sizes[0] * sizes[1] * len(products)
    return ms * tokens / rows, flops / ms / 1e9


def grouped_ms(
    args: argparse.Namespace, shape: dict[str, Any], tokens: int, device: torch.device
) -> tuple[float, float]:
    """Of a layer's experts on all of the rank's tokens: forward and input gradients, and TFLOP/s; zeros where none."""
    used = shape.get("num_experts_per_tok")
    if used is None:
        return 0.0, 0.0
    experts = shape.get("num_experts") or shape["num_local_experts"]
    hidden, inner = shape["hidden_size"], shape.get("moe_intermediate_size") or shape["intermediate_size"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tile = min(tile_of(experts, used, None), tokens)
    rows = tile * used
    ends = (torch.arange(1, experts + 1, device=device) * rows // experts).int()  # as many rows for each
    ms = flops = 0.0
    for n_in, n_out in ((hidden, 2 * inner), (inner, hidden)):
        weight = torch.randn(experts, n_out, n_in, device=device, dtype=dtype)
        x, dy = (torch.randn(rows, n, device=device, dtype=dtype) for n in (n_in, n_out))
        for a, b in ((x, weight.transpose(1, 2)), (dy, weight)):
            grouped(a, b, ends)
            ms += median_ms(lambda a=a, b=b: grouped(a, b, ends), device, args.budget_s / 4)
            flops += 2.0 * rows * n_in * n_out
    return ms * tokens / tile, flops / ms / 1e9


if __name__ == "__main__":
    main()
