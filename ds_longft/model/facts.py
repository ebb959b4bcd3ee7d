"""What is known of a model before a weight is read: sizes, heads, windows, experts, and the operations of a step.

Read once in a start (`train.run`), and handed on from there. Operations are what a run without any recomputation would
have to do, for MFU. Counted (the field's convention, a multiply and an add are two operations):
- a linear weight on one token: 2 forward, 2 for the input's gradient, 2 for the weight's own gradient if it is trained.
  So 6 per weight and token in full training, 4 for a frozen weight under LoRA.
- attention, per layer and document: 2 products forward (scores, then values), 2 operations * heads * head_dim for each
  pair of tokens that see each other; backward twice the forward.
- a layer that carries a state: its convolution, and per head the products with its state of K x V elements (a delta
  rule has three: what the state says of a key, the correction, the query; Mamba and lightning attention two), forward;
  backward twice that.
- the head (logits) on target tokens only: nothing else is needed for the loss.
Not counted: recomputation, adapters (under 1%), norms, activations, embeddings, softmax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ds_longft.config.state_families import STATE_FAMILIES
from ds_longft.model.rope import positions_end
from ds_longft.model.rope_formulas import config_head_dim, layer_configs
from ds_longft.model.supported import ATTENTION_LAYERS, decoder_layers
from ds_longft.model.wrapped import on_meta, text_class

LINEARS = (nn.Linear, Conv1D)  # GPT-2's are called convolutions, and have their weight the other way round


@dataclass(frozen=True)
class StateFacts:
    """What a layer carries along the sequence."""

    kind: str  # "delta", "kimi", "decay" (Mamba-2, lightning), "scan" (Mamba-1), "conv"
    heads: int  # H; channels of Mamba-1 and short convolutions
    groups: int  # of heads that share keys
    keys: int  # K, features of a head's keys
    values: int  # V
    channels: int  # of its convolution


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a model whose layers are not alike."""

    linear_io: tuple[tuple[str, int, int], ...]
    inter: int
    qk_norm: bool
    kv_heads: int
    head_dim: int
    attends: bool
    state: StateFacts | None


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder, as its code has them. All counts are elements."""

    model_type: str
    hidden: int  # D
    inter: int  # I, input features of the down projection
    layers: int  # L
    q_heads: int
    kv_heads: int
    head_dim: int  # d, as attention exchanges it: the wider one where values have another size than queries and keys
    attention_width: int  # q_heads * (query-key dimension + value dimension) / 2, of the widest layer
    softcap: float | None  # of attention scores
    windows: tuple[int | None, ...]  # per softmax attention: sliding window in tokens, None for full attention
    state_products: int  # multiply-adds a token needs in all layers that carry a state; 0: there are none
    vocab: int  # V
    capped_logits: bool  # a softcap after the head (Gemma 2): the loss is not one kernel then
    weights: int  # every weight, all experts, embedding and head included; a tied matrix counts once
    layers_weights: int  # of the decoder layers, all they hold
    largest_layer: int  # weights of one of them
    body_weights: int  # of the linear layers one token passes through, head excluded, experts by their share of use
    head_weights: int  # V * D
    linear_io: tuple[tuple[str, int, int], ...]  # (name, in, out) of one layer's linears, of a mixture one with experts
    experts: int  # of a layer; 0: a dense model
    experts_used: int  # by each token
    expert_layers: int  # layers that have experts
    expert_io: tuple[tuple[int, int], ...]  # features in and out of each projection of an expert, in any order
    qk_norm: bool  # queries and keys are normed (Qwen 3)
    norm_after_mlp: bool  # the MLP's output is needed again in the backward pass (Gemma 2 and 3)
    max_positions: int  # documents longer than this need model.rope; 0: none is too long
    # of each layer, where some carry a state or have other heads (Gemma 4); empty: all are alike
    layer_facts: tuple[LayerFacts, ...] = ()
    attends: bool = True  # of one layer (`by_layer`): it has softmax attention
    state: StateFacts | None = None  # of one layer

    @classmethod
    def from_config(cls, hf_config: PretrainedConfig) -> ModelFacts:
        """Read off a model without memory ("meta"): exact for every architecture. Of a multimodal one, its text model.

        Call it before ZeRO-3 is switched on for every model that is built.
        Raises ModelError: no list of decoder layers.
        """
        model = on_meta(text_class(hf_config), hf_config)
        hf_config = hf_config.get_text_config()
        head, layer = model.get_output_embeddings(), decoder_layers(model)[0]
        body = sum(m.weight.numel() for m in model.modules() if isinstance(m, LINEARS) and m is not head)
        # a mixture has one 3-D weight for all experts of a layer, of which each token uses a few
        of_layers = [sum(p.numel() for p in each.parameters()) for each in decoder_layers(model)]
        with_experts = [each for each in decoder_layers(model) if _stacks_of(each)]
        experts = used = 0
        if with_experts:
            layer = with_experts[0]
            experts, used = len(_stacks_of(layer)[0]), _number(hf_config, "num_experts_per_tok", "moe_topk") or 1
            body += sum(p.numel() for each in with_experts for p in _stacks_of(each)) * used // experts
        linears = _linears_of(layer)
        configs = layer_configs(hf_config)
        layer_facts: tuple[LayerFacts, ...] = ()
        if hf_config.model_type in STATE_FAMILIES or len({_heads(each) for each in configs}) > 1:
            of_each = zip(decoder_layers(model), configs, strict=True)
            layer_facts = tuple(_layer_facts(each, config) for each, config in of_each)
        down = _width(linears, hf_config.hidden_size)
        heads = hf_config.num_attention_heads
        widest = max(configs, key=lambda config: sum(_head_dims(config)))  # Gemma 4: the full layers'
        query_dim, value_dim = _head_dims(widest)
        return cls(
            model_type=hf_config.model_type,
            hidden=hf_config.hidden_size,
            inter=down if down else 0 if experts else _number(hf_config, "intermediate_size"),
            layers=hf_config.num_hidden_layers,
            q_heads=heads,
            kv_heads=_heads(widest)[0],
            head_dim=_heads(widest)[1],
            attention_width=heads * (query_dim + value_dim) // 2,
            softcap=getattr(hf_config, "attn_logit_softcapping", None),
            windows=layer_windows(hf_config),
            state_products=sum(map(_products_of_state, model.modules())),
            vocab=hf_config.vocab_size,
            capped_logits=getattr(hf_config, "final_logit_softcapping", None) is not None,
            weights=sum(p.numel() for p in model.parameters()),
            layers_weights=sum(of_layers),
            largest_layer=max(of_layers),
            body_weights=body,
            head_weights=head.weight.numel(),
            linear_io=linears,
            experts=experts,
            experts_used=used,
            expert_layers=len(with_experts),
            expert_io=tuple((p.shape[1], p.shape[2]) for p in _stacks_of(layer)),
            qk_norm=_has_qk_norm(layer),
            norm_after_mlp=hasattr(layer, "post_feedforward_layernorm"),
            max_positions=positions_end(hf_config) or 0,
            layer_facts=layer_facts,
        )

    def __hash__(self) -> int:
        """Hashes a few fields only: kinds of layers are looked up a million times in a plan."""
        return hash((self.model_type, self.layers, self.inter, self.attends))

    @cached_property
    def attentions(self) -> tuple[tuple[int | None, int], ...]:
        """(window, d) of each softmax attention."""
        dims = [each.head_dim for each in self.layer_facts] or [self.head_dim] * len(self.windows)
        return tuple(zip(self.windows, dims, strict=False))  # layers with a state: fewer windows, heads of one size

    @cached_property
    def by_layer(self) -> tuple[ModelFacts, ...]:
        """The model as it would be if all layers were like this one, for each layer."""
        if not self.layer_facts:
            return (self,) * self.layers
        of_each = {each: replace(self, **vars(each), layer_facts=()) for each in set(self.layer_facts)}
        return tuple(of_each[each] for each in self.layer_facts)

    @cached_property
    def kinds(self) -> Counter[ModelFacts]:
        """How many layers there are of each kind."""
        return Counter(self.by_layer)

    @property
    def most_ranks(self) -> int:
        """Over how many ranks a sample can be split: heads are dealt, of attention and of layers with a state."""
        return min([self.q_heads, *(each.state.heads for each in self.layer_facts if each.state)])

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's linear weights."""
        return sum(i * o for _, i, o in self.linear_io)

    @property
    def expert_weights(self) -> int:
        """Elements of one expert."""
        return sum(i * o for i, o in self.expert_io)

    @property
    def expert_inter(self) -> int:
        """I, width of an expert."""
        return min((i * o for i, o in self.expert_io), default=0) // self.hidden

    def trained_weights(self, lora_r: int | None, experts: bool = False) -> int:
        """Elements with a gradient: adapters of that rank on every linear of every layer, r * (in + out), and on
        `experts` too; or all.
        """
        if lora_r is None:
            return self.weights
        of_experts = self.expert_layers * self.experts * sum(i + o for i, o in self.expert_io) if experts else 0
        sides = sum(count * sum(i + o for _, i, o in each.linear_io) for each, count in self.kinds.items())
        return lora_r * (sides + of_experts)

    def step_flops(self, document_lengths: Sequence[int], *, lora: bool, targets: int) -> float:
        """Floating-point operations of forward and backward over these documents, on all GPUs together.

        `document_lengths`: tokens of each document (of every pack and data-parallel rank, if the whole step is meant).
        `targets`: how many of the tokens have a label. `lora`: the weights are frozen.
        """
        linear, attention = self._forward_parts(document_lengths, targets)
        return float((2 if lora else 3) * linear + 3 * attention)

    def forward_flops(self, document_lengths: Sequence[int], *, targets: int) -> float:
        """Operations of a forward pass alone, e.g. of the reference model of DPO, on all GPUs together."""
        return float(sum(self._forward_parts(document_lengths, targets)))

    def equal_cost_tokens(self, *, lora: bool) -> int:
        """Length of a document at which attention needs as many operations as everything linear, the head left out.

        Layers with a sliding window count as linear: their share of the attention does not grow with the square.
        """
        full = sum(window is None for window in self.windows)
        per_weight = 4 if lora else 6
        # causal: half of length^2 pairs, 12 operations each (see `step_flops`)
        return round(per_weight * self.body_weights / (6 * self.attention_width * max(full, 1)))

    def _forward_parts(self, document_lengths: Sequence[int], targets: int) -> tuple[int, int]:
        """Operations of the linear layers, and of attention and states."""
        pairs = sum(visible_pairs(length, window) * d for window, d in self.attentions for length in document_lengths)
        linear = 2 * (sum(document_lengths) * self.body_weights + targets * self.head_weights)
        state = 2 * sum(document_lengths) * self.state_products
        return linear, 4 * self.attention_width * pairs // self.head_dim + state


def _linears_of(layer: nn.Module) -> tuple[tuple[str, int, int], ...]:
    """(name, features in, features out) of a layer's linears."""
    return tuple(
        (name.rsplit(".", 1)[-1], *(m.weight.shape if isinstance(m, Conv1D) else reversed(m.weight.shape)))
        for name, m in layer.named_modules()
        if isinstance(m, LINEARS)
    )


def _width(linears: Sequence[tuple[str, int, int]], hidden: int) -> int:
    """I, input features of the down projection, 0 without one."""
    down = ("down", "fc2", "c_proj")  # the last also that of GPT-2's attention, which is narrower
    return max((i for name, i, o in linears if o == hidden and name.startswith(down)), default=0)


def _has_qk_norm(layer: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "q_norm" for name, _ in layer.named_modules())


def _layer_facts(layer: nn.Module, hf_config: PretrainedConfig) -> LayerFacts:
    linears = _linears_of(layer)
    state = next((found for found in map(_state_facts, layer.modules()) if found), None)
    attends = any(name == "q_proj" for name, _, _ in linears) and (state is None or state.kind == "decay")
    return LayerFacts(
        linears, _width(linears, hf_config.hidden_size), _has_qk_norm(layer), *_heads(hf_config), attends, state
    )


def _state_facts(m: Any) -> StateFacts | None:
    """The facts of a module that carries a state; None for any other module."""
    conv = next((c.in_channels for c in m.children() if isinstance(c, nn.Conv1d)), 0)
    if hasattr(m, "head_k_dim"):
        return StateFacts("delta", m.num_v_heads, m.num_k_heads, m.head_k_dim, m.head_v_dim, conv)
    if hasattr(m, "forget_gate"):
        return StateFacts("kimi", m.num_heads, m.num_heads, m.head_dim, m.head_dim, conv)
    if hasattr(m, "ssm_state_size") and hasattr(m, "n_groups"):
        return StateFacts("decay", m.num_heads, m.n_groups, m.ssm_state_size, m.head_dim, conv)
    if hasattr(m, "ssm_state_size"):
        return StateFacts("scan", m.intermediate_size, m.intermediate_size, m.ssm_state_size, 1, conv)
    if hasattr(m, "slope_rate"):
        return StateFacts("decay", m.num_attention_heads, m.num_attention_heads, m.head_dim, m.head_dim, 0)
    return StateFacts("conv", conv, conv, 0, 1, conv) if conv else None


def _products_of_state(m: Any) -> int:
    """Multiply-adds of one token in this module's own recurrence, or convolution; 0 for any other module."""
    if isinstance(m, nn.Conv1d):
        return m.weight.numel()
    state = _state_facts(m)
    if state is None:
        return 0
    return (3 if state.kind in ("delta", "kimi") else 2) * state.heads * state.keys * state.values


def visible_pairs(length_tokens: int, window_tokens: int | None) -> int:
    """Pairs (query, key) of one document under the causal mask, itself included, within the window."""
    window = min(window_tokens or length_tokens, length_tokens)
    return window * (window + 1) // 2 + (length_tokens - window) * window


def layer_windows(hf_config: PretrainedConfig) -> tuple[int | None, ...]:
    """The sliding window in tokens (a token and the window - 1 before it) of each layer with softmax attention; None
    where it sees all. Chunks count as windows of their size: twice the pairs that are computed, of a small part.
    """
    window = getattr(hf_config, "sliding_window", None)
    if getattr(hf_config, "use_sliding_window", True) is False:
        window = None
    types = getattr(hf_config, "layer_types", None)
    if types is None:
        return (window,) * hf_config.num_hidden_layers
    if hf_config.model_type in STATE_FAMILIES:
        types = [layer for layer in types if layer in (*ATTENTION_LAYERS, "attention", "hybrid")]
    by_type = {"sliding_attention": window, "chunked_attention": getattr(hf_config, "attention_chunk_size", None)}
    return tuple(map(by_type.get, types))


def _stacks_of(layer: nn.Module) -> list[nn.Parameter]:
    """Weights of all experts of a layer in one; a convolution's have three dimensions too."""
    convolutions = {id(m.weight) for m in layer.modules() if isinstance(m, nn.Conv1d)}
    return [p for p in layer.parameters() if p.dim() == 3 and id(p) not in convolutions]


def _head_dims(hf_config: PretrainedConfig) -> tuple[int, int]:
    """Size of a head of queries and keys, and of values: latent attention (DeepSeek) has its own keys for both."""
    dim = config_head_dim(hf_config)
    return _number(hf_config, "qk_head_dim") or dim, _number(hf_config, "v_head_dim") or dim


def _heads(hf_config: PretrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and d, as attention exchanges it."""
    heads = _number(hf_config, "num_key_value_heads") or hf_config.num_attention_heads
    return heads, max(_head_dims(hf_config))


def _number(hf_config: PretrainedConfig, *keys: str) -> int:
    """The first of the keys that the config has, 0 where it has none."""
    return next((int(n) for n in (getattr(hf_config, key, None) for key in keys) if n), 0)
