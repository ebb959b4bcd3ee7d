"""Answers of prompts that are split over ranks are those of one process, token by token; of layers with a state or chunks,
those of plain transformers, which reads the whole text anew for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.distributed.test_state_exact import FAMILIES

PROMPTS = [41, 6, 30]
FEW = [2, 1, 5, 1]  # fewer tokens than a convolution looks back, ranks without any of a text's
NEW = 6

Made = tuple[list[list[int]], list[list[float]]]


def case(
    rank: int, world: int, folder: str, sp: int, lengths: list[int], new: int, weights: Any = "resident", quantize: Any = "auto"
) -> Made:  # fmt: skip
    """Tokens, and the logits before the third of them."""
    import torch

    from ds_longft.tools.evaluate.cached_attention import CACHED, register
    from ds_longft.tools.evaluate.subject import find_subject, load_subject

    register()
    subject = find_subject(folder, quantize=quantize)
    loaded = load_subject(subject, torch.device("cpu"), attention=CACHED, weights=weights, local_world=world)
    mlp = loaded.plain.get_decoder().layers[0].mlp
    away = any(hasattr(t, "head") for t in (*mlp.parameters(), *mlp.buffers()))  # in place of a weight
    assert away == (weights != "resident")
    _, tokens, logits = answers(loaded, sp, lengths, new)
    return tokens, logits.tolist()


def answers(loaded: Any, sp: int, lengths: list[int], new: int) -> tuple[list[list[int]], list[list[int]], Any]:
    """Drawn prompts, the tokens behind them, and the logits [B, V] before the third of these."""
    import torch

    from ds_longft.layout import ParallelLayout
    from ds_longft.tools.evaluate.generate import ALONE, Reader, generate
    from tests.distributed.models import VOCAB

    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]
    layout = ParallelLayout.create(sp) if sp > 1 else ALONE
    tokens = generate(loaded, prompts, max_new_tokens=new, stop_ids=set(), layout=layout)
    reader = Reader(loaded, layout)
    reader.read(prompts, 2)
    for i in range(2):
        logits = reader.add([reply[i] for reply in tokens])
    return prompts, tokens, logits


DYNAMIC = {"max_position_embeddings": 20, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}}
GQA = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "changed", "sp", "lengths"),
    [
        ("llama", GQA, 2, [41, 6, 30]),
        ("llama", GQA, 3, [41, 6, 30]),
        ("llama", DYNAMIC, 2, [41, 15]),
        ("mistral", {}, 3, [50, 3]),  # a window
        ("gemma2", {}, 2, [3, 44]),  # a window in every other layer, a cap
        ("gpt_oss", {}, 2, [37]),  # a window and sinks
    ],
)
def test_ranks_answer_what_one_answers(
    pools: Callable[[int], WorkerPool],
    tmp_path: Path,
    family: str,
    changed: dict[str, Any],
    sp: int,
    lengths: list[int],
) -> None:
    import torch

    from tests.unit.model.tiny import save_tiny

    folder = str(save_tiny(tmp_path / "model", family, **changed))
    together = pools(sp).run(case, folder, sp, lengths, 8)
    tokens, logits = pools(sp).run(case, folder, 1, lengths, 8)[0]
    for rank_tokens, rank_logits in together:
        assert rank_tokens == tokens
        torch.testing.assert_close(torch.tensor(rank_logits), torch.tensor(logits), rtol=1e-5, atol=1e-5)


def hybrid_case(
    rank: int, world: int, family: str, changes: dict[str, Any], lengths: list[int]
) -> tuple[Made, list[list[int]] | None]:
    """Answers of all ranks, tokens and the last logits, and on the first the tokens of transformers alone."""
    import torch

    from ds_longft.model.wrapped import text_class
    from ds_longft.tools.evaluate.cached_attention import CACHED, register
    from ds_longft.tools.evaluate.subject import Loaded
    from tests.distributed.models import tiny_config, tiny_model

    register()
    config = tiny_config(family, **changes)
    text_class(config)  # mends what transformers' class of Llama 4 calls its decoder
    model: Any = tiny_model(config, attn=CACHED, dtype=torch.float32).eval()
    loaded = Loaded(model, model, torch.device("cpu"))
    prompts, tokens, logits = answers(loaded, world, lengths, NEW)
    if rank:
        return (tokens, logits.tolist()), None
    plain = tiny_model(tiny_config(family, **changes), attn="eager", dtype=torch.float32).eval()
    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for text in texts:
            for _ in range(NEW):
                text.append(int(plain(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        # what follows two tokens more
        whole = [plain(input_ids=torch.tensor([t[: n + 2]])).logits[0, -1] for t, n in zip(texts, lengths, strict=True)]
    torch.testing.assert_close(logits, torch.stack(whole), rtol=1e-4, atol=1e-4)
    return (tokens, logits.tolist()), [text[n:] for text, n in zip(texts, lengths, strict=True)]


CHUNKS = {
    "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8, "floor_scale": 4,
    "intermediate_size_mlp": 48, "moe_layers": [1], "num_local_experts": 4, "num_experts_per_tok": 1,
}  # fmt: skip
NOT_ALIKE = {**FAMILIES, "Llama 4": ("llama4_text", CHUNKS)}
HYBRIDS = [(name, world, lengths) for name in NOT_ALIKE for world in (1, 2, 3) for lengths in (PROMPTS, FEW)]
QUICK_HYBRIDS = [
    ("Qwen3.5, 9 value and 3 key heads", 3, PROMPTS),
    ("Kimi-Linear", 2, FEW),
    ("Nemotron-H", 3, FEW),
    ("Falcon-H1 without norm", 2, PROMPTS),
    ("Jamba", 2, PROMPTS),
    ("LFM2", 3, FEW),
    ("MiniMax", 2, PROMPTS),
    ("Llama 4", 2, PROMPTS),
]


@pytest.mark.parametrize(
    ("name", "world", "lengths"),
    [case if case in QUICK_HYBRIDS else pytest.param(*case, marks=pytest.mark.slow) for case in HYBRIDS],
)
def test_layers_with_a_state_or_chunks_answer_as_transformers_does(
    pools: Callable[[int], WorkerPool], name: str, world: int, lengths: list[int]
) -> None:
    import torch

    family, changes = NOT_ALIKE[name]
    made = pools(world).run(hybrid_case, family, changes, lengths)
    (tokens, logits), wanted = made[0]
    assert tokens == wanted
    assert len({token for reply in tokens for token in reply}) > 2, "answers that show a fault"
    for (other, other_logits), _ in made[1:]:
        assert other == tokens
        torch.testing.assert_close(torch.tensor(other_logits), torch.tensor(logits), rtol=0, atol=0)


def with_adapter(base: Path, folder: Path, quantize: str) -> str:
    """A run's output: an adapter on that base, with norms trained beside it."""
    import torch

    from ds_longft.config.read import dump_config
    from ds_longft.config.run_config import LoraConfig, RunConfig
    from ds_longft.model.load import load_config, load_model
    from ds_longft.model.lora import add_lora, gather_adapter_state, save_adapter

    config = RunConfig.model_validate({"model": {"path": str(base), "quantize": quantize}, "lora": {"r": 4}})
    hf_config = load_config(config.model, 64, attn_implementation="eager")
    made = load_model(config.model, hf_config, ds_engine_config=None, dtype=torch.float32, device=torch.device("cpu"))
    model = add_lora(made, LoraConfig(r=4, modules_to_save=["input_layernorm"]), seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    save_adapter(model, gather_adapter_state(model), folder)
    (folder / "config.yaml").write_text(dump_config(config))
    return str(folder)


@pytest.mark.parametrize(
    ("weights", "quantize", "adapter", "family"),
    [
        ("host", "auto", True, "llama"),
        ("sharded", "nf4", True, "llama"),
        ("host", "int8", False, "llama"),
        ("sharded", "auto", False, "qwen3_next"),
    ],
)
def test_weights_that_come_a_layer_ahead(
    pools: Callable[[int], WorkerPool], tmp_path: Path, weights: str, quantize: str, adapter: bool, family: str
) -> None:
    """To the bit those of weights that lie on each rank: of one layer the bytes are the same wherever they wait."""
    from tests.unit.model.tiny import save_tiny

    if family == "llama":
        sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 3}
        folder = str(save_tiny(tmp_path / "model", family, **sizes))
    else:
        folder = str(saved_hybrid(tmp_path / "model"))
    if adapter:
        folder = with_adapter(Path(folder), tmp_path / "run", quantize)
        quantize = "auto"  # as the run has it
    there = pools(2).run(case, folder, 2, [41, 6, 30], 6, "resident", quantize)
    away = pools(2).run(case, folder, 2, [41, 6, 30], 6, weights, quantize)
    assert away == there


def saved_hybrid(folder: Path) -> Path:
    """A model of three layers, two of them with a state."""
    import torch

    from tests.distributed.models import tiny_config, tiny_model

    family, changes = FAMILIES["Qwen3-Next"]
    model: Any = tiny_model(tiny_config(family, **changes), attn="eager", dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
