"""What full fine-tuning under ZeRO-3 leaves is a folder that anybody loads, tied embeddings included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.pool import WorkerPool
from tests.unit.model.tiny import WINDOW, save_tiny

TOKENS = torch.arange(1, 20)[None]


def case(rank: int, world: int, base: str, out: str) -> list[list[float]]:
    """Load partitioned, write as the end of a run does; the logits it was written with."""
    import deepspeed

    from ds_longft.config.run_config import ModelConfig
    from ds_longft.model.load import load_config, load_model
    from ds_longft.train.weights import gather_weights

    engine_config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    source = ModelConfig(path=base)
    hf_config = load_config(source, WINDOW, attn_implementation="sdpa")
    model = load_model(
        source, hf_config, ds_engine_config=engine_config, dtype=torch.float32, device=torch.device("cpu")
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config)
    engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
    engine.step()
    engine.eval()
    logits = engine(input_ids=TOKENS).logits[0].detach()
    for parameter in model.parameters():  # small ones stay gathered for a while after a forward pass
        parameter.partition()
    state = gather_weights(model)
    if rank == 0:
        model.save_pretrained(out, state_dict=state)
    engine.destroy()
    return logits.tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_the_saved_model_is_the_engines(pools: Callable[[int], WorkerPool], tmp_path: Path, tied: bool) -> None:
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    logits = pools(2).run(case, str(base), str(tmp_path / "out"))[0]
    assert all(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(TOKENS).logits[0], torch.tensor(logits), rtol=1e-5, atol=1e-5)
