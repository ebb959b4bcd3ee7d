"""What the model's facts and the engine's JSON decide before a weight is read."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence.kernels import AttentionSpec, choose_kernel
from ds_longft.sequence.state.recurrence import kernel_in_words


def check_model(
    config: RunConfig, facts: ModelFacts, sp: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """See that there is a kernel for each kind of layer.

    Returns the name of the first layer's kernel, and a line about all of them.

    Raises:
        ModelError: a kernel that is unknown or cannot do what a layer asks for.
    """
    names, lines = [], {}
    for window, d in dict.fromkeys(facts.attentions or ((None, facts.head_dim),)):
        kernel, reason = choose_kernel(
            config.model.kernel, device=device, dtype=dtype, heads=-(-facts.q_heads // sp), head_dim=d,
            spec=AttentionSpec(d**-0.5, window, facts.softcap, config.train.deterministic),
            lengths=(config.data.max_length_tokens,),
        )  # fmt: skip
        names.append(kernel.name)
        lines[f"{kernel.name} ({reason})"] = True
    heads = {(s.kind, s.keys, s.values) for s in (of.state for of in facts.kinds) if s and s.kind in ("delta", "decay")}
    words = f"; layers with a state: {kernel_in_words(heads, dtype, device)}" if facts.state_products else ""
    return names[0], "attention kernel: " + "; ".join(lines) + words


def check_zero_section(engine_config: dict[str, Any]) -> None:
    """Have DeepSpeed read the sections inside `zero_optimization` that are its business.

    Raises:
        ConfigError: with every value it refuses. It would say so itself, after the model is loaded.
    """
    try:
        DeepSpeedZeroConfig(**engine_config.get("zero_optimization", {}))
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(["zero_optimization", *map(str, detail["loc"])])
            problems.append(f"ds_config: {key} is {detail['input']!r}, which DeepSpeed refuses: {detail['msg']}")
        raise ConfigError(problems) from None
