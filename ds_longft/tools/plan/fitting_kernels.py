"""Which attention kernels do what a model asks for, on GPUs that are not here: by the same refusals as in a run."""

from __future__ import annotations

from dataclasses import replace

import torch

from ds_longft.decide.setting import Gpu
from ds_longft.decide.time import WIDEST_HEADS
from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence.kernels import AttentionSpec, Job, kernel_by_name
from ds_longft.sequence.kernels.torch_builtin import WideHeads


def refusal(name: str, model: ModelFacts, gpu: Gpu, tokens: int | None) -> str | None:
    """Why a kernel cannot work for one of the model's layers in bf16, None if it can for all. For heads that are wider
    than it can do another one works: the reason is that one's.

    `tokens` of the longest document: a window that is no narrower asks for nothing. None: it is not known.
    """
    for window, d in dict.fromkeys(model.attentions):
        spec = AttentionSpec(d**-0.5, window, model.softcap)
        spec = replace(spec, window=spec.window_for((tokens,)) if tokens else window)
        job = Job("cuda", torch.bfloat16, d, spec, gpu.capability)
        reason = kernel_by_name(WideHeads.name if d > WIDEST_HEADS else name).refuses(job, here=False)
        if reason is not None:
            return reason
    return None


def with_fitting_kernels(gpu: Gpu, model: ModelFacts, asked: str, tokens: int | None) -> Gpu:
    """The GPU with the rates of those kernels alone that `refusal` has nothing against.

    Raises:
        ConfigError: there is none, or the one asked for by name ("": the fastest) is not among them.
    """
    reasons = {name: refusal(name, model, gpu, tokens) for name in gpu.attention_tflops}
    fitting = {name: rates for name, rates in gpu.attention_tflops.items() if reasons[name] is None}
    if not fitting:
        raise ConfigError(
            f"none of the attention kernels that {gpu.name} has rates for does what this model asks for: "
            + "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        )
    if asked and asked not in fitting:
        raise ConfigError(
            f"--kernel is {asked}, but {asked} {reasons[asked]}. Kernels that {gpu.name} has rates for and that fit "
            f"this model: {', '.join(fitting)}"
        )
    return replace(gpu, attention_tflops=fitting)
