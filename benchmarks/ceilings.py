"""The least time a step can take with these kernels: attention and matrix products at the rates measured here, alone.

    python benchmarks/ceilings.py --documents 131072 --sp 2 --kernel flash-attn-4       one GPU measures for all
    python benchmarks/ceilings.py --shape qwen3-30b-a3b --documents 131072 --kernel flash-attn-4    a mixture
    python benchmarks/ceilings.py --shape hybrid8b --documents 131072 --kernel flash-attn-4         layers with a state
    python benchmarks/ceilings.py --shape tiny --documents 64x4 --sp 2 --kernel cpu     a rehearsal on a CPU

The floor of a step is, for each layer, the attention forward once and its backward on exactly the heads and document
lengths that a rank has under --sp, and each linear's product forward and for its input's gradient (with --full for the
weight's own gradient too) on the rank's tokens; once more for the head. Of experts it is the grouped products, in the
tiles of training, with as many tokens for each. Of layers with a state it is the convolution and the recurrence, by the
kernels that training calls, on the rank's heads. Layers with a window are measured with it. Nothing is computed twice,
nothing is communicated, norms, activations, adapters and the optimizer take no time. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.attention_kernels import Pack, first_ms, median_ms
from benchmarks.work import SHAPES, append, lengths_of, provenance, shape_of
from ds_longft.batch import Documents
from ds_longft.model.facts import ModelFacts, StateFacts
from ds_longft.sequence.experts import grouped, tile_of
from ds_longft.sequence.kernels import AttentionSpec, kernel_by_name
from ds_longft.sequence.state.families import state_layers
from ds_longft.sequence.state.recurrence import causal_conv, decayed_attention, delta_rule

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
    config = AutoConfig.for_model(**shape_of(args.shape, args.layers))
    model = ModelFacts.from_config(config)
    lengths = lengths_of(args.documents)
    if args.full and model.experts:
        parser.error("--full: gradients of experts' weights are not measured")
    tokens = sum(lengths) // args.sp
    attention = {window: attention_ms(args, model, lengths, device, window) for window in dict.fromkeys(model.windows)}
    forward_ms, backward_ms = attention.get(None) or next(iter(attention.values()))
    attention_ms_in_all = sum(sum(attention[window]) for window in model.windows)
    products: dict[tuple[int, int], tuple[float, float]] = {}  # (in, out) of a linear: ms, TFLOP/s
    for kind in model.kinds:
        for _, n_in, n_out in kind.linear_io:
            if (n_in, n_out) not in products:
                products[n_in, n_out] = product_ms(args, (n_in, n_out), tokens, device)
    linears_ms = sum(
        count * products[n_in, n_out][0] for kind, count in model.kinds.items() for _, n_in, n_out in kind.linear_io
    )
    head_ms, head_tflops = product_ms(args, (model.hidden, model.vocab), tokens, device)
    experts_ms, experts_tflops = grouped_ms(args, model, tokens, device)
    with torch.device("meta"):
        mixers = [mixer for _, mixer in state_layers(AutoModelForCausalLM.from_config(config))]
    states = {kind.state: state_ms(args, mixers[0], kind.state, lengths, device) for kind in model.kinds if kind.state}
    states_ms = sum(count * sum(states[kind.state]) for kind, count in model.kinds.items() if kind.state)
    floor_s = 1e-3 * (attention_ms_in_all + linears_ms + model.expert_layers * experts_ms + states_ms + head_ms)
    pairs = sum(2.0 * n * n for n in lengths)  # causal: half of two products of L x L x d for each head
    tflop = 1e-12 * pairs * model.head_dim * (model.q_heads // args.sp)
    result = {
        **provenance(1, torch),
        "what": f"floor {args.shape} {args.documents} sp{args.sp} {'full' if args.full else 'lora'} {args.kernel}",
        "value": round(floor_s, 4),
        "unit": "s",
        "attention_forward_ms": round(forward_ms, 3),
        "attention_backward_ms": round(backward_ms, 3),
        "attention_forward_tflops": round(tflop / forward_ms * 1e3, 1),
        "attention_backward_tflops": round(2.5 * tflop / backward_ms * 1e3, 1),
        "attention_of_all_layers_ms": round(attention_ms_in_all, 3),
        "linears_of_all_layers_ms": round(linears_ms, 3),
        "experts_of_a_layer_ms": round(experts_ms, 3),
        "experts_tflops": round(experts_tflops, 1),
        "states_of_all_layers_ms": round(states_ms, 3),
        "state_forward_backward_ms": [[round(ms, 3) for ms in pair] for pair in states.values()],
        "head_ms": round(head_ms, 3),
        "head_tflops": round(head_tflops, 1),
        "linear_tflops": {f"{n_in}x{n_out}": round(rate, 1) for (n_in, n_out), (_, rate) in products.items()},
    }
    print(json.dumps(result), flush=True)
    if args.append:
        append(args.append, result)


def attention_ms(
    args: argparse.Namespace, model: ModelFacts, lengths: list[int], device: torch.device, window: int | None
) -> tuple[float, float]:
    """Forward and backward of one layer's attention over a whole pack, with the heads of one of the sp ranks."""
    heads = SimpleNamespace(
        q_heads=model.q_heads // args.sp,
        kv_heads=max(1, model.kv_heads // args.sp),
        head_dim=model.head_dim,
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


def state_ms(
    args: argparse.Namespace, mixer: nn.Module, state: StateFacts, lengths: list[int], device: torch.device
) -> tuple[float, float]:
    """Forward and backward of one layer's convolution and recurrence over a whole pack, with a rank's share of heads.

    Raises:
        SystemExit: no kernel for a kind of state is measured here.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, heads, groups = sum(lengths), state.heads // args.sp, max(1, state.groups // args.sp)
    documents = Documents(torch.tensor([0, *lengths], device=device).cumsum(0).int(), tuple(lengths))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, device=device, dtype=dtype)

    q, k, v = drawn(groups, state.keys), drawn(groups, state.keys), drawn(heads, state.values)
    g = -0.2 * torch.rand(tokens, heads, device=device)
    beta = torch.rand(tokens, heads, device=device, dtype=dtype)
    calls = {
        "delta": lambda *leaves: delta_rule(mixer, *leaves, beta, documents),
        "decay": lambda *leaves: decayed_attention(*leaves, documents),
    }
    if state.kind not in calls:
        raise SystemExit(f"no kernel is measured for layers of the kind {state.kind!r}")
    leaves = [t.requires_grad_() for t in (q, k, v, g)]
    channels = drawn(state.channels // args.sp).requires_grad_()
    weight = torch.randn(state.channels // args.sp, 4, device=device, dtype=dtype)
    works = (
        (lambda: calls[state.kind](*leaves), leaves),
        (lambda: causal_conv(channels, weight, None, "silu", documents.positions, documents), [channels]),
    )
    forward_ms = backward_ms = 0.0
    for forward, given in works:
        out = forward()
        dout = torch.randn_like(out)

        def backward(out: Tensor = out, given: list[Tensor] = given, dout: Tensor = dout) -> object:
            return torch.autograd.grad(out, given, dout, retain_graph=True)

        backward()  # compiles, as the first call above
        with torch.no_grad():
            forward_ms += median_ms(forward, device, args.budget_s)
        backward_ms += median_ms(backward, device, args.budget_s)
    return forward_ms, backward_ms


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


def grouped_ms(args: argparse.Namespace, model: ModelFacts, tokens: int, device: torch.device) -> tuple[float, float]:
    """Of a layer's experts on all of the rank's tokens: forward and input gradients, and TFLOP/s; zeros where none."""
    if not model.experts:
        return 0.0, 0.0
    experts, used = model.experts, model.experts_used
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tile = min(tile_of(experts, used, None), tokens)
    rows = tile * used
    ends = (torch.arange(1, experts + 1, device=device) * rows // experts).int()  # as many rows for each
    ms = flops = 0.0
    for sizes in model.expert_io:
        n_in, n_out = sizes  # gradients ask for the other order, whichever this is
        weight = torch.randn(experts, n_out, n_in, device=device, dtype=dtype)
        x, dy = (torch.randn(rows, n, device=device, dtype=dtype) for n in (n_in, n_out))
        for a, b in ((x, weight.transpose(1, 2)), (dy, weight)):
            grouped(a, b, ends)
            ms += median_ms(lambda a=a, b=b: grouped(a, b, ends), device, args.budget_s / 4)
            flops += 2.0 * rows * n_in * n_out
    return ms * tokens / tile, flops / ms / 1e9


if __name__ == "__main__":
    main()
