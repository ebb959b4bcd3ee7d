"""What is exported says the same to transformers 4 and 5."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ds_longft.model.elsewhere import spell_for_older_readers
from tests.tokenizer import tiny_tokenizer
from tests.unit.model.tiny import tiny_config

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
OLDER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(200)[None] % 97).logits
torch.save({"logits": logits, "ids": tokenizer("the answer<|im_end|>").input_ids, "eos": tokenizer.eos_token}, sys.argv[2])
"""


def saved(folder: Path, rope: dict) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", rope_parameters=rope, max_position_embeddings=256))
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    tokenizer.save_pretrained(folder)
    spell_for_older_readers(folder)
    return folder


@pytest.mark.parametrize("rope", ROPES)
def test_both_spellings_say_the_same(rope: str, tmp_path: Path) -> None:
    saved(tmp_path, ROPES[rope])
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 500000.0
    scaling = {key: value for key, value in ROPES[rope].items() if key != "rope_theta"}
    assert written["rope_scaling"] == (None if rope == "default" else scaling)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == ROPES[rope]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|x|>" in tokenizer.all_special_tokens
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("rope", ROPES)
def test_transformers_4_computes_the_same(rope: str, tmp_path: Path) -> None:
    """DS_LONGFT_TEST_TRANSFORMERS_4 names a folder that `pip install --target` put transformers 4 into."""
    older = os.environ.get("DS_LONGFT_TEST_TRANSFORMERS_4")
    if older is None:
        pytest.skip("DS_LONGFT_TEST_TRANSFORMERS_4 names no folder with transformers 4")
    saved(tmp_path / "model", ROPES[rope])
    command = [sys.executable, "-c", OLDER, str(tmp_path / "model"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": older})
    theirs = torch.load(tmp_path / "out.pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], model(torch.arange(200)[None] % 97).logits, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (theirs["ids"], theirs["eos"]) == (tokenizer("the answer<|im_end|>").input_ids, tokenizer.eos_token)


@pytest.mark.parametrize("rope", ROPES)
def test_llama_cpp_reads_the_same_rope(rope: str, tmp_path: Path) -> None:
    """DS_LONGFT_TEST_LLAMA_CPP names a folder with convert_hf_to_gguf.py, as the sdist of llama-cpp-python has it in
    vendor/llama.cpp; DS_LONGFT_TEST_TOKENIZER_MODEL a tokenizer.model, as the wheel of mistral-common has it.
    """
    folder, vocabulary = (os.environ.get(f"DS_LONGFT_TEST_{name}") for name in ("LLAMA_CPP", "TOKENIZER_MODEL"))
    if folder is None or vocabulary is None:
        pytest.skip("DS_LONGFT_TEST_LLAMA_CPP and DS_LONGFT_TEST_TOKENIZER_MODEL are not both set")
    saved(tmp_path / "model", ROPES[rope])
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    shutil.copy(vocabulary, tmp_path / "model/tokenizer.model")
    command = [sys.executable, f"{folder}/convert_hf_to_gguf.py", str(tmp_path / "model"), "--outtype", "f32"]
    path = f"{folder}/gguf-py:{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(
        [*command, "--outfile", str(tmp_path / "out.gguf")], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    read = GGUFReader(tmp_path / "out.gguf")
    keys = {name.removeprefix("llama."): field.contents() for name, field in read.fields.items() if "rope" in name}
    assert keys["rope.freq_base"] == 500000.0
    if rope in ("linear", "yarn"):
        assert (keys["rope.scaling.type"], keys["rope.scaling.factor"]) == (rope, 4.0)
    if rope == "yarn":
        assert keys["rope.scaling.original_context_length"] == 64
    stretch = [tensor.data for tensor in read.tensors if tensor.name == "rope_freqs.weight"]
    if rope == "llama3":  # what each frequency is divided by
        config = AutoConfig.from_pretrained(tmp_path / "model")
        default = 500000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        ours, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        torch.testing.assert_close(default / torch.from_numpy(stretch[0].copy()), ours, rtol=1e-5, atol=0)
    else:
        assert stretch == []
