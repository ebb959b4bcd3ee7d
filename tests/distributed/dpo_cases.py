"""Packs of preference pairs for the proofs, made without the package's packing code, and the loss of one process by its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from ds_longft.batch import IGNORE_INDEX, Pack, Pairs
from ds_longft.config.run_config import DpoConfig
from tests.distributed.models import VOCAB, forget_lengths

PairLengths = Sequence[tuple[int, int, int]]
"""Of each pair: tokens of the prompt, the chosen and the rejected answer."""


def pair_documents(lengths: PairLengths, seed: int) -> list[tuple[np.ndarray, int]]:
    """(ids, tokens of the prompt) of each document, chosen and rejected in turns."""
    rng = np.random.default_rng(seed)
    documents = []
    for prompt, *answers in lengths:
        asked = rng.integers(3, VOCAB, prompt)
        documents += [(np.concatenate([asked, rng.integers(3, VOCAB, n)]), prompt) for n in answers]
    return documents


def pair_pack(
    lengths: PairLengths, *, seed: int, multiple: int = 1, weights: Sequence[float] | None = None, reference: Any = None
) -> Pack:  # fmt: skip
    """Pairs laid head to tail; every token of an answer is a target."""
    documents = pair_documents(lengths, seed)
    padding = -sum(len(ids) for ids, _ in documents) % multiple
    if padding:
        documents.append((np.zeros(padding, int), padding))
    labels, targets = [], []
    for ids, prompt in documents:
        label = np.append(ids[1:], IGNORE_INDEX)
        label[: prompt - 1] = IGNORE_INDEX
        if padding and ids is documents[-1][0]:
            label[:] = IGNORE_INDEX
        labels.append(label)
        targets.append((label != IGNORE_INDEX).astype(np.float32))
    return Pack(
        input_ids=np.concatenate([ids for ids, _ in documents]).astype(np.int64),
        position_ids=np.concatenate([np.arange(len(ids)) for ids, _ in documents]).astype(np.int64),
        labels=np.concatenate(labels).astype(np.int64),
        loss_weights=np.concatenate(targets),
        cu_seqlens=np.cumsum([0, *(len(ids) for ids, _ in documents)]).astype(np.int32),
        padding_tokens=padding,
        pairs=Pairs(np.asarray(weights if weights is not None else np.ones(len(lengths)), dtype=np.float32), reference),
    )


def document_logps(model: nn.Module, pack: Pack) -> Tensor:
    """[P, 2] log-probabilities, each document run alone through transformers."""
    sums = []
    for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False):
        labels = torch.from_numpy(pack.labels[a:b])
        if (labels == IGNORE_INDEX).all():
            continue
        forget_lengths(model)
        logits = model(input_ids=torch.from_numpy(pack.input_ids[None, a:b]), use_cache=False).logits[0]
        sums.append(-cross_entropy(logits.double(), labels, reduction="sum", ignore_index=IGNORE_INDEX))
    return torch.stack(sums).view(-1, 2)


def loss_by_formula(policy: Tensor, reference: Tensor, counts: Tensor, dpo: DpoConfig) -> Tensor:
    """[P] written from the papers, differentiable."""
    (pc, pr), (rc, rr), (nc, nr) = policy.unbind(1), reference.unbind(1), counts.unbind(1)
    beta, eps = dpo.beta, dpo.label_smoothing
    if dpo.loss == "ipo":
        losses = ((pc - rc) / nc - (pr - rr) / nr - 0.5 / beta) ** 2
    elif dpo.loss == "simpo":
        h = beta * pc / nc - beta * pr / nr - dpo.simpo_gamma
        losses = -(1 - eps) * logsigmoid(h) - eps * logsigmoid(-h)
    else:
        h = beta * ((pc - pr) - (rc - rr))
        losses = -(1 - eps) * logsigmoid(h) - eps * logsigmoid(-h)
    return losses - dpo.rpo_alpha * pc / nc


def baseline_step(policy: nn.Module, base: nn.Module, packs: Sequence[Pack], dpo: DpoConfig) -> Any:
    """Loss and every gradient of one step on one process, from `base` as the reference."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for pack in packs:
        with torch.no_grad():
            reference = document_logps(base, pack)
        counts = [
            int((pack.labels[a:b] != IGNORE_INDEX).sum())
            for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)
        ]
        counts = torch.tensor([c for c in counts if c], dtype=torch.float64).view(-1, 2)
        weights = torch.from_numpy(pack.pairs.weights.astype(np.float64))
        total = total + (loss_by_formula(document_logps(policy, pack), reference, counts, dpo) * weights).sum()
        weight += float(weights.sum())
    (total / weight).backward()
    return float(total.detach()) / weight, {
        n: p.grad for n, p in policy.named_parameters() if p.requires_grad and p.grad is not None
    }
