"""Reading a long prompt and answering it over several GPUs, on random weights and random tokens.

    torchrun --nproc_per_node 2 benchmarks/prefill.py --tokens 131072
    torchrun --nproc_per_node 2 benchmarks/prefill.py --tokens 1048576 --layers 4 --new 8 --once
    torchrun --nproc_per_node 1 benchmarks/prefill.py --shape llama70b --quantize nf4 --new 8

Beside it the training forward of the same tokens: no gradients, no cache. Both are run three times, the shortest
counts: six forwards of a prompt. With --once the prompt is read once, behind a short one that warms up, and there is no
training forward: a million tokens through 4 layers are 35 s on two H200s. Each phase is said on stderr as it begins;
one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import SHAPES, append, peak_gib, provenance, sample, shape_of

WARM_TOKENS = 8192


def main() -> None:
    """Warm up, time, report."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--new", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--once", action="store_true", help="read the prompt once, and no training forward")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--quantize", default="auto", choices=["auto", "nf4", "int8", "fp8"])
    parser.add_argument("--weights", default="auto", choices=["auto", "resident", "sharded", "host"])
    parser.add_argument("--append", help="append the result to this file")
    args = parser.parse_args()

    import torch
    import transformers
    from transformers import AutoConfig

    from ds_longft.config.run_config import ModelConfig
    from ds_longft.objectives.forward import decode
    from ds_longft.ranks.join import Launch
    from ds_longft.sequence.shard import shard
    from ds_longft.sequence.state.families import spread_state_layers
    from ds_longft.tools.evaluate.cached_attention import CACHED, register
    from ds_longft.tools.evaluate.generate import Reader
    from ds_longft.tools.evaluate.processes import Processes
    from ds_longft.tools.evaluate.room import Asked, Room
    from ds_longft.tools.evaluate.subject import Subject, load_subject

    world = Launch.from_environment().world
    processes = Processes(world)
    layout, device = processes.layout, processes.device

    def say(phase: str) -> None:
        if layout.rank == 0:
            print(f"{time.monotonic() - began:6.1f} s: {phase}", file=sys.stderr, flush=True)

    say(f"loading {args.shape}")
    shape = shape_of(args.shape, args.layers)
    folder = Path(tempfile.gettempdir()) / f"prefill-{args.shape}-{args.layers}-{layout.rank}"
    AutoConfig.for_model(**shape).save_pretrained(folder)
    config = ModelConfig(path=str(folder), random_weights=True, quantize=args.quantize)
    subject = Subject(config, None, str(folder), str(folder), None)
    register()
    needed: dict[str, float] = {}
    place = "resident" if args.weights == "auto" else args.weights
    if device.type == "cuda":
        room, asked = Room.of(subject, processes), Asked(args.tokens, 1, args.new)
        place = room.place(asked, args.weights)
        needed = room.needed_gib(asked, place)
    processes.join()
    local_world = processes.launch.local_world
    loaded = load_subject(subject, device, attention=CACHED, weights=place, local_world=local_world)
    model = loaded.plain
    spread_state_layers(model)
    pack = sample([args.tokens], shape["vocab_size"], dp_rank=0)
    ids = pack.input_ids.tolist()

    def seconds(phase: str, work: Callable[[], Any], times: int = 1 if args.once else 3) -> float:
        """The shortest of several."""
        taken = []
        for i in range(times):
            say(f"{phase}, {i + 1} of {times}")
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.monotonic()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.monotonic() - started)
        say(f"{phase}: {min(taken):.3f} s")
        return min(taken)

    def forward() -> None:
        with torch.no_grad():
            decode(model.get_decoder(), shard(pack, layout, device), layout, args.kernel)

    forward_s = None if args.once else seconds("training forward", forward)
    reader = Reader(loaded, layout, args.kernel)  # which tiles MLPs: behind the training forward
    if args.once:
        seconds("warming up", lambda: reader.read([ids[:WARM_TOKENS]]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prefill_s = seconds("prefill", lambda: reader.read([ids], args.new))
    reader.add([1])  # warming up
    added = args.new - 1
    decode_s = seconds(f"{added} tokens decoded", lambda: [reader.add([1]) for _ in range(added)], 1) / added
    peak = peak_gib(device)
    if layout.rank == 0:
        result = {
            **provenance(world, torch, transformers),
            "what": f"prefill {args.shape} {args.tokens} tokens, {shape['num_hidden_layers']} layers, sp {world}"
            + (f", {args.quantize}" if args.quantize != "auto" else "")
            + (f", weights {place}" if place != "resident" else ""),
            "value": round(args.tokens / prefill_s / world, 1),
            "unit": "tokens/s a GPU",
            "training_forward": forward_s and round(args.tokens / forward_s / world, 1),
            "share_of_training_forward": forward_s and round(forward_s / prefill_s, 3),
            "prefill_s": round(prefill_s, 3),
            "ms_a_decoded_token": round(1000 * decode_s, 2),
            "peak_gib": peak,
            "predicted_gib": {name: round(gib, 1) for name, gib in needed.items()},
        }
        print(json.dumps(result), flush=True)
        if args.append:
            append(args.append, result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
