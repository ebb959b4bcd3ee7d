"""Predicted steps against steps measured on H200s that were not used to make the rates, and the formulas' limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds_longft.decide.memory import predict
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.decide.tensors import Keep
from ds_longft.decide.time import HALF_RATE_TOKENS, WITHOUT_GRADIENT, StepTime, predict_time, rate_at
from tests.unit.decide.shapes import LLAMA_8B, SMOLLM2, sizes

# Llama-8B shapes, LoRA r 16, ZeRO-2, recompute auto: seconds and GiB measured with benchmarks/step.py on H200s.
MEASURED = {
    "128K over two, cudnn": (Setting((131072,), 2, 2, stage=2, kernel="cudnn"), 20.08, 127.9),
    "8 documents of 16K over two": (Setting((16384,) * 8, 2, 2, stage=2), 6.04, 124.2),
    "64K on one": (Setting((65536,), 1, 1, stage=2), 11.28, 129.2),
}


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_meet_measured_steps(name: str) -> None:
    setting, seconds, peak_gib = MEASURED[name]
    model, gpu = sizes(LLAMA_8B), Gpu.load("h200")
    memory = predict(model, setting, gpu)
    assert memory.peak_gib == pytest.approx(peak_gib, rel=0.05)
    assert predict_time(model, setting, gpu, memory.keep).total_s == pytest.approx(seconds, rel=0.10)


@pytest.mark.parametrize(
    ("setting", "seconds"),
    [  # a pack of the demonstration (examples/extend_smollm2) on H100s; without the host's share 0.07 to 0.38 s
        (Setting((8192,) * 4, 2, 4, stage=2, lora_r=64, kernel="varlen"), 0.54),
        (Setting((8192,) * 4, 1, 1, stage=2, lora_r=64, kernel="varlen"), 0.51),
        (Setting((32768,), 1, 1, stage=2, lora_r=None, kernel="cudnn"), 0.43),
    ],
)
def test_small_models_wait_for_the_host(setting: Setting, seconds: float) -> None:
    model, gpu = sizes(SMOLLM2), Gpu.load("h100-80")
    time = predict_time(model, setting, gpu, predict(model, setting, gpu).keep)
    assert time.total_s == pytest.approx(seconds, rel=0.2)
    assert time.parts["waiting for the host"] > 0
    large = predict_time(sizes(LLAMA_8B), setting, gpu, (Keep(),) * 32)
    assert "waiting for the host" not in large.parts


def test_rates_between_and_beyond_the_measured_lengths() -> None:
    table = [[16384, 400.0], [65536, 600.0]]
    assert rate_at(table, 32768) == pytest.approx(500)
    assert rate_at(table, 1 << 20) == 600
    assert 0.85 * 400 < rate_at(table, 4096) < 0.95 * 400
    assert rate_at(table, HALF_RATE_TOKENS) == pytest.approx(400 / 2, rel=0.05)


def test_time_follows_the_work() -> None:
    model, gpu = sizes(LLAMA_8B), Gpu.load("h200")
    none = (Keep(),) * 32

    def seconds(setting: Setting, part: str = "", keep: tuple[Keep, ...] = none) -> float:
        time = predict_time(model, setting, gpu, keep)
        return time.parts[part] if part else time.total_s

    once = Setting((131072,), 2, 2, recompute="keep_attention")
    again = replace(once, recompute="full")
    assert seconds(again, "attention") / seconds(once, "attention") == pytest.approx(1.28, abs=0.05)  # 4.5 / 3.5
    assert seconds(replace(once, lora_r=None), "matrix products") > 1.3 * seconds(once, "matrix products")
    assert seconds(once, keep=(Keep("device", "device", "device"),) * 32) < seconds(once)
    assert seconds(replace(once, lengths=(65536,) * 2), "attention") < 0.6 * seconds(once, "attention")
    assert predict_time(model, replace(once, sp=1), gpu, none).tokens_per_s > 0
    slow = replace(gpu, host_gb_s=5.0)
    on_host = (Keep("device", "host", "host"),) * 32
    assert predict_time(model, once, slow, on_host).parts["host copies"] > 0
    assert "host copies" not in predict_time(model, once, gpu, none).parts


def test_documents_dealt_whole_are_not_exchanged() -> None:
    """As the loader deals them: where each rank gets documents of about equal work, and never of pairs."""
    model, gpu = sizes(LLAMA_8B), Gpu.load("h200")

    def exchange_s(lengths: tuple[int, ...], **changes: Any) -> float:
        setting = Setting(lengths, 2, 2, recompute="keep_attention", **changes)
        return predict_time(model, setting, gpu, (Keep(),) * 32).parts.get("exchange", 0.0)

    assert exchange_s((16384,) * 8) == exchange_s((20000, 12000, 12000, 20000)) == 0
    split = exchange_s((131072,))
    assert split > 0.2
    assert exchange_s((65536, 32768, 16384, 16384)) == split  # the longest is more than half of the work
    assert exchange_s((16384,) * 8, pairs=True) == split
    live = {"pairs": True, "reference": "adapter_off"}
    assert predict_time(model, Setting((65536,) * 2, 2, 2, **live), gpu, (Keep(),) * 32).parts["exchange"] > 0


def test_pairs_cost_their_passes_without_gradient() -> None:
    model, gpu = sizes(LLAMA_8B), Gpu.load("h200")
    keep = (Keep(),) * 32
    pair = Setting((65536,) * 2, 2, 2, recompute="keep_attention", pairs=True, reference="adapter_off")

    def times(**changes: Any) -> StepTime:
        return predict_time(model, replace(pair, **changes), gpu, keep)

    known, one, two = times(reference="precomputed"), times(), times(passes="two")
    assert known.parts == times(reference="none").parts  # simpo
    reference_s = one.total_s - known.total_s
    assert reference_s == pytest.approx(one.parts[WITHOUT_GRADIENT])
    assert 0.2 < reference_s / known.total_s < 0.35  # forward alone; the rest is forward, most of it again, backward
    assert two.parts[WITHOUT_GRADIENT] == pytest.approx(2 * reference_s, rel=0.02)  # and the model's own
    assert two.total_s - two.parts[WITHOUT_GRADIENT] == pytest.approx(known.total_s, rel=0.01)
    assert two.tokens == one.tokens == 131072
    split = {"stage": 3, "resident": False, "lora_r": None, "reference": "model"}
    gathered = [times(**split, passes=p).parts["gathering weights"] for p in ("one", "two")]
    assert gathered[1] == 2 * gathered[0]  # each side gathers the weights for itself
