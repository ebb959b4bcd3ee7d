"""What is exported says the same to transformers 4 and 5, to llama.cpp's converter and to vLLM."""

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

HALF = tiny_config("llama").head_dim // 2
VLLM_ROPES = ROPES | {
    "yarn with attention_factor": ROPES["yarn"] | {"attention_factor": 1.5},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * HALF, "long_factor": [1.0 + i for i in range(HALF)],
    },
}  # fmt: skip
VLLM = """
import json, sys, types, torch
from unittest.mock import MagicMock
from vllm.transformers_utils.config import get_config

def stub(name, folder=None, **content):  # what the rotary embeddings import and do not compute with
    module = types.ModuleType(name)
    module.__dict__.update({"__getattr__": lambda key: MagicMock(), **content})
    if folder:
        module.__path__ = [sys.argv[1] + "/" + folder]
    sys.modules[name] = module

class CustomOp(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()

    enabled = classmethod(lambda cls: False)
    register = staticmethod(lambda name, **more: lambda cls: cls)

served = MagicMock()
served.model_config.max_model_len = 256
stub("vllm.model_executor", "vllm/model_executor")
stub("vllm.model_executor.layers", "vllm/model_executor/layers")
stub("vllm.model_executor.custom_op", CustomOp=CustomOp)
stub("vllm.config", "vllm/config", get_current_vllm_config=lambda: served)
stub("vllm._aiter_ops")
stub("vllm.distributed", "vllm/distributed")
stub("vllm.distributed.parallel_state")
stub("vllm.utils.flashinfer", has_flashinfer=lambda: False)
from vllm.model_executor.layers.rotary_embedding import get_rope

tables = {}
for folder, overrides in json.loads(sys.argv[2]):
    config = get_config(folder, trust_remote_code=False)
    config.update(overrides)  # as --hf-overrides does
    rope = get_rope(
        config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters,
        dtype=torch.float32,
    )
    if config.rope_parameters["rope_type"] == "longrope":  # the short frequencies lie before the long ones
        assert rope.use_long_rope
        tables[folder] = rope.long_short_cos_sin_cache[64:]
    else:
        tables[folder] = rope.cos_sin_cache
torch.save(tables, sys.argv[3])
"""


def saved(folder: Path, rope: dict, window: int = 256) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", rope_parameters=rope, max_position_embeddings=window))
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


def our_table(folder: Path) -> torch.Tensor:
    """(256, head_dim) cosines, then sines, of the model as it is loaded here, for a document of 256 tokens."""
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    return torch.cat([table[0, :, :HALF] for table in rotary(torch.zeros(1), torch.arange(256)[None])], dim=-1)


def test_vllm_computes_the_same(tmp_path: Path) -> None:
    """DS_LONGFT_TEST_VLLM names a folder with an unpacked wheel of vLLM (0.33 was read). Nothing of it is compiled.

    `dynamic` is the one type that vLLM has to be told of: its table ends with the old window, not stretched.
    """
    unpacked = os.environ.get("DS_LONGFT_TEST_VLLM")
    if unpacked is None:
        pytest.skip("DS_LONGFT_TEST_VLLM names no folder with an unpacked vLLM")
    dynamic = {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 4.0}
    told = {"max_position_embeddings": 256, "rope_parameters": dynamic | {"max_trained_positions": 64}}
    cases: dict[str, tuple[Path, dict]] = {
        name: (saved(tmp_path / name, rope), {}) for name, rope in VLLM_ROPES.items()
    }
    cases["dynamic"] = (saved(tmp_path / "dynamic", dynamic, window=64), {})
    cases["dynamic, told"] = (saved(tmp_path / "told", dynamic, window=64), told)
    given = json.dumps([(str(folder), overrides) for folder, overrides in cases.values()])
    path = f"{unpacked}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", VLLM, unpacked, given, str(tmp_path / "tables.pt")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    tables = torch.load(tmp_path / "tables.pt")
    assert len(tables[str(cases.pop("dynamic")[0])]) == 64
    for name, (folder, _) in cases.items():
        worst = (tables[str(folder)][:256] - our_table(folder)).abs().max()  # angles reach 255 rad, in fp32
        assert worst < 1e-4, f"{name}: {worst}"
