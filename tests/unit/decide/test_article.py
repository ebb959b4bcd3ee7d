"""What is known about long samples on one GPU (Pan, "Everything About Long Context Fine-tuning", 2024), as predictions.

Its 64K on one 80 GB GPU for Yi-9B is reproduced by the planner. Its 32K for a 13B is the limit of its tools (PEFT's
linears, the whole sample's logits at once), so those run here, under fake tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from ds_longft.batch import Documents
from ds_longft.decide.memory import SPARE_SHARE, predict
from ds_longft.decide.search import Question
from ds_longft.decide.setting import GIB, Gpu, Setting
from ds_longft.layout import ParallelLayout
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence.attention import ULYSSES, register
from tests.unit.decide.shapes import LLAMA_13B, YI_9B, sizes
from tests.unit.decide.tracked import Tracker, without_values

A100 = Gpu.load("a100-80")
K = 1024


def longest(model: ModelFacts, gpus: int = 1, **how: Any) -> int:
    """Tokens of the longest pack, every GPU with a sample of its own."""
    how = {"recompute": "full", "stage": 3, "resident": False, "fused": False, "kernel": "flash-attn-2", **how}
    setting = Setting((K,), world=gpus, **how)
    plan = Question(model, A100, gpus, 0.0, lora_r=setting.lora_r).longest(setting, "")
    return plan.setting.tokens if plan else 0


def test_yi_9b_fits_64k_on_one_a100_with_lora_checkpointing_and_flash_attention() -> None:
    assert longest(sizes(YI_9B), stage=2) >= 64 * K


def test_a_13b_with_full_multi_head_attention_fits_less() -> None:
    yi, big = longest(sizes(YI_9B), stage=2), longest(sizes(LLAMA_13B), stage=2)
    assert 32 * K <= big < 0.8 * yi


def test_fewer_kv_heads_allow_longer_samples() -> None:
    assert longest(sizes(YI_9B), stage=2) > longest(sizes(YI_9B, num_key_value_heads=32), stage=2)
    few, all_heads = (Setting((64 * K,), recompute="none", stage=2) for _ in range(2))
    assert memory_of(sizes(YI_9B), few) < memory_of(sizes(YI_9B, num_key_value_heads=32), all_heads)


def memory_of(model: ModelFacts, setting: Setting) -> float:
    return predict(model, setting, A100).peak


def test_checkpointing_saves_more_than_lora_and_sqrt_most() -> None:
    yi = sizes(YI_9B)
    none, full, sqrt = (longest(yi, stage=2, recompute=r) for r in ("none", "full", "sqrt"))
    assert 3 * none < full < sqrt


def test_without_lora_nothing_fits_on_one_gpu_and_its_gain_does_not_depend_on_the_length() -> None:
    yi = sizes(YI_9B)
    assert longest(yi, lora_r=None) == 0
    assert 0 < longest(yi, gpus=8, lora_r=None) < longest(yi, gpus=8)
    gains = [
        memory_of(yi, Setting((n * K,), world=8, resident=False, recompute="full", lora_r=None))
        - memory_of(yi, Setting((n * K,), world=8, resident=False, recompute="full"))
        for n in (32, 128)
    ]
    assert gains[0] == pytest.approx(gains[1], rel=0.1)


def its_tools(shape: dict[str, Any], tokens: int) -> float:
    """GiB at the peak of transformers' model and loss with PEFT's LoRA (dropout 0.05) and full checkpointing, bf16.

    Two layers are counted; each further one adds its weights and its input.
    """
    register()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        with ExitStack() as stack:
            without_values(stack)
            config = AutoConfig.for_model(**{**shape, "num_hidden_layers": 2, "use_cache": False})
            tracker = Tracker()
            with patch.object(nn.Module, "to", lambda module, *a, **k: module):
                model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ULYSSES)
                lora = peft.LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear")
                torch.set_default_dtype(torch.bfloat16)
                model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
                torch.set_default_dtype(torch.float32)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            with tracker:
                ids = torch.zeros(1, tokens, dtype=torch.int64)
                documents = Documents(torch.zeros(2, dtype=torch.int32), (tokens,))
                model(
                    input_ids=ids, labels=ids, documents=documents, layout=ParallelLayout(1, 0, 1), use_cache=False
                ).loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()
    inputs = (shape["num_hidden_layers"] - 2) * tokens * shape["hidden_size"] * 2
    return (tracker.peak + inputs + 2 * sizes(shape).weights) / GIB + A100.context_gib


def test_the_articles_tools_stop_at_32k_for_a_13b() -> None:
    usable = A100.memory_gib * (1 - SPARE_SHARE)
    assert its_tools(LLAMA_13B, 32 * K) < usable < its_tools(LLAMA_13B, 64 * K)
