"""Tiny models of transformers' causal model types, and their step: as transformers computes it, and as we do.

The truth is `eager` attention in one process, each document alone, from the logits of the model's own forward. Ours
packs the documents into one row and saves memory in one of the WAYS. All in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel
from transformers.utils import is_timm_available

from ds_longft.batch import IGNORE_INDEX
from ds_longft.config.run_config import LoraConfig
from ds_longft.data.pack import pack_of
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import add_lora
from ds_longft.model.supported import decoder_layers
from ds_longft.model.wrapped import is_wrapped, make, text_class, whole_class
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.shard import shard
from ds_longft.train.install import fuse_and_tile
from tests.distributed.test_state_exact import FAMILIES as STATE_FAMILIES

DOCUMENTS = (21, 13)
"""Tokens of each document: longer than the window, so that it matters."""

ACCURACY = 1e-7
"""Relative. All is in float64; MiniMax rounds its decays to float32 once, as it is built."""

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

TOWER: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_layers": 1, "encoder_layers": 1,
    "num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "attention_heads": 2, "encoder_attention_heads": 2, "head_dim": 16,
    "image_size": 32, "patch_size": 16, "out_hidden_size": 64, "encoder_ffn_dim": 32, "d_model": 32, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0], "output_dim": 64, "conf_num_hidden_layers": 1,
}  # fmt: skip
"""What images and sound go through in a wrapper."""

SECTIONS: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}

FOUR: dict[str, Any] = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True,
}  # fmt: skip
"""Gemma 4: two sizes of heads, the last layers read keys and values of those before."""

BY_LAYER: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("full_attention", "sliding_attention")},
}  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    **{model_type: {"num_hidden_layers": 2, **changes} for model_type, changes in reversed(STATE_FAMILIES.values())},
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 4, "activation_sparsity_pattern": [0.0] * 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    **{name: {"num_key_value_heads": 4, "head_dim": 8} for name in ("deepseek_v3", "axk1", "youtu", "glm4_moe_lite", "minicpm3", "sarvam_mla")},
    "deepseek_v2": {"num_key_value_heads": 4}, "mistral4": {"num_key_value_heads": 4},
    "olmo": {"clip_qkv": 0.5}, "olmoe": {"clip_qkv": 0.5},
    "dots1": {"n_shared_experts": 1}, "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]}, "longcat_flash": {"num_layers": 2, "num_key_value_heads": 4, "head_dim": 8},
    "gemma4": {"vision_config": {**TOWER, "global_head_dim": 16}}, "gemma4_text": FOUR, "gemma4_unified_text": FOUR,
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text"), SECTIONS),
    "glm4v_moe_text": {"rope_parameters": {**SECTIONS["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 32], "rope_parameters": {**SECTIONS["rope_parameters"], "mrope_section": [3, 3, 2]}},
    "llama4_text": {
        "no_rope_layers": [1, 0, 1], "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 8, "floor_scale": 4, "intermediate_size_mlp": 96, "moe_layers": [1, 2],
    },
    "cohere_compass_text": BY_LAYER, "cohere_compass": {"text_config": BY_LAYER}, "zaya": {"num_experts_per_tok": 1},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "n_group": None, "topk_group": None},
        "vision_config": {"sam_config": TOWER | {"global_attn_indexes": [0]}, "encoder_config": TOWER},
    },
    "apertus1p5": {
        "audio_config": {"codebook_dim": 32, "codebook_size": 8}, "vision_config": {"codebook_size": 8, "base_channels": 32}, "image_token_offset": 100,
        "audio_token_offset": 108,
    },
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [0]}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "vision_config": TOWER | {"hidden_size": 64}, "downsample_rate": "1/1"},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}, "vq_config": {"base_channels": 32}},
    "muse_spark": {"projector_hidden_size": 64, "out_hidden_size": 64, "audio_config": {"patch_sizes": [4], "hidden_sizes": [32], "depths": [1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "hunyuan_vl": {"text_config": SECTIONS}, "perception_lm": {"vision_config": {"model_args": {"embed_dim": 32}}},
    "phi4_multimodal": {"audio_config": TOWER | {"num_blocks": 1}, "vision_config": TOWER},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32}},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
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


if not is_timm_available():  # a tower of its models holds nothing then: no text goes through it
    TimmWrapperModel.__init__ = PreTrainedModel.__init__  # type: ignore[method-assign]


def model_types() -> list[str]:
    """All of transformers' with a causal language model, alone or in a wrapper."""
    return sorted(
        {config.model_type for config in (*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)}
    )


def tiny(model_type: str) -> PretrainedConfig:
    """A small config of the type with each kind of layer it has."""
    default = AutoConfig.for_model(model_type)
    if is_wrapped(default):
        text, parts = default.get_text_config(), {key: getattr(default, key) for key in default.sub_configs}
        parts = {
            key: {"model_type": part.model_type} | (_small_text(part) if part is text else _small(part, TOWER))
            for key, part in parts.items()
            if part is not None
        }
        changes = {
            key: {**parts.get(key, {}), **change} if isinstance(change, dict) else change
            for key, change in CHANGES.get(model_type, {}).items()
        }
        return AutoConfig.for_model(model_type, **{**parts, **_small(default, SMALL), **changes})
    return AutoConfig.for_model(model_type, **_small_text(default))


def _small(default: PretrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    known = {key for key in vars(default) if not key.startswith("_")} | set(default.attribute_map)
    return {key: value for key, value in sizes.items() if key in known}


def _small_text(default: PretrainedConfig) -> dict[str, Any]:
    model_type, keys = default.model_type, _small(default, SMALL)
    rope = getattr(default, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        keys["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    computed = isinstance(
        getattr(type(default), default.attribute_map.get("layer_types", "layer_types"), None), property
    )
    kinds = () if computed else list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and not hasattr(default, "use_sliding_window"):
        keys["layer_types"] = (kinds * 3)[:3]
    return {**keys, **CHANGES.get(model_type, {})}


@contextmanager
def in_double() -> Iterator[None]:
    """Inside, what a model or we compute in float32 is computed in float64: rounding would hide small faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@dataclass(frozen=True)
class Step:
    """What a step gives."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def errors(self, truth: Step) -> tuple[float, float, str]:
        """Of the loss, relative; the largest of a parameter's gradient, relative to the whole gradient, and whose.

        Who has none here has zeros in truth: Gemma 3n's wrapper looks for images in text, and finds none.
        """
        unreached = {name for name, g in truth.gradients.items() if name not in self.gradients and not g.any()}
        assert set(self.gradients) | unreached == set(truth.gradients), set(self.gradients) ^ set(truth.gradients)
        whole = sum(float(g.square().sum()) for g in truth.gradients.values()) ** 0.5
        errors = {
            name: float((self.gradients[name] - g).norm()) / whole
            for name, g in truth.gradients.items()
            if name not in unreached
        }
        worst = max(errors, key=errors.__getitem__)
        return abs(self.loss - truth.loss) / abs(truth.loss), errors[worst], worst

    def differs(self, truth: Step) -> str | None:
        """Where it is not the same: a line for the reader."""
        loss, gradient, name = self.errors(truth)
        if not loss <= ACCURACY:
            return f"loss {self.loss:.6f}, expected {truth.loss:.6f}"
        return None if gradient <= ACCURACY else f"{name}: off by {gradient:.1e} of the whole gradient"


def _model(config: PretrainedConfig, attention: str, *, whole: bool, lora: bool) -> Any:
    """`whole`: with the towers of a wrapper, as transformers builds it. `lora`: with adapters that do something."""
    torch.manual_seed(0)
    part = is_wrapped(config) and not whole
    of_whole = "eager" if part else attention
    model: Any = make(whole_class(config), copy.deepcopy(config), attn_implementation=of_whole)
    if part:
        towers, model = model, make(text_class(config), copy.deepcopy(config), attn_implementation=attention)
        model.load_state_dict({k: v for k, v in towers.state_dict().items() if k in model.state_dict()})
    model = model.double()
    torch.manual_seed(0)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    with torch.no_grad():
        for p in [*decoder.parameters(), *(head.parameters() if head is not None else ())]:
            if p.dim() < 2:  # norms are born as ones, biases and sinks as zeros
                p.add_(torch.randn_like(p) * 0.1)
    model.set_experts_implementation("eager")  # the faster ones do not take float64
    if lora:
        model = add_lora(model, LoraConfig(r=4, alpha=8), seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model.eval()  # some draw at random in training


def _documents() -> list[tuple[Any, Any, Any]]:
    rng = np.random.default_rng(0)
    documents = []
    for tokens in DOCUMENTS:
        ids = rng.integers(5, SMALL["vocab_size"] - 5, tokens).astype(np.int64)
        labels = np.append(ids[1:], IGNORE_INDEX)
        documents.append((ids, labels, (labels != IGNORE_INDEX).astype(np.float32)))
    return documents


def _gradients(model: Any, loss_of: Callable[[], torch.Tensor]) -> Step:
    with in_double():
        loss = loss_of()
        loss.backward()
    return Step(float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def truth(config: PretrainedConfig, *, lora: bool = False) -> Step:
    """transformers' own step; of a wrapper the whole one's, given text."""
    model = _model(config, "eager", whole=True, lora=lora)

    def loss() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for ids, labels, _ in _documents():
            logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits[:-1], torch.from_numpy(labels[:-1]), reduction="sum")
        return total

    return _gradients(model, loss)


def ours(config: PretrainedConfig, way: Way, *, lora: bool = False, layout: ParallelLayout | None = None) -> Step:
    """The same step as a run computes it, on one rank or on the ranks of `layout`, where each gets the sum."""
    register()
    layout = layout or ParallelLayout(1, 0, 1)
    model = _model(config, ULYSSES, whole=False, lora=lora)
    layers = decoder_layers(model.get_base_model() if lora else model)  # as a start: before the objective
    objective = SftObjective(model, layout, kv_heads_at_a_time=way.kv_heads)
    keeps = [LayerKeep(i) for i in range(len(layers))]
    for keep, layer in zip(keeps, layers, strict=True):
        fused = fuse_and_tile(layer, 0, way.tile_tokens)
        keep.last = fused.last
        if way.keep_linears:
            keep.on_device = [g for g in fused.groups if g.names != ("down_proj",)]
    apply_recompute(layers, way.recompute, keep=keeps)
    batch = shard(pack_of(_documents(), layout.sp), layout, torch.device("cpu"))
    step = _gradients(model, lambda: objective(batch))
    if layout.sp == 1:
        return step
    loss = torch.tensor(step.loss, dtype=torch.float64)
    for tensor in (loss, *step.gradients.values()):
        torch.distributed.all_reduce(tensor)
    return Step(float(loss), step.gradients)
