"""Which models can be split along the sequence exactly: text-only causal ones whose every layer is softmax attention,
or carries its state as one of the `STATE_FAMILIES` does.

What is not right is refused by name: any other linear-attention or state-space layer would restart its state on every
rank.
Config and class tell this much; what a layer's mask asks for and what is done around the head is asked of the model
itself (`sequence.mask`, `sequence.head`).
"""

from __future__ import annotations

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ds_longft.config.state_families import OTHER_LAYERS, STATE_FAMILIES, STATE_LAYERS
from ds_longft.errors import ModelError
from ds_longft.model.wrapped import is_wrapped

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_TOWERS_INSIDE = (
    "keeps what images and sound go through inside its decoder, where it cannot be left out, and weight decay would "
    "change it: a text-only checkpoint of the same family can be trained"
)
_DRAFTS = "drafts tokens from the keys and values of the model that it stands beside: train that one (Gemma 4)"
_WANTS_IMAGES = (
    "computes nothing without an image, and rows are text here: the language model in it can be trained from a "
    "checkpoint of its own"
)
OTHER_MODELS = {
    **dict.fromkeys(("chameleon", "phi4_multimodal"), _TOWERS_INSIDE),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    **dict.fromkeys(("idefics", "instructblip", "instructblipvideo"), _WANTS_IMAGES),
    "dbrx": "lists its layers as `blocks` and reads config keys that transformers 5 no longer gives it: models laid "
    "out like Llama, Qwen, Mistral, Gemma or Phi can be trained",
    "diffusion_gemma": "fills blocks of tokens by diffusion, seen in both directions, and what is trained here is the "
    "next token: Gemma 4 can be trained",
    "doge": "makes a mask of its own out of the values of all tokens, which no kernel here takes: models whose mask is "
    "causal, with windows or without, can be trained",
    "dory": "scales each token's logit in its head by a weight of its own, which the chunked loss does not do: models "
    "whose head is one linear layer can be trained",
    "paligemma": "sees its prompt in both directions, which no kernel here does: Gemma 1 to 4 can be trained",
    "pi0": "is trained on a robot's movements, and what is trained here is the next token: Gemma can be trained",
}
"""What neither class nor config tells: why a type cannot be trained, and what helps."""

# Config keys of recurrent layers, for the models that do not list their layers by type.
RECURRENT_KEYS = ("mamba_", "ssm_", "rwkv", "linear_num_", "linear_attn", "rnn_", "lru_", "conv_L_cache", "state_size")


def check_supported(hf_config: PretrainedConfig) -> None:
    """Refuse, by name, every model that cannot be trained exactly here. Looks at config and class, loads no weights.
    Raises ModelError: encoder-decoder, recurrent or linear-attention layers, other masks, no causal LM class, or a
    class that does not use transformers' attention interface.
    """
    name = hf_config.model_type
    if hf_config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder model; only causal language models, a decoder alone, can be trained"
        )
    if name in OTHER_MODELS:
        raise ModelError(f"{name} {OTHER_MODELS[name]}")
    text = hf_config.get_text_config()
    state = text.model_type in STATE_FAMILIES
    layers = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    known = ATTENTION_LAYERS | {"attention"} | (STATE_LAYERS | OTHER_LAYERS if state else set())
    other = sorted(layers - known)
    recurrent = [] if state else sorted(k for k in text.to_dict() if k.startswith(RECURRENT_KEYS))
    if other or recurrent:
        seen = ", ".join(other) or "recurrent layers (config keys " + ", ".join(recurrent[:3]) + ")"
        if any("indexed" in layer or "sparse" in layer for layer in other):
            why = (
                "which tokens they see is chosen by scores over the whole sequence, and no kernel here does that; a "
                "checkpoint of the family whose layers see all tokens can be trained"
            )
        else:
            why = (
                "they carry a state along the sequence, or mask it, in a way that is not spread over ranks here; those "
                "of docs/hybrid.md are"
            )
        raise ModelError(f"{name} has layers of type {seen}: {why}")
    if is_wrapped(hf_config):
        if type(hf_config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ModelError(
                f"{name} wraps a text model in a way that transformers does not list as image-text-to-text: its text "
                "model cannot be taken out. A text-only checkpoint of the same family can be trained"
            )
        return
    mapping = next(
        (m for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING) if type(hf_config) in m), None
    )
    if mapping is not None:
        check_class_supported(mapping[type(hf_config)], name)
    elif "AutoModelForCausalLM" not in getattr(hf_config, "auto_map", {}):
        raise ModelError(f"{name} has no causal language model class in transformers ({AutoModelForCausalLM.__name__})")


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of its decoder, first to last.
    Raises ModelError: they are not where transformers' newer models have them (GPT-2 and its age), or there are none.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(
            f"{model.config.model_type} ({type(model).__name__}) has no list of decoder layers named `layers` or `h`: "
            "models laid out like Llama, Qwen, Mistral, Gemma or Phi can be trained"
        )
    return list(layers)


def check_class_supported(model_class: type, name: str) -> None:
    """Refuse a model class with recurrent state, or one that would bypass our attention.
    Raises ModelError: naming the class.
    """
    if name in STATE_FAMILIES:
        return  # most of them say neither that they keep a state nor that they use the interface: tests do
    if getattr(model_class, "_is_stateful", False):
        raise ModelError(
            f"{name} ({model_class.__name__}) keeps a recurrent state that is not spread over ranks here; those of "
            "docs/hybrid.md are"
        )
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ModelError(
            f"{name} ({model_class.__name__}) does not use transformers' attention interface, so its attention cannot "
            "be replaced by the sequence-parallel one; it can once transformers has rewritten it so"
        )
