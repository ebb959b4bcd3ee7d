"""The attention kernels on the run's own shapes, forward and backward, against the definition in a wider type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_longft.batch import Documents, Pack
from ds_longft.exactness.finding import Finding, Gather, nan_as_inf
from ds_longft.layout import ParallelLayout
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence import attention
from ds_longft.sequence.exchange import deal_heads
from ds_longft.sequence.kernels import KERNELS, AttentionSpec, Job, Kernel, Saved, kernel_by_name
from ds_longft.sequence.shard import shard

CHECK = "7 attention kernel"

# Relative, by norm. bf16 rounds the weights (input of the second product) and the output: 2e-3 each. Gradients pass
# through two such products, and dq of some kernels is summed in bf16 steps.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Asked(NamedTuple):
    """What a layer asks of attention, and the kernel chosen for it."""

    spec: AttentionSpec
    head_dim: int
    dtype: torch.dtype
    kernel: str
    reason: str


@contextmanager
def _watched() -> Iterator[dict[Asked, None]]:
    """Inside, every distinct choice of a kernel is noted."""
    asked: dict[Asked, None] = {}
    plain = attention.choose_kernel

    def noting(name: str, **facts: Any) -> tuple[Kernel, str]:
        kernel, reason = plain(name, **facts)
        asked[Asked(facts["spec"], facts["head_dim"], facts["dtype"], kernel.name, reason)] = None
        return kernel, reason

    attention.choose_kernel = noting
    try:
        yield asked
    finally:
        attention.choose_kernel = plain


@torch.no_grad()
def asked_of_attention(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> list[Asked]:
    """What the model's layers ask of attention over `pack`, from a live forward pass. Collective."""
    engine.eval()
    with _watched() as asked:
        engine(shard(pack, layout, device))
    engine.train()
    return list(asked)


def check_kernels(
    asked: list[Asked], facts: ModelFacts, pack: Pack, layout: ParallelLayout, device: torch.device, gather: Gather,
) -> list[Finding]:  # fmt: skip
    """The chosen kernel, and the others of the table that fit, on this rank's heads and the pack's documents."""
    share = deal_heads(facts.q_heads, facts.kv_heads, layout.sp)[layout.sp_rank]
    kv = len(share.repeat or share.kv)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    findings = []
    for spec, head_dim, dtype, chosen, reason in asked:
        shape = (pack.tokens, len(share.q), kv, head_dim)
        fitting = [
            kernel.name
            for kernel in KERNELS
            if kernel.name not in (chosen, "math")
            and kernel.refuses(Job(device.type, dtype, head_dim, spec, capability)) is None
        ]
        for name in (chosen, *fitting):
            of_ranks = gather(_error(kernel_by_name(name), shape, pack, spec, dtype, device))
            error, where = max(of_ranks)  # infinity for NaN
            window = "" if spec.window is None else f", window {spec.window}"
            what = f"{name}{' (chosen)' if name == chosen else ''}, head size {head_dim}{window}: worst of {where}"
            cause = f"kernel {name} computes another attention on these shapes: set model.kernel to another one"
            remark = reason if name == chosen else "not used by this run"
            findings.append(Finding.at_most(CHECK, what, error, ALLOWED[dtype], cause, remark=remark))
    return findings


def _error(
    kernel: Kernel, shape: tuple[int, int, int, int], pack: Pack, spec: AttentionSpec, dtype: torch.dtype,
    device: torch.device,
) -> tuple[float, str]:  # fmt: skip
    """The largest relative error among output and gradients, infinity for one that is no number, and which it is of."""
    tokens, q_heads, kv_heads, d = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(tokens, heads, d, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v, dout = random(q_heads), random(kv_heads), random(kv_heads), random(q_heads)
    cu = torch.from_numpy(pack.cu_seqlens).to(device)
    documents = Documents(cu, tuple(cu.diff().tolist()))
    out, lse = kernel.forward(q, k, v, documents, spec)
    grads = kernel.backward(dout, Saved(q, k, v, out, lse), documents, spec)
    wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
    truth = kernel_by_name("math")
    qw, kw, vw, doutw = (t.to(wide) for t in (q, k, v, dout))
    true_out, true_lse = truth.forward(qw, kw, vw, documents, spec)
    true_grads = truth.backward(doutw, Saved(qw, kw, vw, true_out, true_lse), documents, spec)
    pairs = zip(("out", "dq", "dk", "dv"), (out, *grads), (true_out, *true_grads), strict=True)
    return max((nan_as_inf(float((a.to(wide) - b).norm() / b.norm().clamp_min(1e-30))), name) for name, a, b in pairs)
