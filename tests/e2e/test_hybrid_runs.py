"""Whole runs of a model whose layers partly carry a state: the same losses however it is split, and files that load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_longft.cli import main as cli
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.code import code_rows
from ds_longft.tools.make_data.synth.row_plan import Wanted
from tests.e2e.test_runs import logits, losses
from tests.faults.ranks import Launcher
from tests.tokenizer import tiny_tokenizer

STEPS = 24
"""Of 200 such steps, losses from 6.39 to 4.41, the largest difference was 1.3e-7 of the loss at sp 2, 3.6e-7 at sp 3."""
LENGTH_TOKENS = 1024


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3.5's layers: two of three carry a state, 9 heads that read 3 of keys."""
    folder, tokenizer = tmp_path_factory.mktemp("hybrid") / "model", tiny_tokenizer()
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=3, linear_num_value_heads=9, linear_key_head_dim=8, linear_value_head_dim=6,
        max_position_embeddings=LENGTH_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def code(hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the quickstart: questions about the Python standard library's source."""
    path = tmp_path_factory.mktemp("code") / "code.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(hybrid)
    wanted = Wanted(32, LENGTH_TOKENS, seed=0, name="code", lengths=Lengths(tokenizer))
    made = code_rows(wanted, questions=4, part="train")
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def losses_of(sp: int, steps: int, hybrid: Path, code: Path, ranks: Launcher, folder: Path, *more: str) -> list[float]:
    """Of each step of a run over `sp` ranks, in `folder`/sp<sp>."""
    keys = ["--model.path", str(hybrid), "--train.max_steps", str(steps), "--train.epochs", "100", "--log.wandb", "off"]
    keys += ["--data.train", str(code), "--data.max_length_tokens", str(LENGTH_TOKENS), "--data.packing", "best_fit"]
    keys += ["--train.save_every_steps", "null", "--train.eval_every_steps", "null", "--data.eval", "[]"]
    keys += ["--train.gradient_accumulation_steps", "1"]
    keys += ["--optim.learning_rate", "1e-3", "--sp", str(sp)]
    codes, run = ranks.run(folder / f"sp{sp}", *keys, *more, world=sp, timeout_s=steps * 30.0)
    assert codes == [0] * sp, run.text()
    assert "layers with a state: torch (CPU)" in run.text()
    return losses(folder / f"sp{sp}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_losses_are_those_of_one_process(hybrid: Path, code: Path, ranks: Launcher, tmp_path: Path) -> None:
    seen = {sp: losses_of(sp, STEPS, hybrid, code, ranks, tmp_path, "--lora", "null") for sp in (1, 2, 3)}
    assert len(seen[1]) == STEPS
    assert sum(seen[1][STEPS // 2 :]) < sum(seen[1][: STEPS // 2])
    for sp in (2, 3):
        assert seen[sp] == pytest.approx(seen[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_adapter_is_merged_and_evaluated(hybrid: Path, code: Path, ranks: Launcher, tmp_path: Path) -> None:
    losses_of(2, 4, hybrid, code, ranks, tmp_path)
    merged = tmp_path / "merged"
    assert cli(["export", str(tmp_path / "sp2"), str(merged)]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert not torch.equal(logits(model, merged), logits(AutoModelForCausalLM.from_pretrained(hybrid), merged))
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "def times(a, b): return a * b\n" * 20}) + "\n")
    words = ["--text", str(text), "--length", "64", "--texts", "1", "--out", str(tmp_path / "eval")]
    assert cli(["eval", "perplexity", str(merged), *words]) == 0
    assert "linear_attention" in yaml.safe_load((merged / "config.json").read_text())["layer_types"]
