"""What `ds-longft plan` takes that a run config has keys for. In a file without imports: a help waits for none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Asked:
    """One run, in flags; what is left out is as a run config has it.

    Args:
        length: tokens of a pack, with dpo of each document of a pair; 128K and 1M count in 1024s.
        lora_r: rank; left out: 16.
        lora_experts: adapters on the experts of a mixture too.
        objective: sft (the default), or dpo (preference pairs, see above).
        reference: with dpo, as dpo.reference; auto is adapter_off, and model with --full. A loss without one (simpo)
            costs what precomputed costs.
        passes: with dpo, as dpo.passes; auto considers both.
        kernel: attention kernel; default the GPU's fastest.
        liger: off where liger-kernel is not installed or does not know the model.
    """

    length: str | int | None = None
    lora_r: int | None = None
    lora_experts: bool = False
    objective: Literal["sft", "dpo"] | None = None
    reference: Literal["auto", "adapter_off", "precomputed", "model"] | None = None
    passes: Literal["auto", "one", "two"] | None = None
    kernel: str | None = None
    liger: Literal["auto", "off"] | None = None


ASKED = Asked()
