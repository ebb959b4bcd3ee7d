"""The proof without the engine, in float64: op, loss, model, accumulation over ranks equal one process to 1e-10."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ds_longft.config.run_config import LoraConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import add_lora
from ds_longft.model.packed import unpack
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.shard import shard
from ds_longft.train.install import fuse_and_tile
from tests.distributed.models import (
    VOCAB,
    dealt,
    make_pack,
    packed,
    reference_sum,
    relative_error,
    tiny_config,
    tiny_model,
)

Lengths = tuple[list[int], ...]
PACKS: Lengths = ([20, 1, 50, 26], [97], [3, 3, 40, 7, 9])


def prepared(model: Any, lora: bool | dict[str, Any], *, dense: bool = False) -> Any:
    """LoRA (with more settings, where they are given) whose B is not zero, so that A has a gradient too.

    `base`: the format of the base's weights; `dense`: they are made dense again.
    """
    if not lora:
        return model
    settings = {"r": 4, **(lora if isinstance(lora, dict) else {})}
    if form := settings.pop("base", None):
        packed(model, form)
        if dense:
            unpack(model)
    model = add_lora(model, LoraConfig(**settings), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


def gradients(
    rank: int, world: int, family: str, changes: dict[str, Any], lora: bool | dict[str, Any], policy: str, sample: bool,
    sp: int, lengths: Lengths = PACKS, saving: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """Loss and every gradient of three packs of one step, on `world` ranks in groups of `sp`.

    `saving`: ways to save memory, see `install`; `whole`: documents lie whole on their ranks, where there are enough.
    """
    register()
    config = tiny_config(family, **changes)
    model = prepared(tiny_model(config, attn=ULYSSES, dtype=torch.float64), lora)
    layout = ParallelLayout.create(sp)
    saving = saving or {}
    objective = SftObjective(model, layout, kv_heads_at_a_time=saving.get("kv_heads"))
    base = model.get_base_model() if lora else model
    layers = list(base.get_decoder().layers)
    if saving.keys() - {"whole"}:
        install(layers, policy, saving)
    else:
        apply_recompute(layers, policy)
    packs = [make_pack(each, seed=i, multiple=sp, sample_weighting=sample) for i, each in enumerate(lengths)]
    if saving.get("whole"):
        packs = [dealt(pack, sp) for pack in packs]
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
    total = torch.zeros((), dtype=torch.float64)
    for pack in packs[layout.dp_rank :: layout.dp]:
        loss = objective(shard(pack, layout, torch.device("cpu"))) / weight
        loss.backward()
        total += loss.detach()
    grads = {
        n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad
    }
    for tensor in (total, *grads.values()):
        dist.all_reduce(tensor)
    return (float(total), grads) if rank == 0 else None


def install(layers: list[Any], policy: str, saving: dict[str, Any]) -> None:
    """Fused linears and what `saving` asks for: `tile` tokens, what lies on the `host`, what is kept of `linears`."""
    fused = [fuse_and_tile(layer, 2, saving.get("tile")) for layer in layers]
    store = HostStore(torch.device("cpu"))
    keeps = [LayerKeep(i, store=store) for i in range(len(layers))]
    host = saving.get("host", ())
    for keep, of_layer in zip(keeps, fused, strict=True):
        keep.last = of_layer.last
        keep.input = "host" if "input" in host else "device"
        keep.attention = "host" if "attention" in host else "device"
        wanted = [g for g in of_layer.groups if saving.get("linears") and "down_proj" not in g.names]
        (keep.on_host if "linears" in host else keep.on_device).extend(wanted)
    apply_recompute(layers, policy, keep=keeps)


def reference(
    family: str, changes: dict[str, Any], lora: bool | dict[str, Any], sample: bool, lengths: Lengths = PACKS
) -> Any:
    """The same from one process with a dense attention, each document alone."""
    model = prepared(tiny_model(tiny_config(family, **changes), attn="dense", dtype=torch.float64), lora, dense=True)
    packs = [make_pack(each, seed=i, sample_weighting=sample) for i, each in enumerate(lengths)]
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
    loss = sum(reference_sum(model, p) for p in packs) / weight
    loss.backward()
    return float(loss.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
SINKS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9, "num_attention_heads": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip

DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
}
LONGROPE = {
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0],
    },
}  # fmt: skip

LONGROPE_PHI3 = {**LONGROPE, "original_max_position_embeddings": 32}  # Phi-3 goes by this one

LATENT = {
    "num_attention_heads": 6, "num_key_value_heads": 6, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 2,
}  # fmt: skip
SHARED = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 13,
    "activation_sparsity_pattern": [0.0] * 6, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 8,
    "altup_num_inputs": 2,
}  # fmt: skip

CASES = [
    # family, config changes, LoRA, recompute policy, sample weighting, world, sp
    ("llama", {}, False, "none", False, 2, 1),
    ("llama", {}, True, "keep_attention", False, 2, 2),
    ("llama", {}, False, "full", True, 4, 4),
    ("llama", {"num_hidden_layers": 5}, True, "sqrt", True, 4, 2),
    ("llama", {"num_hidden_layers": 5}, False, "every_k", False, 2, 2),
    ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, True, "keep_attention", False, 2, 2),
    ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, False, "none", False, 4, 4),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}, False, "keep_attention", False, 4, 4),
    ("qwen2", {}, True, "keep_attention", False, 2, 2),
    ("qwen3", {}, False, "keep_attention", False, 4, 2),
    ("mistral", {"sliding_window": 11}, False, "keep_attention", False, 4, 4),
    ("mistral", {"sliding_window": 300}, True, "full", False, 2, 2),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}, True, "keep_attention", False, 2, 2),
    ("gemma", {}, False, "keep_attention", False, 2, 2),
    ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 13}, True, "keep_attention", False, 4, 4),
    ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 13}, False, "sqrt", False, 2, 2),
    ("mixtral", MOE, False, "keep_attention", False, 2, 2),
    ("qwen3_moe", {**MOE, "num_experts": 4, "moe_intermediate_size": 24}, True, "full", True, 4, 2),
    ("gpt_oss", SINKS, False, "keep_attention", False, 4, 4),
    ("gpt_oss", SINKS, True, "none", False, 2, 2),
    ("diffllama", {}, True, "keep_attention", False, 2, 2),  # two attentions in a layer
    ("diffllama", {}, True, "auto", True, 4, 2),
    ("deepseek_v3", LATENT, False, "keep_attention", False, 2, 2),  # value heads narrower than query heads
]  # fmt: skip


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what asks for float32 gets float64."""
    with ExitStack() as stack:
        for name in ("float32", "float"):
            stack.enter_context(patch.object(torch, name, torch.float64))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def wide_gradients(rank: int, world: int, *args: Any) -> Any:
    """`gradients` in float64 throughout."""
    with in_float64():
        return gradients(rank, world, *args)


def wide_reference(*args: Any) -> Any:
    """`reference` in float64 throughout."""
    with in_float64():
        return reference(*args)


def assert_equal(ours: Any, truth: Any, float32: str | None = None) -> None:
    """1e-10, but for parameters whose name holds `float32`, where the model itself computes in float32."""
    (loss, grads), (ref_loss, ref) = ours, truth
    assert loss == pytest.approx(ref_loss, rel=1e-10)
    assert set(ref) <= set(grads)
    errors = {name: relative_error(grads[name], ref[name]) for name in ref}
    limits = {name: 1e-6 if float32 is not None and float32 in name else 1e-10 for name in errors}
    assert {name: f"{e:.1e}" for name, e in errors.items() if not e <= limits[name]} == {}


def computed_in_float32(family: str) -> str | None:
    """What the names of parameters hold that the model computes in float32 whatever its dtype is.

    Gemma's norms multiply by their weight so, Gemma 3n's on the way of everything; DiffLlama takes exponentials so.
    """
    if family == "gemma3n_text":
        return ""
    return "norm" if family.startswith("gemma") else "lambda" if family == "diffllama" else None


@pytest.mark.parametrize(("family", "changes", "lora", "policy", "sample", "world", "sp"), CASES)
def test_gradients_equal_one_process(pools, family, changes, lora, policy, sample, world, sp):
    ours = pools(world).run(gradients, family, changes, lora, policy, sample, sp)[0]
    assert_equal(ours, reference(family, changes, lora, sample), computed_in_float32(family))


TILE, TURNS, WHOLE = {"tile": 7}, {"kv_heads": 1}, {"whole": True}
SAVING = {
    # name: family, config changes, LoRA, recompute policy, world, sp, ways to save
    "tiles, LoRA": ("llama", {}, True, "keep_attention", 2, 2, TILE),
    "tiles, every weight": ("llama", {}, False, "full", 2, 2, TILE),
    "tiles longer than the shard": ("qwen3", {}, True, "auto", 2, 2, {"tile": 1000}),
    "tiles, a norm after the MLP": ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 13}, True, "full", 2, 2, TILE),
    "tiles, without recomputation": ("llama", {}, True, "none", 2, 1, TILE),
    "tiles in segments": ("llama", {"num_hidden_layers": 5}, True, "sqrt", 2, 2, TILE),
    "the down projection once": ("llama", {}, True, "keep_attention", 2, 2, {"linears": False, "x": 0}),
    "heads in turns": ("llama", {}, True, "keep_attention", 2, 2, {"kv_heads": 1}),
    "heads in turns, one rank": ("qwen2", {}, False, "full", 2, 1, TURNS),
    "heads in turns, 9 on 4 ranks": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, False, "full", 4, 4, TURNS),
    "heads in turns, 8 on 3 ranks": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": 4}, True, "auto", 3, 3, TURNS),
    "heads in turns, one kv head": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, False, "none", 4, 4, TURNS),
    "heads in turns, sinks": ("gpt_oss", {**SINKS, "num_attention_heads": 8, "num_key_value_heads": 4}, False, "keep_attention", 2, 2, TURNS),
    "heads in turns, two attentions a layer": ("diffllama", {}, False, "full", 2, 2, TURNS),
    "heads in turns, keys of an earlier layer": ("gemma3n_text", SHARED, True, "keep_attention", 2, 2, TURNS),
    "inputs on the host": ("llama", {"num_hidden_layers": 3}, True, "full", 2, 2, {"host": ("input",)}),
    "inputs of segments on the host": ("llama", {"num_hidden_layers": 5}, False, "sqrt", 2, 2, {"host": ("input",)}),
    "everything on the host": ("llama", {"num_hidden_layers": 3}, True, "auto", 2, 2, {"host": ("input", "attention", "linears"), "linears": True}),
    "tiles, a norm inside the MLP": ("bitnet", {}, False, "full", 2, 2, TILE),
    "whole documents": ("llama", {}, True, "keep_attention", 2, 2, WHOLE),
    "whole documents, every weight": ("qwen3", {}, False, "none", 4, 2, WHOLE),
    "whole documents, 9 heads on 4 ranks": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, False, "full", 4, 4, WHOLE),
    "whole documents, windows": ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 13}, True, "keep_attention", 4, 4, WHOLE),
    "whole documents, sinks": ("gpt_oss", SINKS, False, "keep_attention", 3, 3, WHOLE),
    "whole documents, heads in turns": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": 4}, True, "auto", 3, 3, {**WHOLE, **TURNS, **TILE}),
    "whole documents, dynamic RoPE": ("llama", DYNAMIC, True, "keep_attention", 2, 2, WHOLE),
    "whole documents, longrope": ("phi3", LONGROPE_PHI3, False, "full", 4, 2, WHOLE),
    "everything at once": ("llama", {"num_hidden_layers": 4}, True, "every_k", 2, 2, {"host": ("input",), **TILE, **TURNS}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVING)
def test_saving_memory_changes_nothing(pools, name):
    family, changes, lora, policy, world, sp, saving = SAVING[name]
    ours = pools(world).run(gradients, family, changes, lora, policy, False, sp, PACKS, saving)[0]
    assert_equal(ours, reference(family, changes, lora, False), computed_in_float32(family))


WHOLE_HEAD = {"modules_to_save": ["lm_head"]}

CRAFTED = {
    # name: family, config changes, LoRA, world, sp, document lengths of each pack
    "one-token documents": ("llama", {}, False, 4, 4, ([1] * 7 + [30, 1, 1], [1], [1, 1])),
    "documents cut by every border": ("llama", {}, True, 4, 4, ([97], [50, 50, 50])),
    "length not divisible by sp": ("llama", {}, False, 3, 3, ([50], [7, 3], [1])),
    "pack shorter than sp": ("llama", {}, False, 4, 4, ([3], [3], [2])),
    "a document as long as the budget": ("llama", {}, False, 4, 4, ([128], [64, 64])),
    "window smaller than a shard": ("mistral", {"sliding_window": 5}, False, 4, 4, ([97], [20, 60])),
    "window larger than a shard": ("mistral", {"sliding_window": 40}, False, 4, 4, ([97], [20, 60])),
    "window of two tokens": ("mistral", {"sliding_window": 2}, False, 2, 2, ([30],)),
    "kv heads fewer than sp": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}, True, 4, 4, ([40, 9],)),
    "soft-capped attention, tied": ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "sliding_window": 7}, False, 3, 3, ([40, 9],)),
    "sinks, one-token documents": ("gpt_oss", SINKS, False, 3, 3, ([1, 30, 1],)),
    "whole lm_head beside LoRA": ("llama", {}, WHOLE_HEAD, 2, 2, ([40, 9], [20])),
    "whole lm_head beside LoRA, tied": ("llama", {"tie_word_embeddings": True}, WHOLE_HEAD, 2, 2, ([40, 9], [20])),
    "dynamic RoPE, document longer than a shard": ("llama", DYNAMIC, False, 4, 4, ([97], [20])),
    "longrope, document longer than a shard": ("llama", LONGROPE, True, 2, 2, ([97], [20])),
    "dynamic RoPE, lengths mixed": ("llama", DYNAMIC, False, 4, 4, ([97, 20, 50, 33], [20, 40, 64])),
    "dynamic RoPE, lengths mixed, two packs at a time": ("llama", DYNAMIC, True, 4, 2, ([20, 97, 33, 50], [7, 40], [64])),
    "longrope, lengths mixed": ("phi3", LONGROPE_PHI3, True, 2, 2, ([97, 20, 32, 33], [33, 7, 5], [8])),
    "longrope, lengths mixed, sp 3": ("llama", LONGROPE, False, 3, 3, ([20, 32, 97, 9, 33], [31, 40])),
    "sp smaller than the world": ("qwen3", {}, False, 4, 2, ([20, 5], [33], [8, 8, 8])),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_packs(pools, name):
    family, changes, lora, world, sp, lengths = CRAFTED[name]
    ours = pools(world).run(gradients, family, changes, lora, "keep_attention", False, sp, lengths)[0]
    assert_equal(ours, reference(family, changes, lora, False, lengths), computed_in_float32(family))
