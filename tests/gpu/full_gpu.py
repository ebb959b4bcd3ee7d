"""Three steps of a small Llama with everything kept. `python -m tests.gpu.full_gpu hog`: before the second, another process
takes away the memory in which it was kept. Prints a JSON line: losses, GiB given back in each step, groups kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
from transformers import AutoConfig

from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.run_config import RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.ranks.join import Launch, join
from ds_longft.train.device_memory import device_memory
from ds_longft.train.engine import build
from ds_longft.train.install import known_run
from ds_longft.train.rehearse import rehearse, settle
from ds_longft.train.step import apply_step, backpropagate
from tests.distributed.models import make_pack

TOKENS = 65536
SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 1 << 17,
}  # fmt: skip
HOLD = "import sys, torch; x = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"


def main(hog: bool) -> None:
    device, _ = join(Launch.from_environment())
    folder = tempfile.mkdtemp()
    AutoConfig.for_model(**SHAPE).save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "sp": 1,
            "model": {"path": folder, "random_weights": True},
            "data": {"train": ["unused.jsonl"], "max_length_tokens": TOKENS},
            "train": {"deterministic": True},
        }
    )
    settings = merge_ds_config(
        load_ds_config("ds_configs/zero2_sp.json"), config, world=1, device="cuda", hidden_size=SHAPE["hidden_size"]
    )
    layout = ParallelLayout.create(1)
    known = known_run(config, settings, layout, device, memory_gib=30.0)  # auto stays auto
    built = build(known, layout, device)
    memory, pack = device_memory(device), make_pack([TOKENS], seed=0)
    settle(built.engine, layout, device)
    rehearse(built.engine, built.recompute, pack, layout, device, memory)
    assert memory is not None
    needed, relief = memory.peak(), built.recompute.relief(device)
    assert relief is not None
    losses, given, other = [], [], None
    for step in range(3):
        if hog and step == 1:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            leave = needed - torch.cuda.memory_allocated(device) + (6 << 30)  # for the step, and a part of what is kept
            other = subprocess.Popen(
                [sys.executable, "-c", HOLD, str(free - leave)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
        with relief:
            total = backpropagate(built.engine, [pack], float(pack.loss_weights.sum()), layout, device)
            apply_step(built.engine, float(total), skip=False)
        losses.append(float(total))
        given.append(round(relief.take_note() / 2**30, 2))
    if other is not None:
        other.communicate("\n")
    kept = sum(len(keep.on_device) for keep in built.recompute.keep)
    print(json.dumps({"losses": losses, "given_gib": given, "kept": kept}))


if __name__ == "__main__":
    main("hog" in sys.argv[1:])
