"""What a run foresees of itself: the planner's own numbers, times for known GPUs alone, and a file of the user's stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Run, decide
from ds_longft.decide.memory import predict
from ds_longft.decide.plan_json import foresee_run, gpu_of_run, gpu_type, note_in_plan, write_plan
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.model.facts import ModelFacts
from tests.unit.decide.shapes import LLAMA_8B, SMOLLM2


def foreseen(of: dict[str, Any] = SMOLLM2, *, kernel: str = "flash-attn-4", **keys: Any) -> dict[str, Any] | None:
    device = {"device_name": "NVIDIA H200", "total_gib": 139.8, "memory_gib": 139.8} | {
        k: keys.pop(k) for k in list(keys) if k in DEVICE
    }
    config = RunConfig.model_validate({"data": {"max_length_tokens": "128K"}, "lora": None, **keys})
    gpu, has_rates = gpu_of_run(**device)
    hf_config = AutoConfig.for_model(**of)
    run = Run(
        config, {"zero_optimization": {"stage": 2}}, hf_config, ModelFacts.from_config(hf_config), 1, 1, 1, gpu, has_rates,
        kernel, True,
    )  # fmt: skip
    return foresee_run(run, decide(run))


DEVICE = ("device_name", "total_gib", "memory_gib")


def test_it_is_the_prediction_of_the_planner() -> None:
    found = foreseen(train={"recompute": "full"})
    assert found is not None
    model = ModelFacts.from_config(AutoConfig.for_model(**SMOLLM2))
    setting = Setting(lengths=(131072,), sp=1, world=1, lora_r=None, stage=2, resident=False, recompute="full", every=1)
    expected = predict(model, setting, Gpu.load("h200"))
    assert found["peak_gib"] == pytest.approx(expected.peak_gib, abs=0.01)
    assert (found["tokens"], found["sp"], found["dp"], found["recompute"]) == (131072, 1, 1, "full")
    assert found["step_s"] > 0.5
    assert found["rates"] == "measured"
    again = foreseen(train={"recompute": "full", "gradient_accumulation_steps": 4})
    assert again is not None
    assert again["step_s"] == pytest.approx(4 * found["step_s"], rel=0.01)
    assert again["packs_a_step"] == 4
    summed = 2 * model.weights / 2**30  # in float32
    assert again["peak_gib"] == pytest.approx(found["peak_gib"] + summed, abs=0.01)


def test_without_rates_only_memory_is_foreseen() -> None:
    for found in (
        foreseen(LLAMA_8B, device_name="NVIDIA H20", total_gib=95.0, memory_gib=95.0, lora={"r": 16}),
        foreseen(LLAMA_8B, kernel="math", lora={"r": 16}),
    ):
        assert found is not None
        assert 20 < found["peak_gib"] < 131
        assert not {"step_s", "tokens_per_s", "rates", "step_parts_s"} & set(found)


def test_what_the_planner_does_not_describe() -> None:
    assert foreseen(objective="dpo") is None


@pytest.mark.parametrize(
    ("name", "memory_gib", "known"),
    [
        ("NVIDIA H200", 139.8, "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "NVIDIA A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "NVIDIA A100 40GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "NVIDIA H100 80GB HBM3"),
        ("NVIDIA GeForce RTX 4090", 23.6, "NVIDIA GeForce RTX 4090"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA H100 NVL", 93.0, None),
        ("NVIDIA GeForce RTX 3090", 23.6, None),
    ],
)
def test_gpu_types_by_the_names_that_torch_gives(name: str, memory_gib: float, known: str | None) -> None:
    found = gpu_type(name, memory_gib)
    assert (found and found.name) == known


def test_the_users_own_plan_stays(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_plan(tmp_path, {"peak_gib": 1.0})
    assert json.loads(file.read_text())["peak_gib"] == 1.0
    write_plan(tmp_path, {"peak_gib": 2.0})
    assert json.loads(file.read_text())["peak_gib"] == 2.0
    write_plan(tmp_path, None)
    assert not file.exists()
    write_plan(tmp_path, None)
    file.write_text('{"peak_gib": 3.0}')
    write_plan(tmp_path, {"peak_gib": 4.0})
    assert json.loads(file.read_text()) == {"peak_gib": 3.0}
    file.write_text("{")
    write_plan(tmp_path, {"peak_gib": 4.0})
    assert file.read_text() == "{", "whatever it is"


def test_what_was_given_back_is_noted_in_our_plan_alone(tmp_path: Path) -> None:
    file, given = tmp_path / "plan.json", {"step": 7, "rank": 1, "gib": 3.2}
    note_in_plan(tmp_path, given)
    assert not file.exists()
    for theirs in ('{"of": "the user"}', "no JSON", "[1]"):
        file.write_text(theirs)
        note_in_plan(tmp_path, given)
        assert file.read_text() == theirs
    write_plan(tmp_path, None)
    file.unlink(missing_ok=True)
    write_plan(tmp_path, {"peak_gib": 1.0})
    note_in_plan(tmp_path, given)
    note_in_plan(tmp_path, {**given, "step": 8})
    assert [note["step"] for note in json.loads(file.read_text())["given_back"]] == [7, 8]
