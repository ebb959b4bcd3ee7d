"""The arithmetic an optimizer step needs, for MFU: what a run without any recomputation would have to do.

Counted (the field's convention, a multiply and an add are two operations):
- a linear weight on one token: 2 forward, 2 for the input's gradient, 2 for the weight's own gradient if it is trained.
  So 6 per weight and token in full training, 4 for a frozen weight under LoRA.
- attention, per layer and document: 2 products forward (scores, then values), 2 operations * heads * head_dim for each
  pair of tokens that see each other; backward twice the forward.
- the head (logits) on target tokens only: nothing else is needed for the loss.
Not counted: recomputation, adapters (under 1%), norms, activations, embeddings, softmax.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

# Dense bf16 matrix products, TFLOP/s, from the makers' data sheets; the first pattern found in the name counts.
PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bH200\b", 989.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH[18]00\b", 989.0),
    (r"\bA[18]00\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bRTX 4090\b", 165.0),
)


@dataclass(frozen=True)
class ModelShape:
    """What the count needs of a model."""

    body_weights: int  # weights of the linear layers one token passes through, head excluded
    head_weights: int  # hidden size x vocabulary
    all_weights: int  # every element, all experts and embeddings too; a tied matrix counts once
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens, None for full attention
    attention_width: int  # heads * (query-key dimension + value dimension) / 2

    @classmethod
    def from_config(cls, hf_config: PretrainedConfig) -> ModelShape:
        """Read off a model without memory ("meta"): exact for every architecture, experts by their share of use."""
        # of a copy: the attention's name is written into the config that a model is made of
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), attn_implementation="eager")
        head = model.get_output_embeddings()
        body = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        # mixture of experts: one 3-D weight for all experts, of which each token uses a few
        experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
        if experts:
            count = getattr(hf_config, "num_local_experts", None) or getattr(hf_config, "num_experts", None) or 1
            body += experts * int(getattr(hf_config, "num_experts_per_tok", 1)) // int(count)
        heads = hf_config.num_attention_heads
        dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        query_dim = getattr(hf_config, "qk_head_dim", None) or dim
        value_dim = getattr(hf_config, "v_head_dim", None) or dim
        return cls(
            body_weights=body,
            head_weights=head.weight.numel(),
            all_weights=sum(p.numel() for p in model.parameters()),
            windows=layer_windows(hf_config),
            attention_width=heads * (query_dim + value_dim) // 2,
        )


def layer_windows(hf_config: PretrainedConfig) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens (a token and the window - 1 before it); None where it sees all."""
    window = getattr(hf_config, "sliding_window", None)
    if getattr(hf_config, "use_sliding_window", True) is False:
        window = None
    types = getattr(hf_config, "layer_types", None)
    if types is None:
        return (window,) * hf_config.num_hidden_layers
    return tuple(window if layer == "sliding_attention" else None for layer in types)


def step_flops(shape: ModelShape, document_lengths: Sequence[int], *, lora: bool, targets: int) -> float:
    """Floating-point operations of forward and backward over these documents, on all GPUs together.

    `document_lengths`: tokens of each document (of every pack and data-parallel rank, if the whole step is meant).
    `targets`: how many of the tokens have a label. `lora`: the weights are frozen.
    """
    per_weight = 4 if lora else 6
    linear = per_weight * (sum(document_lengths) * shape.body_weights + targets * shape.head_weights)
    pairs = sum(visible_pairs(length, window) for window in shape.windows for length in document_lengths)
    return float(linear + 3 * 4 * shape.attention_width * pairs)


def equal_cost_tokens(shape: ModelShape, *, lora: bool) -> int:
    """Length of a document at which attention needs as many operations as everything linear, the head left out.

    Layers with a sliding window count as linear: their share of the attention does not grow with the square.
    """
    full = sum(window is None for window in shape.windows)
    per_weight = 4 if lora else 6
    # causal: half of length^2 pairs, 12 operations each (see `step_flops`)
    return round(per_weight * shape.body_weights / (6 * shape.attention_width * max(full, 1)))


def forward_flops(shape: ModelShape, document_lengths: Sequence[int], *, targets: int) -> float:
    """Operations of a forward pass alone, e.g. of the reference model of DPO, on all GPUs together."""
    linear = 2 * (sum(document_lengths) * shape.body_weights + targets * shape.head_weights)
    pairs = sum(visible_pairs(length, window) for window in shape.windows for length in document_lengths)
    return float(linear + 4 * shape.attention_width * pairs)


def visible_pairs(length_tokens: int, window_tokens: int | None) -> int:
    """Pairs (query, key) of one document under the causal mask, itself included, within the window."""
    window = min(window_tokens or length_tokens, length_tokens)
    return window * (window + 1) // 2 + (length_tokens - window) * window


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of one GPU in TFLOP/s by `torch.cuda.get_device_name`; None for devices not in the table."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_name)), None)
