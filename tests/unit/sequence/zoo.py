"""Tiny models of transformers' causal model types, and their step: as transformers computes it, and as we do.

The truth is `eager` attention in one process, each document alone, from the logits of the model's own forward. Ours
packs the documents into one row and saves memory in one of the WAYS. All in float64; eager's softmax is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ds_longft.batch import IGNORE_INDEX
from ds_longft.data.pack import pack_of
from ds_longft.layout import ParallelLayout
from ds_longft.model.supported import decoder_layers
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.shard import shard
from ds_longft.train.install import fuse_and_tile

DOCUMENTS = (21, 13)
"""Tokens of each document: longer than the window, so that it matters."""

SMALL: dict[str, Any] = {
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2, "attention_dropout": 0.0, "use_cache": False,
    # windows
    "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1,
    # mixtures of experts
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    # latent attention, value heads narrower than query heads
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 12,
    # Gemma 3n: the last layer reads the keys and values of the one before
    "hidden_size_per_layer_input": 8, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
    "rotary_dim": 8,
}  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 4, "activation_sparsity_pattern": [0.0] * 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    **{name: {"num_key_value_heads": 4, "head_dim": 8} for name in ("deepseek_v3", "axk1", "youtu", "longcat_flash", "glm4_moe_lite", "minicpm3", "sarvam_mla")},
    "deepseek_v2": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "granite": {"logits_scaling": 3.0}, "granitemoe": {"logits_scaling": 3.0}, "hyperclovax": {"logits_scaling": 3.0},
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to save memory, as `train.*` keys ask for it."""

    recompute: str
    tile_tokens: int | None = None
    kv_heads: int | None = None
    keep_linears: bool = False


WAYS = {
    "none": Way("none"),
    "full": Way("full"),
    "linears kept": Way("auto", keep_linears=True),
    "tiles": Way("full", tile_tokens=7),
    "tiles, nothing recomputed": Way("none", tile_tokens=7),
    "turns": Way("keep_attention", kv_heads=1),
    "turns, nothing recomputed": Way("none", kv_heads=1),
    "segments": Way("sqrt"),
}


def model_types() -> list[str]:
    """All of transformers' with a causal language model."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def tiny(model_type: str) -> PretrainedConfig:
    """A small config of the type with each kind of layer it has."""
    default = AutoConfig.for_model(model_type)
    keys = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and not hasattr(default, "use_sliding_window"):
        keys["layer_types"] = (kinds * 3)[:3]
    return AutoConfig.for_model(model_type, **{**keys, **CHANGES.get(model_type, {})})


@dataclass(frozen=True)
class Step:
    """What a step gives."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def differs(self, truth: Step) -> str | None:
        """Where it is not the same to the accuracy of float32: a line for the reader."""
        if not abs(self.loss - truth.loss) <= 1e-5 * abs(truth.loss):
            return f"loss {self.loss:.6f}, expected {truth.loss:.6f}"
        whole = sum(float(g.square().sum()) for g in truth.gradients.values()) ** 0.5
        zero = torch.zeros(())
        errors = {n: float((self.gradients.get(n, zero) - g).norm()) / whole for n, g in truth.gradients.items()}
        worst = max(errors, key=errors.__getitem__)
        return None if errors[worst] <= 1e-5 else f"{worst}: off by {errors[worst]:.1e} of the whole gradient"


def _model(config: PretrainedConfig, attention: str) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:  # norms are born as ones, biases and sinks as zeros
                p.add_(torch.randn_like(p) * 0.1)
    model.set_experts_implementation("eager")  # the faster ones do not take float64
    return model.eval()  # some draw at random in training


def _documents() -> list[tuple[Any, Any, Any]]:
    rng = np.random.default_rng(0)
    documents = []
    for tokens in DOCUMENTS:
        ids = rng.integers(5, SMALL["vocab_size"] - 5, tokens).astype(np.int64)
        labels = np.append(ids[1:], IGNORE_INDEX)
        documents.append((ids, labels, (labels != IGNORE_INDEX).astype(np.float32)))
    return documents


def _gradients(model: Any, loss: torch.Tensor) -> Step:
    loss.backward()
    return Step(float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def truth(config: PretrainedConfig) -> Step:
    """transformers' own step."""
    model = _model(config, "eager")
    loss = torch.zeros((), dtype=torch.float64)
    for ids, labels, _ in _documents():
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        loss = loss + F.cross_entropy(logits[:-1], torch.from_numpy(labels[:-1]), reduction="sum")
    return _gradients(model, loss)


def ours(config: PretrainedConfig, way: Way) -> Step:
    """The same step as a run computes it on one rank."""
    register()
    model = _model(config, ULYSSES)
    layers = decoder_layers(model)
    keeps = [LayerKeep(i) for i in range(len(layers))]
    for keep, layer in zip(keeps, layers, strict=True):
        groups, tiled = fuse_and_tile(layer, 0, way.tile_tokens)
        keep.last = tiled or next((g for g in groups if g.names == ("down_proj",)), None)
        if way.keep_linears:
            keep.on_device = [g for g in groups if g.names != ("down_proj",)]
    apply_recompute(layers, way.recompute, keep=keeps)
    layout = ParallelLayout(1, 0, 1)
    objective = SftObjective(model, layout, kv_heads_at_a_time=way.kv_heads)
    return _gradients(model, objective(shard(pack_of(_documents(), 1), layout, torch.device("cpu"))))
