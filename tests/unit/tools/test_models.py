from __future__ import annotations

import re
from pathlib import Path

import pytest

from ds_longft.cli import main
from ds_longft.config.proof import proofs
from tests.unit.sequence.zoo import tiny


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert "`llama`" in text
    assert "`gemma3 (gemma3_text)`" in text
    assert "| bloom | (BloomForCausalLM) does not use" in text


@pytest.mark.parametrize(
    ("model_type", "line"),
    [
        ("llama4", "compared with   its own forward fails on any input"),
        ("gemma3", "as the text model of type gemma3_text"),
        ("deepseek_v32", "has layers of type indexed_attention: which tokens they see is chosen by scores"),
        ("stablelm", "does not use transformers' attention interface"),
        ("phi4_multimodal", "inside its decoder"),
        ("dbrx", "lists its layers as `blocks`"),
        ("instructblip", "computes nothing without an image"),
    ],
)
def test_one_type(model_type: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", model_type]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"type            {model_type}\nproved ")
    assert line in text


def test_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("gemma3").save_pretrained(tmp_path)
    assert main(["models", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["type", "gemma3, text model gemma3_text"]
    assert "heads           4 of queries, 2 of keys and values, 16 wide" in lines
    assert "window          2 layers 8 tokens, 1 layers see all" in lines
    assert any(line.startswith("kernels         Hopper: sliding window: flash-attn-4, ") for line in lines)
    assert lines[-1].startswith("LoRA reaches    3 ")
    assert "vision" not in lines[-1]


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4"])
def test_lora_on_a_mixture_with_and_without_experts(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(model_type).save_pretrained(tmp_path)
    assert main(["models", str(tmp_path)]) == 0
    reaches, without, with_experts = capsys.readouterr().out.splitlines()[-3:]
    assert reaches.startswith("LoRA reaches    3 q_proj, ")
    assert without.startswith("lora.experts    false: ")
    assert "not on the 4 experts of a layer (lora.experts: true adapts them), nor on routers: 0.0" in without
    assert with_experts.startswith("lora.experts    true: ")
    assert "down_proj, gate_up_proj of each of a layer's 4 experts, not on routers: 0." in with_experts
    assert without.rpartition(": ")[2] == reaches.rpartition(": ")[2] != with_experts.rpartition(": ")[2]


def test_heads_of_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("gemma4_text").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"head_dim": 32', '"head_dim": 512'))
    assert main(["models", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "16 or 512 wide" in text
    assert (
        "Hopper: sliding window: flash-attn-4, flash-attn-3, flash-attn-2, varlen, math; full attention: mem-ef" in text
    )


def test_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tmp_path / "absent")]) == 64
    assert "there is no folder" in capsys.readouterr().err


def test_what_is_not_proved_says_why_in_a_sentence_of_ours() -> None:
    for name, entry in proofs()["types"].items():
        if "proved" not in entry:
            assert "refused" in entry, (name, entry)  # known, and not what some library said
            assert not re.search(r"Error\b|Traceback|NoneType", entry["refused"]), (name, entry)
