"""What is put onto a model before it is trained: liger's kernels, and whether frozen weights stay whole on each GPU (what
the JSON leaves open, what fits, what a checkpoint was made with).
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from ds_longft.config.ds_json import DeepSpeedSettings, merge_ds_config
from ds_longft.config.run_config import RunConfig
from ds_longft.decide.where_base_lies import settle_base
from ds_longft.model.facts import ModelFacts
from ds_longft.train.install import LIGER_OPS_BY_GRADIENT, fused_kernels
from tests.unit.decide.shapes import LLAMA_8B


def settings(config: RunConfig, **zero: Any) -> DeepSpeedSettings:
    section = {"stage": 3, "stage3_param_persistence_threshold": "auto", **zero}
    return merge_ds_config({"zero_optimization": section}, config, world=2, device="cuda", hidden_size=4096)


@pytest.mark.parametrize(
    ("memory_gib", "saved", "keys", "zero", "whole"),
    [
        (139.8, None, {}, {}, True),
        (42.0, None, {}, {}, False),  # 15 GiB are more than 0.35 of it
        (60.0, None, {"model": {"dtype": "fp32"}}, {}, False),  # 30 GiB
        (42.0, 2, {}, {}, True),  # how full a GPU is at this start decides nothing that was decided before
        (139.8, 3, {}, {}, False),
        (139.8, None, {"lora": None}, {}, False),
        (139.8, None, {}, {"offload_param": {"device": "cpu"}}, False),
        (139.8, None, {}, {"stage3_param_persistence_threshold": 10**6}, False),
        (None, None, {}, {}, False),  # a CPU
    ],
)
def test_who_stays_whole(memory_gib: float | None, saved: int | None, keys: Any, zero: Any, whole: bool) -> None:
    config = RunConfig.model_validate({"lora": {"r": 16}, **keys})
    found = settings(config, **zero)
    facts = ModelFacts.from_config(AutoConfig.for_model(**LLAMA_8B))
    base, why = settle_base(found, config, facts, memory_gib, saved)
    assert (base, bool(why)) == (("resident", True) if whole else ("engine", False))
    section = found.engine["zero_optimization"]
    assert section["stage"] == (2 if whole else 3)
    assert any(key.startswith("stage3_") for key in section) != whole


def test_a_mixture_counts_all_of_its_experts() -> None:
    """Mixtral-8x7B: a token passes through 24 GiB of weights, and 87 would lie on each GPU."""
    config = RunConfig.model_validate({"lora": {"r": 16}})
    found, facts = settings(config), ModelFacts.from_config(AutoConfig.for_model("mixtral"))
    assert 2 * facts.body_weights < 0.35 * 80 * 2**30 < 2 * facts.weights
    assert settle_base(found, config, facts, 80.0, None) == ("engine", "")


def test_liger_has_one_kernel_with_and_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its modules are called; a user's own choice stands."""
    applied = list[dict[str, Any]]()
    liger = ModuleType("liger_kernel.transformers")
    liger.monkey_patch = SimpleNamespace(  # type: ignore[attr-defined]
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda **words: applied.append(words),
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    names = [f"LIGER_KERNEL_IMPL_{op}" for op in LIGER_OPS_BY_GRADIENT]
    monkeypatch.setenv(names[0], "")  # put back at the end, with whatever is set in between
    monkeypatch.delenv(names[0])
    monkeypatch.setenv(names[1], "another")
    model: Any = SimpleNamespace(config=LlamaConfig())
    assert fused_kernels(model, RunConfig(), torch.device("cuda"))
    assert [os.environ[name] for name in names] == ["nvidia-triton", "another"]
    assert [words["model"] for words in applied] == [model]
