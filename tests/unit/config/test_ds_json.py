"""The DeepSpeed JSON: every "auto" filled, every contradiction and every harmful key named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import DeepSpeedSettings, Device, merge_ds_config
from ds_longft.config.ds_keys import ALLOWED, LOWEST, REFUSED
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import EXIT_CONFIG, ConfigError

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


def merge(
    raw: dict[str, Any], world: int = 2, device: Device = "cuda", hidden_size: int | None = 64, **config: Any
) -> DeepSpeedSettings:
    return merge_ds_config(raw, RunConfig.model_validate(config), world=world, device=device, hidden_size=hidden_size)


def problems_of(raw: dict[str, Any], **keywords: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        merge(raw, **keywords)
    assert caught.value.exit_code == EXIT_CONFIG
    return caught.value.problems


def test_files_are_shipped() -> None:
    assert {p.name for p in SHIPPED} >= {"zero1.json", "zero2_sp.json", "zero3_sp.json", "zero3_offload.json"}


@pytest.mark.parametrize("hidden_size", [None, 576])
@pytest.mark.parametrize("lora", [None, {}])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_merge(path: Path, device: Device, lora: Any, hidden_size: int | None) -> None:
    raw = load_ds_config(path)
    settings = merge(raw, world=8, device=device, lora=lora, hidden_size=hidden_size)
    assert raw == load_ds_config(path), "the input was changed"
    text = json.dumps(settings.engine)
    assert '"auto"' not in text
    assert "sequence_parallel_size" not in text
    assert settings.sp is None
    assert settings.stage == settings.engine["zero_optimization"]["stage"]
    assert settings.engine["bf16"]["enabled"] is (device == "cuda")


def test_deepspeed_accepts_what_was_merged() -> None:
    """DeepSpeed's own reader agrees with the batch arithmetic and knows every key of the ZeRO section."""
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    for path in SHIPPED:
        engine = merge(load_ds_config(path), world=1, device="cpu").engine
        read = deepspeed_config.DeepSpeedConfig(engine)
        assert read.train_batch_size == 1
        assert int(read.zero_config.stage) == engine["zero_optimization"]["stage"]


def test_auto_is_filled_from_the_run_config() -> None:
    raw = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    settings = merge(
        raw,
        world=4,
        hidden_size=4096,
        lora=None,
        train={"gradient_accumulation_steps": 3},
        optim={"learning_rate": 2e-5, "max_grad_norm": 0.5, "weight_decay": 0.1},
    )
    engine = settings.engine
    assert engine["train_micro_batch_size_per_gpu"] == 1
    assert engine["gradient_accumulation_steps"] == 3
    assert engine["train_batch_size"] == 12  # the engine counts sp ranks too
    assert engine["gradient_clipping"] == 0.5
    assert engine["optimizer"]["params"] == {"lr": 2e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert engine["zero_optimization"]["reduce_bucket_size"] == 4096**2
    assert engine["zero_optimization"]["stage3_param_persistence_threshold"] == 40960
    assert engine["steps_per_print"] > 1e6


def test_an_empty_json_is_stage_0_and_complete() -> None:
    settings = merge({}, optim={"max_grad_norm": None})
    assert settings.stage == 0
    assert settings.engine["train_batch_size"] == 2
    assert settings.engine["gradient_clipping"] == 0.0


@pytest.mark.parametrize("left_out", [{}, {"reduce_bucket_size": "auto"}])
def test_lora_gets_small_reduce_buckets(left_out: dict[str, Any]) -> None:
    raw = {"zero_optimization": {"stage": 2, **left_out}}
    assert merge(raw, hidden_size=8192).engine["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    assert merge(raw, hidden_size=8192, lora=None).engine["zero_optimization"]["reduce_bucket_size"] == 8192**2


@pytest.mark.parametrize(
    ("stage", "lora", "packs", "between_ranks", "over_packs"),
    [(3, {}, 1, "fp32", "fp32"), (2, None, 4, None, "fp32"), (3, None, 1, None, None), (1, {}, 4, None, None)],
)
def test_bf16_gradients_are_summed_in_float32_where_that_is_cheap(
    stage: int, lora: Any, packs: int, between_ranks: str | None, over_packs: str | None
) -> None:
    raw: dict[str, Any] = {"zero_optimization": {"stage": stage}, "communication_data_type": "auto"}
    run = {"lora": lora, "train": {"gradient_accumulation_steps": packs}}
    engine = merge(raw, device="cuda", **run).engine
    assert engine.get("communication_data_type") == between_ranks
    assert engine["data_types"].get("grad_accum_dtype") == over_packs
    own = {**raw, "communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    kept = merge(own, device="cuda", **run).engine
    assert (kept["communication_data_type"], kept["data_types"]) == ("bf16", {"grad_accum_dtype": "bf16"})
    in_float32 = merge(raw, device="cpu", **run).engine
    assert in_float32["data_types"] == {}
    assert "communication_data_type" not in in_float32


def test_round_robin_and_the_first_check_do_not_go_together() -> None:
    raw = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    assert merge(raw).engine["zero_optimization"]["round_robin_gradients"] is True
    with pytest.raises(ConfigError, match=r"round_robin_gradients.*train.verify_first"):
        merge(raw, train={"verify_first": True})


def test_sequence_parallel_size_is_ours() -> None:
    settings = merge({"sequence_parallel_size": 4, "data_parallel_size": 2}, world=8)
    assert settings.sp == 4
    assert not {"sequence_parallel_size", "data_parallel_size"} & set(settings.engine)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("bf16", "cpu", True), ("fp32", "cuda", False)],
)
def test_bf16_follows_dtype_and_device(dtype: str, device: Device, expected: bool) -> None:
    assert merge({}, device=device, model={"dtype": dtype}).engine["bf16"] == {"enabled": expected}


def test_no_cpp_optimizer_is_built_without_a_gpu() -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert merge(offload, device="cpu").engine["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in merge(offload, device="cuda").engine
    assert merge(offload, device="cuda", optim={"type": "sgd"}).engine["zero_force_ds_cpu_optimizer"] is False
    named = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert merge(named, device="cpu").engine["optimizer"]["params"]["torch_adam"] is True
    assert "torch_adam" not in merge(named, device="cuda").engine["optimizer"]["params"]


def test_offload_to_none_is_dropped() -> None:
    raw = {
        "zero_optimization": {"stage": 0, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}}
    }
    assert not {"offload_param", "offload_optimizer"} & set(merge(raw).engine["zero_optimization"])


def test_switched_off_sections_are_no_problem() -> None:
    raw = {
        "fp16": {"enabled": False, "loss_scale": 0},
        "amp": {"enabled": "auto"},
        "wandb": {"enabled": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1,
        "zero_optimization": {"stage": 3, "zero_quantized_gradients": False},
    }
    engine = merge(raw).engine
    assert not {"fp16", "amp", "wandb"} & set(engine)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"train_batch_size": 7}, "train_batch_size is 7, the run config gives 2"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, the run config gives 1"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, the run config gives 1"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3, the run config gives 1.0 (optim.max_grad_norm)"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, the run config gives true (model.dtype auto on cuda)"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", the run config gives "AdamW" (optim.type)'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3}}}, "optimizer.params.lr is 3, the run config"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [1, 2]}}}, "optimizer.params.betas is [1, 2]"),
        ({"optimizer": {"type": "AdamW", "params": {"foo": "auto"}}}, 'optimizer.params.foo is "auto"'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage is "3", expected a whole number'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true, expected a whole number"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto", expected 0, 1, 2 or 3'),
        ({"zero_optimization": 3}, "zero_optimization is 3, expected a section"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, 'zero_optimization.overlap_comm is "auto"'),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": 1}}, "overlap_comm is 1, expected true or false"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, 'offload_param.device is "gpu"'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.nvme_path"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "offload_param is \"cpu\", expected a section"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation: did you mean zero_optimization?"),
        ({"gradient_acumulation_steps": 2}, "did you mean gradient_accumulation_steps?"),
        ({"sequence_parallel_size": 0}, "sequence_parallel_size is 0"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 2}, "is not the 2 ranks"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size is -1, expected a whole number of at least 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0, expected a whole number of at least 1"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 0.5}}, "allgather_bucket_size is 0.5, expected a whole"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": float("nan")}}, "allgather_bucket_size is NaN, expected"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": float("inf")}}, "sub_group_size is Infinity, expected a whole"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "1e9"}}, 'sub_group_size is "1e9", expected a whole number'),
        ({"zero_optimization": {"stage": 3, "sub_group_size": True}}, "sub_group_size is true, expected a whole number"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": -1}}, "parameters is -1, expected a whole number of at least 0"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}, "zero_hpz_partition_size is 0, expected a whole"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "size is 3, which does not divide the 2 ranks"),
        ({"steps_per_print": 0}, "steps_per_print is 0, expected a whole number of at least 1"),
        ({"communication_data_type": "fp16"}, 'communication_data_type is "fp16", expected fp32 or bf16'),
        ({"communication_data_type": "half"}, 'communication_data_type is "half", expected fp32 or bf16'),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, 'data_types.grad_accum_dtype is "fp16", expected fp32 or bf16'),
        ({"optimizer": {"type": "AdamW", "params": {"foo": 1}}}, "optimizer.params.foo is 1, which optim.type adamw does not"),
        ({"fp16": {"enabled": True}}, "fp16 is {\"enabled\": true}, which is refused"),
        ({"scheduler": {"type": "WarmupLR"}}, "optim.schedule"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "train.recompute"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency is"),
        ({"prescale_gradients": True}, "prescale_gradients is true, which is refused"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0, which is refused"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients is true"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"names": ["A"]}}}, "leaf_module is"),
        ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}}, "granularity_threshold is 9"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(raw: dict[str, Any], expected: str) -> None:
    problems = problems_of(raw)
    assert expected in problems[0]
    assert all(p.startswith("ds_config: ") for p in problems)


@pytest.mark.parametrize("seen", ["fp16", "bf16"])
def test_a_float32_run_rounds_no_gradients(seen: str) -> None:
    """What is added in less depends on how many ranks and packs there are; the loss may not depend on the JSON."""
    raw = {"communication_data_type": seen, "data_types": {"grad_accum_dtype": seen}}
    problems = problems_of(raw, device="cpu")
    assert [p.split(" is ")[0] for p in problems] == [
        "ds_config: communication_data_type", "ds_config: data_types.grad_accum_dtype",
    ]  # fmt: skip
    assert all("expected fp32: this run's gradients are fp32, and rounded to less" in p for p in problems)
    whole = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    assert merge(whole, device="cpu").engine["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"buffer_count": -1}, "zero_optimization.offload_optimizer.buffer_count is -1, which DeepSpeed refuses"),
        ({"pin_memory": "maybe"}, "zero_optimization.offload_optimizer.pin_memory is 'maybe', which DeepSpeed refuses"),
        ({"foo": 1}, "zero_optimization.offload_optimizer.foo is 1, which DeepSpeed refuses: Extra inputs"),
    ],
)
def test_what_deepspeed_refuses_is_named_before_the_model_is_loaded(section: dict[str, Any], expected: str) -> None:
    from ds_longft.train.model_check import check_zero_section

    engine = merge({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", **section}}}).engine
    with pytest.raises(ConfigError) as caught:
        check_zero_section(engine)
    assert expected in caught.value.problems[0]
    for path in SHIPPED:
        check_zero_section(merge(load_ds_config(path)).engine)


def test_every_mismatch_is_listed_at_once() -> None:
    raw = {
        "train_batch_size": 7,
        "gradient_clipping": 3,
        "scheduler": {},
        "nonsense": 1,
        "zero_optimization": {"stage": 9},
    }
    problems = "\n".join(problems_of(raw))
    for key in ("train_batch_size", "gradient_clipping", "scheduler", "nonsense", "zero_optimization.stage"):
        assert key in problems


def test_no_key_is_both_allowed_and_refused() -> None:
    assert not set(ALLOWED) & set(REFUSED)
    assert set(LOWEST) <= set(ALLOWED)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1,\n "b" 2}', "is not valid JSON: line 2, column 6"),
        ("[1]", "holds a list at its top"),
        ('{"a": 1, "a": 2}', "has the key a twice"),
        ("", "is not valid JSON: line 1"),
        (100_000 * "[", "sections or lists are nested too deeply"),
        (900 * '{"a": ' + "1" + 900 * "}", "sections or lists are nested too deeply"),
    ],
)
def test_unreadable_json(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_ds_config(path)
    assert expected in caught.value.problems[0]
    assert str(path) in caught.value.problems[0]


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    """As Windows editors write it; YAML readers take it."""
    path = tmp_path / "ds.json"
    path.write_text('{"steps_per_print": 3}', encoding="utf-8-sig")
    assert load_ds_config(path) == {"steps_per_print": 3}


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_numbers_beyond_any_counter_are_named(digits: int, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"steps_per_print": %s, "gradient_clipping": %s}' % (("9" * digits,) * 2))
    problems = problems_of(load_ds_config(path))
    assert [p.split(" is ")[0] for p in problems] == ["ds_config: steps_per_print", "ds_config: gradient_clipping"]


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ds_config: cannot read .*nope.json: No such file"):
        load_ds_config(tmp_path / "nope.json")


def test_shipped_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_ds_config(RunConfig().ds_config)["zero_optimization"]["stage"] == 3
    own = tmp_path / "ds_configs/zero3_sp.json"
    own.parent.mkdir()
    own.write_text('{"zero_optimization": {"stage": 1}}')
    assert load_ds_config(RunConfig().ds_config)["zero_optimization"]["stage"] == 1
