"""Which attention kernel computes a pack: the table, and the choice with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from ds_longft.errors import ModelError
from ds_longft.sequence.kernels.base import AttentionSpec, Capability, Kernel
from ds_longft.sequence.kernels.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
from ds_longft.sequence.kernels.reference import MathKernel
from ds_longft.sequence.kernels.torch_builtin import CpuKernel, CudnnKernel, TorchVarlen

KERNELS: tuple[Kernel, ...] = (
    FlashAttention4(),
    FlashAttention3(),
    FlashAttention2(),
    CudnnKernel(),
    TorchVarlen(),
    CpuKernel(),
    MathKernel(),
)
"""The table: `auto` takes the first that fits, but for the crossover below."""

CUDNN_MIN_RMS_TOKENS = 16384
"""cuDNN per document against one varlen launch (torch's FlashAttention 2), on Hopper and newer.

cuDNN is 1.7 times as fast per FLOP on one long document, but it is launched, and for a length it has not seen also
planned, once per document. Work grows with length squared, so what counts is the root mean square of the lengths. Not
yet a measured crossover: at 16K a document's work is some milliseconds, about what its plan costs spread over the
layers of a model. `benchmarks/attention_kernels.py` measures both sides of it.
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
    head_dim: int,
    spec: AttentionSpec,
    lengths: Sequence[int],
) -> tuple[Kernel, str]:
    """The kernel for one layer and one pack, and why.

    Args:
        name: a kernel's name, or `auto` for the first of the table that fits.
        device, dtype, head_dim: of q, k and v.
        spec: what the layer asks for.
        lengths: the pack's document lengths in tokens, on the host; they decide whether a window narrows anything, and
            between cuDNN and varlen.

    Cheap enough to be called for every layer. Raises ModelError if the kernel asked for by name does not fit, saying
    why and which fit.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    mean_square = sum(length * length for length in lengths) / len(lengths)
    return _choose(
        name,
        device.type,
        dtype,
        head_dim,
        replace(spec, window=spec.window_for(lengths)),
        capability,
        mean_square >= CUDNN_MIN_RMS_TOKENS**2,
    )


@lru_cache(maxsize=256)
def _choose(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    spec: AttentionSpec,
    capability: Capability | None,
    long_documents: bool,
) -> tuple[Kernel, str]:
    refusals = {
        kernel.name: kernel.refuses(
            device_type=device_type, dtype=dtype, head_dim=head_dim, spec=spec, capability=capability
        )
        for kernel in KERNELS
    }
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
        hopper = capability is not None and capability >= (9, 0)
        if not (long_documents and hopper) and (varlen := kernel_by_name("varlen")) in fitting:
            kernel = varlen
            limit = "the documents are too short" if hopper else "this GPU is older than Hopper"
            reason = f"one launch for all documents; {limit} for cudnn to gain"
    names = [kernel.name for kernel in KERNELS]
    earlier = {name: refusals[name] or "" for name in names[: names.index(kernel.name)] if refusals[name]}
    # kernels of another device would only be noise in the message
    before = "; ".join(f"{name} {why}" for name, why in earlier.items() if not why.startswith("runs on "))
    return kernel, reason + (f" ({before})" if before else "")
