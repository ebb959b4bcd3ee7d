"""What is said when a GPU is full: keys of this run, with what each would save."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig

from ds_longft.config.run_config import RunConfig
from ds_longft.decide.advice import Adviser
from ds_longft.decide.decisions import Run, decide
from ds_longft.decide.memory import predict
from ds_longft.decide.plan_json import foresee_run
from ds_longft.decide.search import Question, fastest
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.decide.time import predict_time
from ds_longft.errors import EXIT_CONFIG
from ds_longft.model.facts import ModelFacts
from tests.unit.decide.shapes import LLAMA_8B, MIXTRAL, QWEN_7B, SMOLLM2, shape, sizes


def h200(memory_gib: float) -> Gpu:
    return replace(Gpu.load("h200"), memory_gib=memory_gib)


def known(
    config: RunConfig, of: dict[str, Any], *, world: int = 1, sp: int = 1, stage: int = 2, memory_gib: float = 139.8
) -> Run:
    hf_config = AutoConfig.for_model(**of)
    return Run(
        config, {"zero_optimization": {"stage": stage}}, hf_config, ModelFacts.from_config(hf_config), sp, world, world,
        h200(memory_gib), has_rates=True, kernel="flash-attn-4", fused=True,
    )  # fmt: skip


def adviser(
    of: dict[str, Any] = LLAMA_8B, *, world: int = 8, sp: int = 2, stage: int = 2, memory_gib: float = 79.1, **keys: Any
) -> Adviser:
    config = RunConfig.model_validate({"data": {"max_length_tokens": "256K"}, **keys})
    return Adviser(known(config, of, world=world, sp=sp, stage=stage, memory_gib=memory_gib))


def test_savings_name_keys_and_are_ordered() -> None:
    savings = adviser().savings()
    keys = [key for key, _, _ in savings]
    assert {"sp: 4", "train.recompute: full", "train.recompute: sqrt"} <= set(keys)
    assert [s for _, s, _ in savings] == sorted((s for _, s, _ in savings), reverse=True)
    by = {key: saved for key, saved, _ in savings}
    assert by["train.recompute: full"] == pytest.approx(32, rel=0.1)  # the attention output of 32 layers
    assert 30 < by["sp: 4"] < 60  # half of everything that grows with the length
    assert "lora: {r: 16}" in [key for key, _, _ in adviser(stage=3, lora=None).savings()]


@pytest.mark.parametrize(
    ("length", "host_gib", "key", "change", "fits"),
    [
        ("16K", 0, "model.quantize: nf4", {"model": {"quantize": "nf4"}}, True),
        ("24K", 0, "model.quantize: nf4", {"model": {"quantize": "nf4"}}, False),
        ("16K", 0, "train.offload_host_gib: 6", {"train": {"offload_host_gib": 6}}, True),
        ("24K", 1, "train.offload_disk: FOLDER", {"train": {"offload_host_gib": 1, "offload_disk": "/nvme"}}, True),
    ],
)
def test_a_run_is_asked_about_again_with_the_key_that_is_named(
    length: str, host_gib: int, key: str, change: dict[str, Any], fits: bool
) -> None:
    """Llama-8B on a card of 24 GB: its bf16 weights take 15 GiB of it."""
    keys: Any = {"world": 1, "sp": 1, "memory_gib": 23.5, "data": {"max_length_tokens": length}}
    asked, other = adviser(**keys, train={"offload_host_gib": host_gib}), adviser(**keys, **change)
    now, then = asked._memory(asked.setting), other._memory(other.setting)
    assert (asked._fits(asked.setting, now), other._fits(other.setting, then)) == (False, fits)
    saved, note = {name: rest for name, *rest in asked.savings()}[key]
    assert saved == pytest.approx((now.peak - then.peak) / 2**30, abs=0.01)
    assert ("then it fits" in note) == fits
    assert key not in [name for name, _, _ in other.savings()]


def test_zero3_is_advised_only_where_it_releases_weights() -> None:
    """With LoRA the shipped JSONs leave open what is released: weights that fit stay, beside a shard of them."""
    split = "ds_config: ds_configs/zero3_sp.json"
    assert split not in [key for key, _, _ in adviser(memory_gib=79.1).savings()]
    by = {key: saved for key, saved, _ in adviser(memory_gib=39.4, data={"max_length_tokens": "32K"}).savings()}
    assert by[split] == pytest.approx(15.0 * 7 / 8 - 2e9 / 2**30, abs=0.3)


def test_nothing_is_advised_twice() -> None:
    keys = [key for key, _, _ in adviser(sp=8, train={"recompute": "sqrt"}, stage=3).savings()]
    assert not any(key.startswith(("sp:", "train.recompute: sqrt", "ds_config: ds_configs/zero3_sp")) for key in keys)


def test_the_message() -> None:
    error = adviser().error(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), "in training"
    )
    assert error.exit_code == EXIT_CONFIG
    assert "in training: CUDA out of memory. Tried to allocate 2.00 GiB" in str(error)
    assert "sp: 4   saves about" in str(error)
    assert "data.max_length_tokens" in str(error)


def test_a_mixture_of_experts() -> None:
    """Adapters on its experts count: they are most of what is trained."""
    without, experts = adviser(MIXTRAL, lora={"r": 64}), adviser(MIXTRAL, lora={"r": 64, "experts": True})
    assert {key: saved for key, saved, _ in experts.savings()}["sp: 4"] > 1
    assert experts._memory(experts.setting).peak - without._memory(without.setting).peak > 2 * 2**30


def test_a_run_that_computed_nothing_again_can_do_so() -> None:
    key = "train.recompute: keep_attention"
    savings = adviser(SMOLLM2, world=1, sp=1, data={"max_length_tokens": "32K"}, lora={"r": 16}).savings()
    assert {name: saved for name, saved, _ in savings}[key] > 5
    assert key not in [name for name, *_ in adviser().savings()]


def test_pairs() -> None:
    def savings(passes: str, **keys: Any) -> dict[str, float]:
        dpo = {"objective": "dpo", "dpo": {"passes": passes}, "data": {"max_length_tokens": "128K"}}
        return {key: saved for key, saved, _ in adviser(**dpo, **keys).savings()}

    one = savings("one")
    assert one["dpo.passes: two"] == pytest.approx(one["sp: 4"], rel=0.05)  # half of what grows with the length
    assert "dpo.passes: two" not in savings("auto") | savings("two")  # two passes are what has been tried
    full = savings("two", lora=None, stage=2, sp=8)
    assert full["dpo.reference: precomputed"] == pytest.approx(2 * 8.03e9 / 2**30, rel=0.01)
    assert not any(key.startswith("dpo") for key in savings("two", sp=8))
    error = adviser(sp=8, objective="dpo", dpo={"passes": "two"}, data={"max_length_tokens": "4M"}).error(
        torch.OutOfMemoryError(), "in the dry run"
    )
    found = re.search(r"max_length_tokens: (\d+) \(and data.pack_tokens: (\d+)\)", str(error))
    assert found is not None
    assert int(found[2]) == 2 * int(found[1]) < 2 << 22


@pytest.mark.parametrize(("length", "memory_gib", "passes"), [("32K", 139.8, "one"), ("104K", 79.1, "two")])
def test_the_run_takes_the_passes_that_the_plan_names(length: str, memory_gib: float, passes: str) -> None:
    """One judgement: `dpo.passes: auto` on these GPUs, and `ds-longft plan` for them."""

    def chosen(**keys: Any) -> Setting:
        config = RunConfig.model_validate({"objective": "dpo", "data": {"max_length_tokens": length}, **keys})
        return decide(known(config, LLAMA_8B, memory_gib=memory_gib)).setting

    of_run = chosen()
    assert of_run.passes == passes
    gpu = replace(Gpu.load("h200"), memory_gib=memory_gib)
    plan = fastest(Question(sizes(LLAMA_8B), gpu, 1, 0.0, pairs=True, reference="adapter_off"), of_run.tokens // 2)
    assert plan is not None
    assert plan.setting.passes == passes
    asked_for = chosen(dpo={"passes": "two"}, train={"recompute": "full"})
    assert (asked_for.passes, asked_for.tile_tokens, asked_for.kv_heads) == ("two", None, None)


@pytest.mark.parametrize(
    ("family", "tokens", "memory_gib", "would_fit", "expected"),
    [
        (SMOLLM2, 32768, 79.1, True, "none"),
        (SMOLLM2, 32768, 22.0, True, "auto"),  # with less to spare than a fifth
        (LLAMA_8B, 16384, 139.8, True, "none"),
        (LLAMA_8B, 24576, 139.8, True, "auto"),
        (LLAMA_8B, 65536, 139.8, False, "auto"),
    ],
)
def test_nothing_is_computed_again_where_there_is_room_to_spare(
    family: dict[str, Any], tokens: int, memory_gib: float, would_fit: bool, expected: str
) -> None:
    def chosen(**train: Any) -> str:
        data = {"max_length_tokens": tokens}
        config = RunConfig.model_validate({"data": data, "lora": {"r": 16}, "train": train})
        return decide(known(config, family, memory_gib=memory_gib)).setting.recompute

    assert chosen() == expected
    assert chosen(recompute="keep_attention") == "keep_attention"  # what is asked for stays
    gpu = replace(Gpu.load("h200"), memory_gib=memory_gib)
    whole = predict(sizes(family), Setting((tokens,), 1, 1, stage=2, recompute="none"), gpu)
    assert whole.fits(gpu) == would_fit


@pytest.mark.parametrize(
    ("family", "tokens", "gain"), [(LLAMA_8B, 16384, 0.03), (LLAMA_8B, 8192, 0.05), (SMOLLM2, 8192, 0.25)]
)
def test_what_computing_nothing_again_gains_is_as_documented(family: dict[str, Any], tokens: int, gain: float) -> None:
    gpu, model = Gpu.load("h200"), sizes(family)

    def seconds(recompute: Literal["auto", "none"]) -> float:
        setting = Setting((tokens,), 1, 1, stage=2, recompute=recompute)
        return predict_time(model, setting, gpu, predict(model, setting, gpu).keep).total_s

    assert 1 - seconds("none") / seconds("auto") == pytest.approx(gain, abs=0.005)


ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
FAMILIES = {
    "llama": LLAMA_8B,
    "smollm2": SMOLLM2,
    "qwen2": QWEN_7B,
    "qwen3": shape("qwen3", hidden_size=1024, num_hidden_layers=4),
    "mistral": shape("mistral", sliding_window=4096, num_hidden_layers=4),
    "phi3": {**shape("phi3", num_hidden_layers=4), "rope_parameters": ROTARY},
    "gemma": shape("gemma", num_hidden_layers=4),
    "gemma2": shape("gemma2", num_hidden_layers=4),
    "gemma3_text": {"model_type": "gemma3_text", "num_hidden_layers": 7},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_gib", [23.5, 139.8])
@pytest.mark.parametrize(("world", "sp", "stage", "lora"), [(1, 1, 2, True), (2, 2, 3, True), (8, 4, 3, False)])
def test_every_family_gets_a_choice(
    family: str, memory_gib: float, world: int, sp: int, stage: int, lora: bool
) -> None:
    """A run asks before it loads the model: whatever the planner thinks, it must answer."""
    for length, host_gib, objective in (("4K", 0, "sft"), ("512K", 0, "dpo"), ("512K", 200, "sft")):
        config = RunConfig.model_validate(
            {
                "objective": objective,
                "data": {"max_length_tokens": length},
                "lora": {"r": 16} if lora else None,
                "train": {"offload_host_gib": host_gib},
            }
        )
        run = known(config, FAMILIES[family], world=world, sp=sp, stage=stage, memory_gib=memory_gib)
        decisions = decide(run)
        assert decisions.keep is not None
        assert len(decisions.keep) == run.hf_config.num_hidden_layers
        on_host = any("host" in (place.input, place.attention) for place in decisions.keep)
        assert host_gib or not on_host
        if memory_gib > 100 and length == "4K":
            assert decisions.setting.tile_tokens is None
            assert decisions.setting.kv_heads is None


def test_auto_recomputes_more_where_nothing_else_fits() -> None:
    """Llama-8B on one H200: 424K tokens are too many for kept attention, 1M for every layer's input beside 120 GiB."""

    def chosen(length: str, host_gib: float = 0.0, stage: int = 2) -> Setting:
        config = RunConfig.model_validate(
            {"data": {"max_length_tokens": length}, "train": {"offload_host_gib": host_gib}}
        )
        return decide(known(config, LLAMA_8B, stage=stage)).setting

    assert chosen("128K").recompute == "auto"
    assert chosen("320K").recompute == "full"
    assert chosen("320K", stage=3).recompute == "full"
    million = chosen("1M", host_gib=120)
    assert million.recompute == "every_k"
    assert million.tile_tokens == 8192
    assert (
        chosen("1M", host_gib=120, stage=3).recompute == "auto"
    )  # no segments there, nothing fits, `full` needs as much


def test_the_same_run_gets_the_same_answer_and_the_planner_gives_it() -> None:
    """Engine, plan.json and `ds-longft plan` read one answer: drawn runs, decided twice and planned once."""
    rng = random.Random(0)
    for _ in range(40):
        world, stage = rng.choice([(1, 2), (2, 2), (2, 3), (8, 3)])
        sp = rng.choice([d for d in (1, 2, 4, 8) if d <= world])
        length, memory_gib = rng.choice(["8K", "64K", "256K", "1M"]), rng.choice([23.5, 79.1, 139.8])
        host_gib = rng.choice([0, 100])
        config = RunConfig.model_validate(
            {"data": {"max_length_tokens": length}, "train": {"offload_host_gib": host_gib}, "lora": {"r": 16}}
        )
        run = known(
            config, rng.choice([LLAMA_8B, QWEN_7B, SMOLLM2]), world=world, sp=sp, stage=stage, memory_gib=memory_gib
        )
        decisions, again = decide(run), decide(replace(run))
        assert decisions == again
        foreseen = foresee_run(run, decisions)
        assert foreseen is not None
        assert (foreseen["recompute"], foreseen["sp"]) == (decisions.setting.recompute, sp)
        memory = predict(run.facts, decisions.setting, run.gpu)
        assert foreseen["peak_gib"] == pytest.approx(memory.peak_gib, abs=0.01)
        bare = [(k.input, k.attention) for k in memory.keep]
        assert bare == [(k.input, k.attention) for k in decisions.keep or ()]
