"""The text model of a multimodal checkpoint through the engine: the step of the whole wrapper given text alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.distributed.models import built_run, make_pack, reference_sum, relative_error
from tests.distributed.pool import WorkerPool
from tests.unit.model.test_wrapped import save_wrapper

LENGTHS = (33, 20, 11)


def step(rank: int, world: int, folder: str, stage: int, lora: bool, out: str) -> Any:
    """Loss and gradients over both ranks; what the run would leave is written to `out`."""
    from transformers import AutoTokenizer

    from ds_longft.exactness.engine_step import step_gradients, weights_held
    from ds_longft.ranks.join import Agreement
    from ds_longft.train.step import backpropagate
    from ds_longft.train.weights import ModelWriter

    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "zero_force_ds_cpu_optimizer": False,
    }
    keys = {"lora": {"r": 4} if lora else None, "optim": {"type": "sgd"}, "model": {"path": folder}}
    built, layout = built_run(folder, ds, world, sp=2, **keys)
    pack = make_pack(LENGTHS, seed=0, multiple=2)
    with weights_held(built.engine):
        weight = float(pack.loss_weights.sum())
        found = step_gradients(built.engine, backpropagate, [pack], weight, layout, torch.device("cpu"))
    for p in built.model.parameters():
        if stage == 3:
            p.partition()
    ModelWriter(built.model, AutoTokenizer.from_pretrained(folder), Agreement()).write_all(Path(out), print)
    built.engine.destroy()
    return found.loss, found.grads


@pytest.mark.parametrize(("stage", "lora"), [(3, False), (3, True), (2, False)])
@pytest.mark.parametrize("model_type", ["gemma3", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_the_wrappers_step(
    pools: Callable[[int], WorkerPool], tmp_path: Path, model_type: str, stage: int, lora: bool
) -> None:
    base, out = save_wrapper(tmp_path / "base", model_type), tmp_path / "out"
    loss, grads = pools(2).run(step, str(base), stage, lora, str(out))[0]
    pack = make_pack(LENGTHS, seed=0, multiple=2)
    whole = AutoModelForImageTextToText.from_pretrained(base, attn_implementation="eager").eval()
    mean = reference_sum(whole, pack) / float(pack.loss_weights.sum())
    assert loss == pytest.approx(float(mean), rel=1e-6)
    if lora:
        assert not list(out.glob("model*.safetensors"))
        return
    mean.backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    ours, theirs = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (grads, expected))
    assert relative_error(ours, theirs) < 2e-6
    again = AutoModelForImageTextToText.from_pretrained(out)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
