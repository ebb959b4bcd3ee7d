"""An answer's end token stands where whoever serves the model looks for it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from ds_longft.model.stops import end_of_answer, serve_stop, stop_ids
from tests.tokenizer import tiny_tokenizer


def base_with_chatml():
    """As Qwen2.5's base models come: a ChatML template, and the end of text as end token."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    ids = {"eos_token_id": tokenizer.eos_token_id}
    return tokenizer, LlamaConfig(**ids), GenerationConfig(**ids)


def test_the_end_of_an_answer_is_added_to_all_three(tmp_path: Path) -> None:
    tokenizer, config, generation = base_with_chatml()
    stop, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_of_answer(tokenizer) == stop
    remark = serve_stop(tokenizer, config, generation)
    assert "'<|im_end|>'" in remark
    assert "'<|endoftext|>'" in remark
    for part in (tokenizer, config, generation):
        part.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [text_end, stop]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [text_end, stop]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    assert serve_stop(tokenizer, config, generation) is None, "once"


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_that_stops_there_already_is_left_as_it_is(listed: bool) -> None:
    """Gemma's tokenizer ends with another token than its template, and its generation config names both."""
    tokenizer, config, generation = base_with_chatml()
    stop = end_of_answer(tokenizer)
    generation.eos_token_id = [config.eos_token_id, stop] if listed else stop
    before = (tokenizer.eos_token, config.eos_token_id, stop_ids(generation))
    assert serve_stop(tokenizer, config, generation) is None
    assert (tokenizer.eos_token, config.eos_token_id, stop_ids(generation)) == before


def test_without_a_template_or_its_end_nothing_is_said() -> None:
    tokenizer, config, generation = base_with_chatml()
    for template in (None, "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"):
        tokenizer.chat_template = template
        assert serve_stop(tokenizer, config, generation) is None
