"""How much one optimizer step computes and moves on one rank: elements multiplied, bytes read and written.

`time.py` makes seconds of it. Formulas in docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_longft.decide.setting import Setting
from ds_longft.decide.tensors import BEFORE_STATE, GROUPS, Keep, Sizes
from ds_longft.decide.what_is_kept import segment_starts
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence.linear import folds

WIDTH_OF_A_PRODUCT = 64
"""Features that a grouped product with an adapter's rank costs at least: a tile of the tensor cores. An estimate."""


def layer_forwards(model: ModelFacts, setting: Setting) -> float:
    """How often a layer runs forward, on average: 2 with recomputation, in segments 3 but for their last layers."""
    if setting.recompute == "none":
        return 1.0
    if setting.recompute not in ("every_k", "sqrt"):
        return 2.0
    segments = len(segment_starts(model, setting))
    return (3 * model.layers - segments) / model.layers


def multiplied_weights(model: ModelFacts, x: Setting, keep: Sequence[Keep]) -> float:
    """Weights that each local token meets in the products of one pass forward, again and back; adapters apart."""
    forwards = layer_forwards(model, x)
    passes = forwards + (1 if x.lora_r is not None else 2)
    linears = passes * _linear_weights(model)
    if forwards > 1 and not model.norm_after_mlp:  # the last one is not computed again for its own backward pass
        linears -= sum(_elements(kind, GROUPS[3]) * count for kind, count in model.kinds.items())
    if x.lora_r is not None:  # nothing before the first layer's projections is trained
        linears -= _elements(model.by_layer[0], (*GROUPS[0], *BEFORE_STATE))
    for kind, k in zip(model.by_layer, keep, strict=True):
        places = zip((*GROUPS[:3], BEFORE_STATE), (k.qkv, k.o, k.gate_up, k.state), strict=True)
        linears -= sum(_elements(kind, group) for group, kept in places if kept)
    return linears + model.head_weights * x.targets * (2 if x.lora_r is not None else 4)


def forward_weights(model: ModelFacts, x: Setting) -> float:
    """Weights that each local token meets in one forward pass."""
    return _linear_weights(model) + model.head_weights * x.targets


def expert_elements(model: ModelFacts, x: Setting, *, backward: bool = True) -> float:
    """Elements of experts that each local token meets in grouped products, of all layers: forward once, gate and up
    again in the backward pass, then gradients of inputs, and of weights that are trained. A narrow adapter's products
    cost as much as those of `WIDTH_OF_A_PRODUCT` features.
    """
    one, sides = model.expert_weights, sum(i + o for i, o in model.expert_io)
    again = one - model.hidden * model.expert_inter  # gate and up
    of_weights = one + backward * (again + one * (1 if x.lora_r is not None else 2))
    adapted = x.lora_r is not None and x.lora_experts
    # forward, x A' of all again, dy B and its product with A, gradients of A and of B
    of_adapters = max(x.lora_r or 0, WIDTH_OF_A_PRODUCT) * sides * (1 + backward * 3) if adapted else 0.0
    return model.expert_layers * model.experts_used * (of_weights + of_adapters)


def moved_bytes(
    model: ModelFacts, x: Setting, forwards: float, *, backward: bool = True, adapters: bool = True
) -> float:
    """Read and written by all layers' elementwise kernels, by their adapters, and by experts beside their products."""
    moved = _expert_bytes(model, x, backward=backward)
    for kind, count in model.kinds.items():
        moved += count * _elementwise_bytes(Sizes(kind, x), forwards, backward=backward)
        moved += count * adapters * _lora_bytes(kind, x, forwards, backward=backward)
    return moved


def _expert_bytes(model: ModelFacts, x: Setting, *, backward: bool) -> float:
    """`experts._Grouped` of all layers: rows copied, gated, scaled, added."""
    adapted = x.lora_r is not None and x.lora_experts
    wide, inner = model.hidden, model.expert_inter
    per_row = (6 + 3 * adapted) * wide + (9 + 7 * adapted) * inner
    if backward:
        per_row += (7 + 5 * adapted) * wide + (20 + 9 * adapted) * inner
    return x.local_tokens * x.element_bytes * model.expert_layers * model.experts_used * per_row


def _elementwise_bytes(z: Sizes, forwards: float, *, backward: bool) -> float:
    """A layer's norms, rotary embedding, activation and residual adds."""
    forth = 2 * 2 * z.u + 2 * 3 * z.u + 3 * z.f + 2 * (z.q + z.k)
    back = 2 * 3 * z.u + 2 * 3 * z.u + 5 * z.f + 2 * (z.q + z.k)
    wide = 1 if z.setting.fused else 2.5  # float32 copies of transformers' own norm and rotary embedding
    return wide * (forwards * forth + backward * back)


def _lora_bytes(model: ModelFacts, x: Setting, forwards: float, *, backward: bool) -> float:
    """`linear._Linears`: x A' reads the input, adding reads and writes the output; backward reads dy twice and x once,
    and adds to dx. Where the term is folded into the product, its input is copied instead.
    """
    if x.lora_r is None:
        return 0.0
    tokens, per_token = min(x.local_tokens, x.tile_tokens or x.local_tokens), 0.0
    alone = [(name,) for name, _, _ in model.linear_io if model.state and all(name not in group for group in GROUPS)]
    for group in (*GROUPS, *alone):
        shapes = [(i, o) for name, i, o in model.linear_io if name in group]
        if not shapes:
            continue
        inner, outer = shapes[0][0], sum(o for _, o in shapes)
        per_token += forwards * (inner + 2 * (inner if folds(tokens, inner, outer) else outer))
        folded = len(shapes) == 1 and folds(tokens, outer, inner)
        per_token += backward * (2 * outer + inner + 2 * (outer if folded else inner))
    return x.local_tokens * x.element_bytes * per_token


def _linear_weights(model: ModelFacts) -> int:
    """Elements of all layers' linears, experts apart."""
    return sum(kind.layer_weights * count for kind, count in model.kinds.items())


def _elements(model: ModelFacts, names: tuple[str, ...]) -> int:
    return sum(i * o for n, i, o in model.linear_io if n in names)
