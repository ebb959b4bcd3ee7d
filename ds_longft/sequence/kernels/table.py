"""Which attention kernel computes a pack: the table, and the choice with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from ds_longft.errors import ModelError
from ds_longft.sequence.kernels.base import AttentionSpec, Job, Kernel
from ds_longft.sequence.kernels.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
from ds_longft.sequence.kernels.math_kernel import MathKernel
from ds_longft.sequence.kernels.torch_builtin import CpuKernel, CudnnKernel, TorchVarlen, WideHeads

KERNELS: tuple[Kernel, ...] = (
    FlashAttention4(),
    FlashAttention3(),
    CudnnKernel(),
    FlashAttention2(),
    TorchVarlen(),
    WideHeads(),
    CpuKernel(),
    MathKernel(),
)
"""The table: `auto` takes the first that fits, but for the crossover below."""

ONE_LAUNCH = ("flash-attn-2", "varlen")
"""FlashAttention 2, installed or inside torch: what `auto` takes instead of cuDNN below the crossover."""

CUDNN_MIN_WORK = 16384**2 * 2048
"""Length squared, in the mean of a pack's documents, times features of the rank's query heads: from here on cuDNN per
document gains over one launch of FlashAttention 2, on Hopper and newer.

cuDNN runs one long document at 570 and 540 TFLOP/s, forward and backward, FlashAttention 2 at 330 and 325 (131,072
tokens, heads of 128, H200). But it plans each length it has not seen: 0.17 s (H100s, steps of the demonstration with
and without a new length), 5 ms for each of 32 layers. It saves 8.7e-15 s a unit of this work, so 6e11 pay for a plan:
17,000 tokens with half of the heads of a Llama-8B, 12,000 with all, 35,000 with an eighth.
"""


def kernel_by_name(name: str) -> Kernel:
    """The kernel of that name. Raises ModelError with the known names for any other."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    known = ", ".join(kernel.name for kernel in KERNELS)
    raise ModelError(f"model.kernel is {name!r}, which is no kernel; expected auto or one of: {known}")


def choose_kernel(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    spec: AttentionSpec,
    lengths: Sequence[int],
) -> tuple[Kernel, str]:
    """The kernel for one layer and one pack, and why.

    `name`: of a kernel, or `auto` for the first of the table that fits. `heads`: query heads that the kernel is given;
    under sp, of the rank that has the most. `lengths`: the pack's documents in tokens, on the host; they decide whether
    a window narrows anything, and between cuDNN and one launch for all documents.
    Cheap enough to be called for every layer. Raises ModelError if the kernel asked for by name does not fit, saying
    why and which fit.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    mean_square = sum(length * length for length in lengths) / len(lengths)
    job = Job(device.type, dtype, head_dim, replace(spec, window=spec.window_for(lengths)), capability)
    return _choose(name, job, mean_square * heads * head_dim >= CUDNN_MIN_WORK)


@lru_cache(maxsize=256)
def _choose(name: str, job: Job, enough_work: bool) -> tuple[Kernel, str]:
    refusals = {kernel.name: kernel.refuses(job) for kernel in KERNELS}
    fitting = [kernel for kernel in KERNELS if refusals[kernel.name] is None]
    if name != "auto":
        kernel = kernel_by_name(name)
        if refusals[name] is not None:
            fits = ", ".join(kernel.name for kernel in fitting)
            raise ModelError(
                f"model.kernel is {name}, but {name} {refusals[name]}. Kernels that fit this model on this machine: "
                f"{fits}; set model.kernel to one of them, or to auto"
            )
        return kernel, "asked for by name"
    kernel = fitting[0]
    reason = "first of the table that fits"
    if kernel.name == "cudnn":
        hopper = job.capability is not None and job.capability >= (9, 0)
        one_launch = next((other for other in fitting if other.name in ONE_LAUNCH), None)
        if one_launch is not None and not (enough_work and hopper):
            kernel = one_launch
            limit = "a rank's work on each is too little" if hopper else "this GPU is older than Hopper"
            reason = f"one launch for all documents; {limit} for cudnn to gain"
    names = [kernel.name for kernel in KERNELS]
    earlier = {name: refusals[name] or "" for name in names[: names.index(kernel.name)] if refusals[name]}
    # kernels of another device would only be noise in the message
    before = "; ".join(f"{name} {why}" for name, why in earlier.items() if not why.startswith("runs on "))
    return kernel, reason + (f" ({before})" if before else "")
