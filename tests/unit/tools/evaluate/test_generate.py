"""Answers of one process: tokens are those of the whole text read anew for each of them, for every kind of attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from ds_longft.model.lora import add_lora, save_adapter
from ds_longft.model.rope import window_tokens
from ds_longft.tools.evaluate.cached_attention import CACHED, OnThisRank, cached_attention, register
from ds_longft.tools.evaluate.generate import generate
from ds_longft.tools.evaluate.subject import find_subject, load_subject
from tests.unit.model.tiny import save_tiny
from tests.unit.sequence.zoo import tiny

CPU = torch.device("cpu")


def greedy_without_cache(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The definition: the whole text again for every token, through transformers' own eager attention."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


# plain, bias, window, softcap, a window that the mask alone knows
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "phimoe"])
def test_tokens_are_those_of_the_whole_text(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    register()
    loaded = load_subject(find_subject(str(folder)), CPU, attention=CACHED)
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 128, (n,), generator=rng).tolist() for n in (45, 1, 30)]
    with torch.no_grad():
        wanted = [greedy_without_cache(model, prompt, 6) for prompt in prompts]
    assert generate(loaded, prompts, max_new_tokens=6, stop_ids=set()) == wanted


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "minimax", "llama4_text"])
def test_layers_with_a_state_or_chunks_answer_too(tmp_path: Path, family: str) -> None:
    """From a folder; each family with a state over ranks: `tests/distributed/test_generate_exact.py`. Llama 4's texts
    begin a chunk of 8 tokens one after the other, and its queries are scaled by position.
    """
    torch.manual_seed(0)
    config = tiny(family)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    register()
    loaded = load_subject(find_subject(str(tmp_path)), CPU, attention=CACHED)
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, config.vocab_size, (n,), generator=rng).tolist() for n in (45, 2, 20)]
    with torch.no_grad():
        wanted = [greedy_without_cache(model, prompt, 6) for prompt in prompts]
    assert generate(loaded, prompts, max_new_tokens=6, stop_ids=set()) == wanted


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48,
    "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [3.0 + i for i in range(8)],
}  # fmt: skip
SINCE_5_24 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="transformers 5.17 goes on otherwise where an answer crosses the switch",
)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


@pytest.mark.parametrize(
    ("family", "rope", "length"),
    [
        ("llama", DYNAMIC, 90),
        ("llama", DYNAMIC, 58),
        pytest.param("phi3", LONGROPE, 40, marks=SINCE_5_24),
        pytest.param("phi3", LONGROPE, 44, marks=SINCE_5_24),
        ("phi3", LONGROPE, 90),
    ],
)
def test_as_transformers_generates_where_the_length_chooses_the_rope(
    tmp_path: Path, family: str, rope: dict, length: int
) -> None:
    """The prompt turns by its length, each new token by the length with it. Past its switch Phi-3 is read anew."""
    longest = {"original_max_position_embeddings": 48} if family == "phi3" else {}  # what Phi-3's own code looks at
    folder = save_tiny(tmp_path / "m", family, rope_parameters=rope, **longest)
    register()
    loaded = load_subject(find_subject(str(folder)), CPU, attention=CACHED)
    prompts = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(1))
    # Weights as large as this make the next token depend on the positions.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    for each in (model, loaded.plain):
        torch.manual_seed(3)
        for layer in each.model.layers:
            for p in layer.self_attn.parameters():
                p.data.normal_(0, 0.4)
    wanted = model.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(loaded, prompts.tolist(), max_new_tokens=12, stop_ids=set()) == wanted[:, length:].tolist()


def test_stops_one_by_one(tmp_path: Path) -> None:
    register()
    loaded = load_subject(find_subject(str(save_tiny(tmp_path / "m"))), CPU, attention=CACHED)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    free = generate(loaded, prompts, max_new_tokens=8, stop_ids={127})
    stop = free[0][3]
    stopped = generate(loaded, prompts, max_new_tokens=8, stop_ids={stop})
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])
    first = free[0][0]
    forced = generate(loaded, prompts[:1], max_new_tokens=3, stop_ids={first}, min_new_tokens=1)
    assert len(forced[0]) >= 1
    assert generate(loaded, prompts[:1], max_new_tokens=3, stop_ids={first}) == [[]]


def test_a_step_by_definition() -> None:
    """A window, a cap and sinks over two texts, against a loop that follows the formulas."""
    rng = torch.Generator().manual_seed(0)
    s, new = 12, 3  # prompts of 7 and 4 tokens and one of padding; three tokens behind each
    q, k, v = (torch.randn(1, h, n, 8, generator=rng) for h, n in ((4, 2), (2, s + 2 * new), (2, s + 2 * new)))
    sinks = torch.randn(4, generator=rng)
    here = OnThisRank((range(0, 7), range(7, 11)), (0, 0), (7, 4), s, None)
    given = {"scaling": 0.3, "softcap": 2.0, "sliding_window": 5, "s_aux": sinks}
    out, _ = cached_attention(torch.nn.Module(), q, k, v, None, on_this_rank=here, **given)
    for b, prompt in enumerate(here.keys):
        keys = [*prompt, *range(s + b, s + 2 * new, 2)][-5:]
        for head in range(4):
            scores = 2.0 * torch.tanh((k[0, head // 2, keys] @ q[0, head, b]) * 0.3 / 2.0)
            weights = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]
            torch.testing.assert_close(out[0, b, head], weights @ v[0, head // 2, keys])


def test_an_adapter_is_loaded_with_the_stretched_rope(tmp_path: Path) -> None:
    from ds_longft.config.model_keys import RopeConfig
    from ds_longft.config.run_config import LoraConfig, ModelConfig
    from ds_longft.model.load import load_config, load_model

    base = save_tiny(tmp_path / "base")
    config = ModelConfig(path=str(base), rope=RopeConfig(type="abf", theta=5e5))
    hf_config = load_config(config, 256, attn_implementation="sdpa")
    model = add_lora(
        load_model(config, hf_config, ds_engine_config=None, dtype=torch.float32, device=CPU), LoraConfig(r=2), seed=0
    )
    state = {n: torch.full_like(p, 0.02) for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(state, strict=False)
    from peft.utils import get_peft_model_state_dict

    save_adapter(model, get_peft_model_state_dict(model), tmp_path / "run")
    register()
    loaded = load_subject(find_subject(str(tmp_path / "run")), CPU, attention=CACHED)
    assert window_tokens(loaded.plain.config) == 256
    assert loaded.plain.config.rope_parameters["rope_theta"] == 5e5
    ids = list(range(3, 100))
    with torch.no_grad():
        wanted = greedy_without_cache(model.eval(), ids, 4)
    assert generate(loaded, [ids], max_new_tokens=4, stop_ids={2}) == [wanted]
