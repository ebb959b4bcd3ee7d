"""Loss, rewards and gradients are those of TRL's DPOTrainer on the same model and the same pairs, to 1e-5 in float32: TRL makes the batch from text, and what it made is laid into a pack here."""

from __future__ import annotations

import importlib.util
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_longft.batch import IGNORE_INDEX, Pack, Pairs
from ds_longft.config.run_config import DpoConfig, LoraConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import add_lora
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.objectives.pair_loss import METRICS
from ds_longft.objectives.passes import backpropagate_pairs
from ds_longft.sequence.attention import ULYSSES, register
from tests.distributed.models import relative_error, tiny_config, tiny_model
from tests.distributed.test_dpo_exact import CPU, PlainEngine
from tests.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install -e .[dev]")

LORA = LoraConfig(r=4, alpha=16)


def model_of(attn: str) -> Any:
    register()
    config = tiny_config("llama", vocab_size=600, max_position_embeddings=512, num_hidden_layers=2)
    return tiny_model(config, attn=attn, dtype=torch.float32, std=0.08)


def rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def words(most: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=rng.randint(2, most)))

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": said("user", words(60)),
            "chosen": said("assistant", words(30)),
            "rejected": said("assistant", words(50)),
        }
        for _ in range(count)
    ]


def trl_step(tmp_path: Path, lora: bool, count: int, **settings: Any) -> tuple[Any, dict[str, float], dict[str, Any]]:
    """(batch, loss and metrics, gradients by name) of one step of TRL."""
    from datasets import Dataset
    from peft import LoraConfig as PeftLora
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=count, report_to="none", use_cpu=True, bf16=False, max_length=None,
        gradient_checkpointing=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    model, data = model_of("eager"), Dataset.from_list(rows(count))
    peft = (
        PeftLora(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    )
    reference = None if lora else model_of("eager")
    trainer = DPOTrainer(
        model, reference, args, train_dataset=data, processing_class=tiny_tokenizer(), peft_config=peft
    )
    model = trainer.model
    changed(model, lora)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    values = {"loss": float(loss), **{name: trainer._metrics["train"][name][0] for name in METRICS}}
    return batch, values, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def changed(model: Any, lora: bool) -> Any:
    """A model that is no longer its reference; by names, so that it is the same one in both."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise * 0.1 if lora else p + noise * 0.02)
    return model


def packed(batch: Any) -> Pack:
    """The documents of TRL's padded batch [chosen..., rejected...], pairs side by side."""
    count = len(batch["input_ids"]) // 2
    ids, labels = [], []
    for i in (side * count + pair for pair in range(count) for side in (0, 1)):
        length = int(batch["attention_mask"][i].sum())
        tokens, mask = batch["input_ids"][i][:length].numpy(), batch["completion_mask"][i][:length].numpy()
        ids.append(tokens)
        labels.append(np.append(np.where(mask[1:] == 1, tokens[1:], IGNORE_INDEX), IGNORE_INDEX))
    every = np.concatenate(labels)
    return Pack(
        np.concatenate(ids), np.concatenate([np.arange(len(x)) for x in ids]), every,
        (every != IGNORE_INDEX).astype(np.float32), np.cumsum([0, *map(len, ids)]).astype(np.int32), 0,
        pairs=Pairs(np.ones(count, dtype=np.float32)),
    )  # fmt: skip


def our_step(pack: Pack, lora: bool, dpo: DpoConfig) -> tuple[dict[str, float], dict[str, Any]]:
    base = model_of(ULYSSES)
    model = changed(add_lora(base, LORA, seed=0) if lora else base, lora)
    second = None if lora or dpo.loss == "simpo" else model_of(ULYSSES)
    engine = PlainEngine(DpoObjective(model, ParallelLayout(1, 0, 1), dpo, reference_model=second))
    count = len(pack.pairs)
    sums = backpropagate_pairs(engine, pack, 1 / count, ParallelLayout(1, 0, 1), CPU)
    means = dict(zip(("loss", *METRICS), (sums / count).tolist(), strict=True))
    return means, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CASES = [
    # LoRA, pairs, TRL's settings, ours
    (True, 3, {"beta": 0.1}, {"beta": 0.1}),
    (False, 3, {"beta": 0.4}, {"beta": 0.4, "passes": "two"}),
    (True, 4, {"loss_type": "ipo", "beta": 0.2}, {"loss": "ipo", "beta": 0.2}),
    (False, 1, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.6]}, {"rpo_alpha": 0.6}),
]


@pytest.mark.parametrize(("lora", "count", "theirs", "ours"), CASES)
def test_a_step_is_the_one_of_trl(lora, count, theirs, ours, tmp_path):
    batch, expected, ref = trl_step(tmp_path, lora, count, **theirs)
    means, grads = our_step(packed(batch), lora, DpoConfig(**ours))
    assert means["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    # TRL sums some 30 log-probabilities to -220 in float32, which resolves 1.5e-5 there; rewards are differences of two.
    assert means == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert set(grads) == set(ref)
    assert {n: f"{e:.1e}" for n in ref if (e := relative_error(grads[n], ref[n])) > 1e-5} == {}
