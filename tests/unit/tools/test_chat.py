"""`ds-longft chat`: one question, answered as the model itself answers it, and nothing else on stdout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ds_longft.cli import main
from ds_longft.errors import EXIT_CONFIG
from tests.unit.tools.test_export import save_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(1)
    sizes = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(sizes).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return str(tmp_path)


def test_one_question_and_its_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", model, "--question", "The capital", "--max_new_tokens", "4"]) == 0
    answer = capsys.readouterr().out.strip()
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "The capital"}]
    ids = torch.tensor([tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)])
    said = AutoModelForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=4, do_sample=False)
    assert answer == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answer


def test_no_answer_of_no_token(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", model, "--question", "one", "--max_new_tokens", "0"]) == EXIT_CONFIG
    assert "--max_new_tokens is 0" in capsys.readouterr().err
