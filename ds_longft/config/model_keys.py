"""Sections of the run config: the model, and its adapters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ds_longft.config.section import ByContent, Free, Refused, Rounding, Section

Quantize = Literal["auto", "none", "nf4", "int8", "fp8"]
"""As `model.quantize`."""


class RopeConfig(Section):
    """How the rotary position embedding is stretched when the model is loaded."""

    type: Refused[Literal["none", "linear", "dynamic", "yarn", "llama3", "abf"]] = "none"
    """`none` keeps the model's own; `abf` raises the base (theta); the others are the Hugging Face types."""

    factor: Refused[float | None] = Field(default=None, ge=1.0)
    """Stretch for `linear`, `dynamic`, `yarn`, `llama3`. Left out: `data.max_length_tokens` over the model's window."""

    theta: Refused[float | None] = Field(default=None, gt=0)
    """New base for `abf`. Left out: old base * factor ** (d / 2i), where pair i of a head's d dimensions is the first
    that makes less than one turn in the old window: none turns further than the model has seen. The NTK-aware rule
    gives less, and failed in the last third of the new window (docs/evaluate.md)."""

    attention_factor: Refused[float | None] = Field(default=None, gt=0)
    """`yarn`: multiplies queries and keys, so scores by its square. Left out: 0.1 ln(factor) + 1, as YaRN has it. 1
    disturbs short texts less before any training (docs/evaluate.md). Check that what serves the model reads it."""


class ModelConfig(Section):
    """Which model, and how it is loaded."""

    path: ByContent[str] = ""
    """A local Hugging Face folder or a hub id. Weights are read from safetensors only."""

    revision: ByContent[str | None] = None
    """Hub revision. A full commit hash is required with `trust_remote_code`."""

    trust_remote_code: Refused[bool] = False
    """Run the model's own Python code. Off unless asked for, and then only with a pinned `revision`."""

    unproved: Free[bool] = False
    """Train a model of a type that is not proved (docs/models.md). What is known to be wrong stays refused."""

    dtype: Refused[Literal["auto", "bf16", "fp32"]] = "auto"
    """Compute type. `auto`: bf16 on GPUs, fp32 on CPUs."""

    kernel: Rounding[
        Literal[
            "auto", "flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "varlen", "mem-efficient", "cpu", "math"
        ]
    ] = "auto"
    """Attention kernel by name (README), or `auto` for the first that fits."""

    liger: Rounding[Literal["auto", "off"]] = "auto"
    """`auto`: fused norm, rotary and gated activation of liger-kernel where it is installed and knows the model
    (GPUs)."""

    base: Free[Literal["auto", "engine", "resident", "sharded", "host"]] = "auto"
    """Where the frozen weights of decoder layers lie while adapters are trained; losses are the same to the bit
    (docs/plan.md). `engine`: as the DeepSpeed JSON says. `resident`: whole on each GPU. `sharded`: a share on each
    GPU, gathered a layer ahead. `host`: in pinned host memory, one copy a node, streamed a layer ahead. The last three
    leave ZeRO-3 nothing to divide: it becomes stage 2, and a run begun under ZeRO-3 keeps `engine`. `auto`: the first
    of resident, engine, sharded and host that the longest pack fits beside."""

    quantize: Refused[Quantize] = "auto"
    """The frozen base in fewer bits, quantised while it is read (docs/quantized.md). `auto`: as the checkpoint is
    stored. `none`: dense, also where the checkpoint is quantised."""

    random_weights: Refused[bool] = False
    """Initialise from the config alone, without weights: rehearsals and benchmarks."""

    add_tokens: Refused[list[str]] = Field(default=[])
    """Tokens to add to the tokenizer, with rows in the embeddings that begin as the mean of all others."""

    train_added: Refused[bool] = True
    """Whether these rows are trained. With LoRA the adapter holds them (PEFT's `trainable_token_indices`)."""

    rope: RopeConfig = RopeConfig()


class LoraConfig(Section):
    """Low-rank adapters through PEFT; adapter files are PEFT's."""

    r: Refused[int] = Field(default=16, gt=0)
    """Rank."""

    alpha: Refused[float] = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""

    dropout: Refused[float] = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapter."""

    targets: Refused[str | list[str]] = "all-linear"
    """`all-linear` (all but head and routers), or names of linear layers, e.g. [q_proj, v_proj]."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return "all-linear" if value == ["all-linear"] else value  # as the command line hands it on

    experts: Refused[bool] = False
    """Adapters on the experts of a mixture too, each expert its own of rank `r`; without dropout and DoRA."""

    rslora: Refused[bool] = False
    """Rank-stabilised scale, alpha / sqrt(r)."""

    dora: Refused[bool] = False
    """Weight-decomposed adapters (DoRA)."""

    modules_to_save: Refused[list[str]] = Field(default=[])
    """Whole modules trained and saved beside the adapters, e.g. [embed_tokens, lm_head]."""

    init_from: Refused[str | None] = None
    """Folder of an adapter (PEFT's format, e.g. a run's output_dir) to go on from, on the base it was trained on. The
    other keys have to be those it was made with."""
