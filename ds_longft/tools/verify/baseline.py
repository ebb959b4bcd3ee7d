"""The yardstick: the same weights in float32 through transformers' own attention, each document alone, on one process.

No packing, no sharding, no exchange, no kernel of ours, no chunked loss, no engine. What is shared with a run is the
loading of the weights and the placing of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from ds_longft.batch import Pack
from ds_longft.config.run_config import DpoConfig, RunConfig
from ds_longft.exactness.engine_step import Gradients
from ds_longft.exactness.isolation import decoder_of
from ds_longft.layout import ParallelLayout
from ds_longft.model.dropout import without_dropout
from ds_longft.model.load import load_config, load_model, trained_rows
from ds_longft.model.lora import add_lora
from ds_longft.model.packed import unpack
from ds_longft.model.rope_lengths import set_rope_lengths
from ds_longft.objectives.objective import reference_of
from ds_longft.objectives.pair_loss import pair_losses
from ds_longft.tools.verify.verified_run import wake_adapters


@dataclass(frozen=True)
class Baseline:
    """What one process computes."""

    gradients: Gradients
    token_losses: list[NDArray[np.float64]]
    """For each pack [S]: w * ce of every token, 0 where nothing is trained."""

    def means_of_means(self, packs: Sequence[Pack], layout: ParallelLayout) -> tuple[float, float]:
        """What a frequent mistake would show: each rank divides by its own weight, then ranks are averaged.

        Once in the whole step, or in each micro-step.
        """
        sums, weights = (np.zeros((len(packs), layout.sp)) for _ in range(2))
        for i, pack in enumerate(packs):
            parts = [pack.part(layout.sp, rank) for rank in range(layout.sp)]
            sums[i] = [self.token_losses[i][part].sum() for part in parts]
            weights[i] = [pack.loss_weights[part].sum(dtype=np.float64) for part in parts]
        by_rank = [  # packs of one dp rank
            (sums[r :: layout.dp].sum(0) / np.maximum(weights[r :: layout.dp].sum(0), 1e-30)).mean()
            for r in range(layout.dp)
        ]
        return float(np.mean(by_rank)), float((sums / np.maximum(weights, 1e-30)).mean())


def baseline_model(config: RunConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The run's model, rounded to the run's type, then in float32; its adapters too."""
    model: Any = load_model(
        config.model, plain_config(config), ds_engine_config=None, dtype=dtype, device=device, seed=config.seed
    )
    unpack(model)
    if config.lora is not None:
        rows = trained_rows(config.model)
        model = add_lora(model, config.lora, seed=config.seed, revision=config.model.revision, train_rows=rows)
        wake_adapters(model)
    return in_float32(model)


def in_float32(model: nn.Module) -> nn.Module:
    """Weights in float32, on the GPU kept small by recomputing layers."""
    model = model.float()
    if next(model.parameters()).device.type == "cuda":
        base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def plain_config(config: RunConfig) -> Any:
    """The model's config with transformers' own attention that honours all it asks for: sdpa knows neither softcap nor
    sinks.
    """
    hf_config = load_config(config.model, config.data.max_length_tokens, attn_implementation="sdpa")
    text = hf_config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    hf_config._attn_implementation = "eager" if softcap or text.model_type == "gpt_oss" else "sdpa"
    return hf_config


def baseline_step(
    model: nn.Module, packs: Sequence[Pack], total_weight: float, device: torch.device, rank: int, world: int,
    dpo: DpoConfig | None = None,
) -> Baseline:  # fmt: skip
    """Loss and gradients of one step over `packs`, of pairs where `dpo` is given; ranks share the packs out and add up.
    Collective.
    """
    token_losses = [np.zeros(pack.tokens) for pack in packs]
    of_pairs = torch.zeros((), dtype=torch.float64, device=device)
    with without_dropout(model):
        for i in range(rank, len(packs), world):
            loss_of_pairs, scales = (0.0, {}) if dpo is None else pair_scales(model, packs[i], dpo, device)
            of_pairs += loss_of_pairs
            for a, b, losses in document_losses(model, packs[i], device):
                (losses.sum() * scales.get(a, 1.0) / total_weight).backward()
                token_losses[i][a:b] = losses.detach().double().cpu().numpy()
    losses_of_all = torch.from_numpy(np.concatenate(token_losses)).to(device)
    if world > 1:
        dist.all_reduce(losses_of_all)
        dist.all_reduce(of_pairs)
    grads = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world > 1:
            dist.all_reduce(grad)
        if rank == 0:
            grads[name] = grad.detach().to("cpu", torch.float32, copy=True)
        p.grad = None
    whole = losses_of_all.cpu().numpy()
    borders = np.cumsum([0, *(pack.tokens for pack in packs)])
    return Baseline(
        Gradients((float(whole.sum()) if dpo is None else float(of_pairs)) / total_weight, grads),
        [whole[a:b] for a, b in pairwise(borders)],
    )


class DocumentLogits(NamedTuple):
    """Of a document's targets."""

    start: int  # of the document in its pack
    stop: int
    rows: torch.Tensor  # [t] places of the targets in the document
    logits: torch.Tensor  # [t, V] float32
    labels: torch.Tensor  # [t]
    weights: torch.Tensor  # [t]

    @property
    def losses(self) -> torch.Tensor:
        """[t] w * ce."""
        return cross_entropy(self.logits, self.labels, reduction="none") * self.weights


def document_logits(model: nn.Module, pack: Pack, device: torch.device) -> Iterator[DocumentLogits]:
    """Each document with targets, run alone."""
    for a, b in pairwise(pack.cu_seqlens.tolist()):
        weights = torch.from_numpy(pack.loss_weights[a:b]).to(device)
        rows = weights.nonzero()[:, 0]
        if not len(rows):
            continue
        set_rope_lengths(decoder_of(model), [b - a])  # transformers' own choice remembers earlier documents
        ids, labels = (torch.from_numpy(x[a:b]).to(device) for x in (pack.input_ids, pack.labels))
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=rows).logits[0]
        yield DocumentLogits(a, b, rows, logits.float(), labels[rows], weights[rows])


def document_losses(model: nn.Module, pack: Pack, device: torch.device) -> Iterator[tuple[int, int, torch.Tensor]]:
    """For each document with targets: (start, end, w * ce of its tokens [n] float32)."""
    for of in document_logits(model, pack, device):
        losses = torch.zeros(of.stop - of.start, device=device)
        yield of.start, of.stop, losses.index_add(0, of.rows, of.losses)


@torch.no_grad()
def pair_scales(model: nn.Module, pack: Pack, dpo: DpoConfig, device: torch.device) -> tuple[float, dict[int, float]]:
    """(weighted sum of the pairs' losses, what the loss multiplies each document's token losses with, by its first
    token).

    The log-probabilities come from documents one at a time; the reference is the same model without adapters, or, where
    every weight is trained, the model itself, which nothing has changed yet.
    """
    if not pack.pairs:  # padding alone
        return 0.0, {}
    count = len(pack.pairs)
    starts = pack.cu_seqlens[: 2 * count].tolist()
    policy = _logps(model, pack, starts, device)
    reference = None
    if reference_of(dpo, lora=hasattr(model, "peft_config")) != "none":
        with model.disable_adapter() if hasattr(model, "peft_config") else nullcontext():  # type: ignore[operator]
            reference = _logps(model, pack, starts, device)
    targets = [float((pack.loss_weights[a:b] != 0).sum()) for a, b in zip(starts, pack.cu_seqlens[1:], strict=False)]
    lengths = torch.tensor(targets, dtype=torch.float64, device=device).clamp_min(1.0).view(-1, 2)
    weights = torch.from_numpy(pack.pairs.weights.astype(np.float64)).to(device)
    pairs = pair_losses(policy, reference, lengths, dpo)
    # The token losses are -log p.
    scales = (-pairs.gradient * weights[:, None]).flatten().tolist()
    return float(pairs.losses @ weights), dict(zip(starts, scales, strict=True))


def _logps(model: nn.Module, pack: Pack, starts: list[int], device: torch.device) -> Any:
    """[P, 2] float64; 0 for a document without a target."""
    sums = dict.fromkeys(starts, 0.0)
    for a, _, losses in document_losses(model, pack, device):
        sums[a] = -float(losses.double().sum())
    return torch.tensor(list(sums.values()), dtype=torch.float64, device=device).view(-1, 2)
