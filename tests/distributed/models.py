"""Tiny models and packs for the proofs, and the reference: one process, each document run alone through
transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ds_longft.batch import IGNORE_INDEX, Pack
from ds_longft.layout import ParallelLayout
from ds_longft.model.load_packed import packable
from ds_longft.model.packed import FORMATS, Packed, pack, quantize

VOCAB = 97

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_config(model_type: str = "llama", **changes: Any) -> PretrainedConfig:
    """A two-layer config of a family."""
    return AutoConfig.for_model(model_type, **copy.deepcopy({**SMALL, **changes}))  # configs write into what they get


def tiny_model(
    config: PretrainedConfig, *, attn: str, dtype: torch.dtype, seed: int = 0, std: float = 0.15
) -> nn.Module:
    """The model of `config` with weights large enough that attention matters; the same for every `attn` and `dtype`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, std)
        for name, p in model.named_parameters():  # states that last: born, they forget within a token or two
            if name.endswith("A_log"):
                p.uniform_(-4, -1)
            elif name.endswith("dt_bias"):
                p.uniform_(-2, 0)
        if not config.tie_word_embeddings:
            model.get_input_embeddings().weight.normal_(0, 1)  # a small residual stream would amplify rounding errors
    model.config.use_cache = False
    model.set_experts_implementation("eager")  # the faster ones of mixtures of experts do not take float64
    return model.to(dtype).train()


def packed(model: Any, form: str) -> None:
    """Quantise the weights that lie in memory, as `model.quantize` does with those that are read; of mxfp4, which is
    only read, draw the experts.
    """
    how, draw = FORMATS[form], torch.Generator().manual_seed(3)
    for full, module, name in list(packable(model)):
        weight = module.get_parameter(name).detach()
        shape = tuple(weight.shape)
        if form == "mxfp4":
            if len(shape) < 3:
                continue
            shape = (shape[0], shape[2], shape[1])
            codes = torch.randint(256, (weight.numel() // 2,), dtype=torch.uint8, generator=draw)
            scales = torch.randint(121, 125, (how.scales_of(shape),), dtype=torch.uint8, generator=draw)
        else:
            codes, scales = quantize(weight, how)
        assert how.fits(shape), full
        pack(module, name, Packed(how, shape, weight.dtype, scales, turned=form == "mxfp4"), codes)


def make_pack(
    lengths: Sequence[int], *, seed: int, multiple: int = 1, trained: float = 0.6, sample_weighting: bool = False
) -> Pack:
    """Random documents with random targets; padded to `multiple`. Independent of the package's own packing code."""
    rng = np.random.default_rng(seed)
    ids, positions, labels, weights = [], [], [], []
    for n in lengths:
        doc = rng.integers(3, VOCAB, n)
        label = np.append(doc[1:], IGNORE_INDEX)
        label[rng.random(n) > trained] = IGNORE_INDEX
        count = int((label != IGNORE_INDEX).sum())
        ids.append(doc)
        positions.append(np.arange(n))
        labels.append(label)
        # with `sample`, each token's own besides, as `gain` gives
        weight = np.minimum(np.exp(rng.normal(size=n)), 5.0) / max(1, count) if sample_weighting else 1.0
        weights.append((label != IGNORE_INDEX) * weight)
    borders = list(lengths)
    padding = -sum(lengths) % multiple
    if padding:
        ids.append(np.zeros(padding, int))
        positions.append(np.arange(padding))
        labels.append(np.full(padding, IGNORE_INDEX))
        weights.append(np.zeros(padding))
        borders.append(padding)
    return Pack(
        input_ids=np.concatenate(ids).astype(np.int64),
        position_ids=np.concatenate(positions).astype(np.int64),
        labels=np.concatenate(labels).astype(np.int64),
        loss_weights=np.concatenate(weights).astype(np.float32),
        cu_seqlens=np.cumsum([0, *borders]).astype(np.int32),
        padding_tokens=padding,
    )


def reference_sum(model: nn.Module, pack: Pack) -> torch.Tensor:
    """sum(w * ce) with each document of the pack run alone, without packing, sharding, chunking or our attention."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(pack.input_ids[None, a:b])
        labels, weights = torch.from_numpy(pack.labels[a:b]), torch.from_numpy(pack.loss_weights[a:b])
        if not weights.any():
            continue
        forget_lengths(model)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        ce = nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none"
        )
        total = total + (ce * weights).double().sum()
    return total


def forget_lengths(model: nn.Module) -> None:
    """RoPE of type dynamic remembers the longest text it has seen: as it was before the first one."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached"):
            module.__init__(module.config)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """|ours - reference| / |reference|, by norm in float64."""
    ours, reference = ours.double(), reference.double()
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-30))


def dealt(pack: Pack, sp: int) -> Pack:
    """The pack with its documents whole on `sp` ranks, as many on each, however uneven; as it is where they are fewer."""
    count = len(pack.cu_seqlens) - 1
    if count < sp:
        return pack
    return replace(pack, rank_borders=tuple(int(pack.cu_seqlens[i * count // sp]) for i in range(sp + 1)))


def dense_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *, scaling:
    float, sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Textbook attention in the dtype of its inputs (transformers' eager one takes its softmax in float32)."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])[None]
    seen = (j <= i) if sliding_window is None else (j <= i) & (j > i - sliding_window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if s_aux is not None:  # attention sinks: one more key for each head, without a value
        scores = torch.cat([scores, s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]]
    return (probabilities @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense", dense_attention)


def built_engine(folder: str, ds: dict[str, Any], world: int, **keys: Any) -> tuple[Any, ParallelLayout]:
    """The engine of `built_run`, and its layout."""
    built, layout = built_run(folder, ds, world, **keys)
    return built.engine, layout


def built_run(folder: str, ds: dict[str, Any], world: int, **keys: Any) -> tuple[Any, ParallelLayout]:
    """What a run builds from the DeepSpeed JSON `ds` and these keys, on the model in `folder`; its layout."""
    from ds_longft.config.ds_json import merge_ds_config
    from ds_longft.config.run_config import RunConfig
    from ds_longft.train.engine import build
    from ds_longft.train.install import known_run

    content = {
        "ds_config": "not read",
        "sp": 1,
        "model": {"path": folder, "random_weights": True},
        "data": {"train": ["unused.jsonl"], "max_length_tokens": 4096},
        **keys,
    }
    config = RunConfig.model_validate(content)
    settings = merge_ds_config(ds, config, world=world, device="cpu", hidden_size=64)
    layout = ParallelLayout.create(config.sp)
    device = torch.device("cpu")
    return build(known_run(config, settings, layout, device), layout, device), layout
