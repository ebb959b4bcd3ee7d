"""A plan takes no attention kernel that the run would refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ds_longft.cli import main
from ds_longft.decide.setting import Gpu, Setting, shipped_gpus
from ds_longft.decide.time import WIDER_HEADS, attention
from ds_longft.errors import EXIT_CONFIG, ConfigError
from ds_longft.tools.plan.fitting_kernels import refusal, with_fitting_kernels
from tests.unit.decide.shapes import LLAMA_8B, shape, sizes

GEMMA2 = shape("gemma2", num_hidden_layers=2)  # heads of 256, softcap, sliding windows
MISTRAL = shape("mistral", num_hidden_layers=2, sliding_window=4096)


@pytest.mark.parametrize("name", shipped_gpus())
def test_every_rate_is_of_a_kernel_that_runs_there(name: str) -> None:
    """Whatever is installed here: these are other machines."""
    gpu = Gpu.load(name)
    assert with_fitting_kernels(gpu, sizes(LLAMA_8B), "", None) == gpu


@pytest.mark.parametrize(
    ("model", "gpu", "kernel", "tokens", "expected"),
    [
        (GEMMA2, "h200", "cudnn", None, "head dimensions up to 128"),
        ({**GEMMA2, "head_dim": 128}, "h200", "varlen", None, "has no softcap"),
        (MISTRAL, "h200", "cudnn", None, "has no sliding window"),
        (MISTRAL, "h200", "cudnn", 4097, "has no sliding window"),
        (MISTRAL, "h200", "cudnn", 4096, None),
        (GEMMA2, "h200", "flash-attn-4", None, None),
        (GEMMA2, "b200", "flash-attn-4", None, "no softcap at 256 on Blackwell"),
        (LLAMA_8B, "a100-80", "flash-attn-3", None, "needs compute capability 9.0"),
    ],
)
def test_refusals(model: dict[str, Any], gpu: str, kernel: str, tokens: int | None, expected: str | None) -> None:
    found = refusal(kernel, sizes(model), Gpu.load(gpu), tokens)
    assert expected in found if expected and found else found == expected


def test_the_fastest_that_fits_is_planned_with() -> None:
    gpu = Gpu.load("h200")
    fitting = with_fitting_kernels(gpu, sizes(MISTRAL), "varlen", 65536)
    assert list(fitting.attention_tflops) == ["flash-attn-4", "varlen"]
    with pytest.raises(ConfigError, match=r"NVIDIA B200 has rates for.*flash-attn-4 has no softcap.*cudnn takes"):
        with_fitting_kernels(Gpu.load("b200"), sizes(GEMMA2), "", None)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model(**MISTRAL).save_pretrained(tmp_path)
    arguments = ["plan", "--model", str(tmp_path), "--gpus", "1", "--kernel", "cudnn", "--length"]
    assert main([*arguments, "8K"]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "--kernel is cudnn, but cudnn has no sliding window (asked for 4096)" in said
    assert "fit this model: flash-attn-4, varlen" in said
    assert main([*arguments, "4K"]) == 0


def test_heads_that_no_measured_kernel_can_do_are_planned_at_a_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 1024}
    config = AutoConfig.for_model("gemma4_text", **four, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    config.save_pretrained(tmp_path)
    arguments = ["plan", "--model", str(tmp_path), "--gpus", "1", "--length", "64K", "--gpu"]
    assert main([*arguments, "h200"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 6 layers have heads of 512: mem-efficient works on them, whose rate nobody has measured" in said
    assert "0.1 of the other kernel's is a guess" in said
    assert main([*arguments, "b200"]) == EXIT_CONFIG
    assert "is known to run on compute capabilities 8 and 9" in capsys.readouterr().err


def test_wider_heads_take_the_guessed_time() -> None:
    gpu, x = Gpu.load("h200"), Setting((65536,))
    wide = [attention(replace(sizes(LLAMA_8B), head_dim=d), x, gpu, "forward") for d in (256, 512)]
    assert wide[1] == pytest.approx(2 * wide[0] / WIDER_HEADS)
