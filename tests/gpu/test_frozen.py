"""Frozen weights in a home of their own, on GPUs: the same to the bit as weights that stay, brought while the GPU computes, and
the host waits for none of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.pool import free_port

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a GPU")]

ROOT = Path(__file__).resolve().parents[2]
SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 7,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 1 << 17,
}  # fmt: skip


def three_steps(folder: Path, base: str, ranks: int) -> dict[str, Any]:
    """The JSON line of `frozen_gpu`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(free_port()), "-m", "tests.gpu.frozen_gpu", str(folder), base]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"base"')))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_to_the_bit_and_never_waited_for(tmp_path: Path, ranks: int) -> None:
    if ranks > GPUS:
        pytest.skip("needs two GPUs")
    with torch.device("cuda"):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    del model
    torch.cuda.empty_cache()
    there = three_steps(tmp_path, "resident", ranks)
    for base in ["host", *["sharded"] * (ranks > 1)]:
        away = three_steps(tmp_path, base, ranks)
        assert (away["losses"], away["adapters"]) == (there["losses"], there["adapters"])
        assert away["fetched"] >= 2 * (SHAPE["num_hidden_layers"] - 2)
        assert away["late"] == 0
        assert away["beside_compute"] > 0.9
