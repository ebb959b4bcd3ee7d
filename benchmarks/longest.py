"""How long a sample may be: ours and the peer's, on the same GPUs with the same memory, by trying.

    python benchmarks/longest.py --layers 15 --leave_gib 79            every weight trained, as on an 80 GB GPU
    python benchmarks/longest.py --layers 2 --leave_gib 30.25          as all 32 on two of 79 GiB: 30 layers take 48.75
    python benchmarks/longest.py --lora --low 256K --high 1M --step 64K

Two steps at each length tried (the second holds the optimizer's states, which the first makes at its end), halving
what is open between --low, which should fit, and --high, which should not. Layers that are left out take no host
memory for their inputs: fewer layers stand for all only where the GPUs are full first. A GPU with more memory stands
in for one with less: this process holds what --leave_gib does not leave. The peer is ALST with all it has against
memory (tiled MLP, layer inputs in host memory); ours what `train.recompute: auto` makes of it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import SHAPES, append, start
from ds_longft.config.section import parse_tokens
from ds_longft.ranks.join import visible_gpus

AIM = 1.2  # ours begins at so many times the peer's longest


def main() -> None:
    """The peer first, then ours from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument(
        "--lora", action="store_true", help="LoRA r16 on all linears; left out, every weight is trained"
    )
    parser.add_argument("--leave_gib", type=float, help="of each GPU; left out, all of it")
    parser.add_argument("--host_gib", type=float, default=100.0, help="host memory that ours may use")
    parser.add_argument("--low", default="64K")
    parser.add_argument("--high", default="256K")
    parser.add_argument("--step", default="16K", help="lengths are multiples of this")
    parser.add_argument(
        "--ours_at",
        help="this length is tried of ours first, say the plan's longest; only where it does not fit is there a search",
    )
    parser.add_argument("--timeout_s", type=int, default=300, help="of one length; longer counts as not fitting")
    parser.add_argument("--append", help="append the result to this file")
    args = parser.parse_args()
    low, high, step = (int(parse_tokens(x)) for x in (args.low, args.high, args.step))
    ranks = max(1, visible_gpus())
    held = hold(args.leave_gib)
    tried: dict[str, dict[int, dict[str, Any]]] = {"peer": {}, "ours": {}}

    def fits(side: str, tokens: int) -> bool:
        tried[side][tokens] = found = probe(side, tokens, ranks, args)
        seen = found.get("error") or f"{found['value']} s, {found.get('peak_gib')} GiB"
        print(f"{side} {tokens:,}: {seen}", flush=True)
        return "error" not in found

    peer = longest(lambda tokens: fits("peer", tokens), low, high, step)
    begin = max(low, -(-int(AIM * peer) // step) * step)
    at = int(parse_tokens(args.ours_at)) if args.ours_at else 0
    ours = at if at and fits("ours", at) else longest(lambda tokens: fits("ours", tokens), begin, at or 2 * high, step)
    del held
    if not ours:
        raise SystemExit(f"ours does not fit {begin:,} tokens; the peer's longest is {peer:,}")
    best = tried["ours"][ours]
    kind = "lora" if args.lora else "full"
    layers = f" {args.layers} layers" if args.layers else ""
    memory = f", {args.leave_gib:g} GiB" if args.leave_gib else ""
    line = {
        **{key: best[key] for key in ("date", "commit", "machine", "versions")},
        "command": f"python benchmarks/longest.py {shlex.join(sys.argv[1:])}",
        "what": f"longest tokens {args.shape}{layers} {kind} sp{ranks}{memory}",
        "value": ours,
        "unit": "tokens",
        "peer_value": peer or None,
        "ratio": round(ours / peer, 3) if peer else None,
        **({} if peer else {"peer_below": low, "ratio_above": round(ours / low, 3)}),
        "step": step,
        "tried": {side: {n: f.get("error") or f["value"] for n, f in found.items()} for side, found in tried.items()},
        "peak_gib": best.get("peak_gib"),
        "peer_peak_gib": tried["peer"].get(peer, {}).get("peak_gib"),
    }
    print(json.dumps(line), flush=True)
    if args.append:
        append(args.append, line)


def longest(fits: Callable[[int], bool], low: int, high: int, step: int) -> int:
    """The longest multiple of `step` from `low` to below `high` that fits; 0 where `low` does not."""
    good, bad = low // step - 1, -(-high // step)
    while bad - good > 1:
        middle = low // step if good < low // step else (good + bad) // 2
        if fits(middle * step):
            good = middle
        elif good < low // step:
            return 0
        else:
            bad = middle
    return good * step if good >= low // step else 0


def probe(side: str, tokens: int, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Two steps at that length: the result, or {"error": why there is none}."""
    words = ["--shape", args.shape, "--documents", str(tokens), "--steps", "2", *([] if args.lora else ["--full"])]
    words += ["--layers", str(args.layers)] if args.layers else []
    cuda = visible_gpus() > 0
    if side == "ours":
        config = "ds_configs/zero2_sp.json" if args.lora else "ds_configs/zero3_sp.json"
        words += ["--ds_config", config, "--host_gib", str(args.host_gib), "--no_rehearsal"]
    else:
        words += ["--tiled_mlp", "--offload_ckpt", *(["--attn", "flash_attention_4"] if cuda else [])]
    script = {"ours": "step.py", "peer": "peer_alst.py"}[side]
    with tempfile.TemporaryDirectory() as folder:
        return start(script, ranks, words, Path(folder), args.timeout_s)


def hold(leave_gib: float | None) -> list[Any]:
    """Memory of every GPU taken away, until it is let go."""
    if leave_gib is None:
        return []
    import torch

    held = []
    for i in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(i)
        held.append(torch.empty(int(free - leave_gib * 2**30), dtype=torch.uint8, device=f"cuda:{i}"))
    return held


if __name__ == "__main__":
    main()
