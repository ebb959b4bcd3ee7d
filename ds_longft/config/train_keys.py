"""Sections of the run config: preferences, the optimizer, the training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_longft.config.section import Applied, Beta, Free, Positive, Refused, Rounding, Section, Tokens


class DpoConfig(Section):
    """Preference training: `objective: dpo`. The loss is a weighted mean over the pairs of an optimizer step."""

    beta: Refused[float] = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference (with `simpo`, which has none: the scale of the rewards)."""

    loss: Refused[Literal["sigmoid", "ipo", "simpo"]] = "sigmoid"
    """`sigmoid`: DPO. `ipo`: squared distance of the length-normalised margin to 1 / (2 beta). `simpo`: without a
    reference, on length-normalised log-probabilities."""

    label_smoothing: Refused[float] = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs taken to be labelled the wrong way round (cDPO); for `sigmoid` and `simpo`."""

    simpo_gamma: Refused[float] = Field(default=0.5, ge=0)
    """Margin that `simpo` asks for between the two rewards."""

    rpo_alpha: Refused[float] = Field(default=0.0, ge=0)
    """Weight of a supervised term: the chosen answer's mean loss per token, added to each pair (RPO)."""

    reference: Rounding[Literal["auto", "adapter_off", "precomputed", "model"]] = "auto"
    """Where the reference's log-probabilities come from. `adapter_off`: the same weights with LoRA switched off.
    `precomputed`: `ds-longft data ref_logps` wrote them into `data.cache_dir`. `model`: a second, frozen copy of the
    model. `auto`: `adapter_off` with LoRA, `model` without."""

    passes: Rounding[Literal["auto", "one", "two"]] = "auto"
    """`one`: both answers in one forward and backward pass. `two`: log-probabilities without a graph first, then a
    forward and backward pass for each answer alone: the same gradient in half the activation memory, for one more
    forward pass. `auto`: on GPUs the faster one of those that fit, as `ds-longft plan` predicts; `one` is measured
    before step 1, and given up where it would not fit. On a CPU `one`."""


OptimizerName = Literal["adamw", "adamw_8bit", "muon", "adafactor", "schedule_free", "sgd"]


class OptimConfig(Section):
    """Optimizer and learning-rate schedule. The DeepSpeed JSON may name an optimizer instead."""

    type: Refused[OptimizerName] = "adamw"
    """`adamw_8bit`: AdamW with moments of a byte (bitsandbytes). `muon`: DeepSpeed's, over matrices, also those of
    adapters; AdamW over the rest. `adafactor`: transformers', without momentum; ZeRO stage 0. `schedule_free`: AdamW
    with averaged weights instead of a falling learning rate (schedulefree); ZeRO stages 0 to 2. `sgd` (no momentum) is
    for proofs: it shows gradient scale, which Adam hides."""

    learning_rate: Applied[float] = Field(default=1e-4, gt=0)
    """Peak learning rate."""

    adam_learning_rate: Applied[float | None] = Field(default=None, gt=0)
    """With `muon`: peak learning rate of AdamW, beside Muon's `learning_rate` (0.02 is usual), for embeddings, output
    head, norms and stacked experts."""

    betas: Applied[tuple[Beta, Beta]] = (0.9, 0.95)
    """AdamW moments."""

    eps: Applied[float] = Field(default=1e-8, gt=0)
    """AdamW epsilon."""

    weight_decay: Applied[float] = Field(default=0.0, ge=0)
    """Decoupled decay; never on biases and norms."""

    schedule: Applied[Literal["cosine", "linear", "constant"]] = "cosine"
    """Shape after the warmup."""

    warmup_ratio: Applied[float] = Field(default=0.03, ge=0, lt=1)
    """Share of the steps with rising learning rate. `warmup_steps` wins where both are given."""

    warmup_steps: Applied[int | None] = Field(default=None, ge=0)
    """Steps with rising learning rate."""

    min_lr_ratio: Applied[float] = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""

    max_grad_norm: Applied[float | None] = Field(default=1.0, gt=0)
    """Clip the global gradient norm; null for no clipping."""


class TrainConfig(Section):
    """How long, how often, and what is recomputed."""

    epochs: Applied[float] = Field(default=1, gt=0)
    """Passes over the data; 0.5 is half of one, 2.25 two and a quarter."""

    max_steps: Applied[int | None] = Field(default=None, gt=0)
    """Stop after N optimizer steps, even inside an epoch."""

    gradient_accumulation_steps: Refused[int] = Field(default=1, gt=0)
    """Packs of each data-parallel rank in one optimizer step."""

    router_aux_loss: Refused[float] = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Factor of the load-balancing loss of a mixture's routers, over the whole step. With several packs per step it
    costs a forward pass more."""

    router_z_loss: Refused[float] = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Factor of the routers' z loss: squares of the log-sum-exp of their logits."""

    recompute: Rounding[Literal["none", "full", "every_k", "sqrt", "keep_attention", "auto"]] = "auto"
    """Activation checkpointing. `full`: every layer. `every_k`: segments of `recompute_every` layers. `sqrt`: segments
    of sqrt(layers), the least memory. `keep_attention`: every layer, but attention output is kept, not recomputed.
    `auto`: as `keep_attention`, and with the GPU memory left the outputs of as many linears as fit. On GPUs it becomes
    `none` where the longest pack is then expected to need at most four fifths of the memory, and `full`, then (ZeRO 0
    to 2) short segments, where it is not expected to fit."""

    offload_host_gib: Rounding[float] = Field(default=0.0, ge=0)
    """Host memory a node may give to what does not fit on its GPUs: inputs of layers (or segments), with
    `keep_attention` and `auto` attention outputs, with `auto` outputs of linears. Pinned, copied beside the compute.
    Pinning takes about 0.4 s a GiB at the start."""

    offload_disk: Rounding[str | None] = None
    """Folder on a local disk (NVMe) for what neither the GPUs nor `offload_host_gib` hold: inputs of layers, and
    attention outputs where they are kept. Read and written beside the compute, through 0.5 GiB of pinned host memory of
    each rank. Measured at the start, and refused where the steps would wait for it. Nothing stays there, even after a
    crash. On a CPU all of them go there."""

    mlp_tile_tokens: Rounding[Tokens | None] = None
    """Compute MLPs in tiles of N of a rank's tokens: less memory at the same speed, but no MLP output can be kept.
    Left out: whole, or with `auto` recomputation what the longest pack needs."""

    kv_heads_at_a_time: Rounding[int | None] = Field(default=None, gt=0)
    """Exchange and compute attention for N of a rank's key/value heads (and their queries) at a time. Left out: all,
    or with `auto` recomputation what the longest pack needs."""

    recompute_every: Rounding[int] = Field(default=2, gt=0)
    """Layers per segment for `every_k`."""

    verify_first: Free[bool] = False
    """Before step 1, check on the first pack that sp changes neither loss nor gradient, that documents do not see each
    other and that no label crosses a border; stop if one of these fails. `ds-longft verify` checks more."""

    eval_every_steps: Free[int | None] = Field(default=None, gt=0)
    """Evaluate before the first step, every N steps and at the end. Left out: before the first and at the end."""

    save_every_steps: Free[int | None] = Field(default=None, gt=0)
    """Checkpoint every N steps. Left out: at the end only."""

    keep_checkpoints: Free[int] = Field(default=2, ge=1)
    """Older checkpoints are deleted after a new one is complete."""

    resume: Free[Literal["auto", "never"] | Positive] = "auto"
    """`auto`: newest valid checkpoint of `output_dir`, if there is one. A number: exactly that step, or an error."""

    max_minutes: Free[float | None] = Field(default=None, gt=0)
    """Stop, save and exit 75 before N minutes have passed since the start. The end of a SLURM job counts without it."""

    on_nonfinite: Applied[Literal["stop", "skip"]] = "stop"
    """When loss or gradient is NaN or infinite, the step is not applied. `stop`: exit 70. `skip`: take the next."""

    deterministic: Rounding[bool] = False
    """The same run twice, or stopped and resumed, gives the same losses and weights to the bit, on the same number and
    type of GPUs with the same versions (CPU runs always do). Costs about a twentieth of a long step on Hopper GPUs
    with flash-attn-4. Kernels that are not shown to repeat are left out."""

    max_skipped_in_a_row: Applied[int] = Field(default=3, gt=0)
    """With `on_nonfinite: skip`, exit 70 after more than N skipped steps in a row."""

    hang_minutes: Free[float] = Field(default=30.0, gt=0)
    """A rank that spends longer on one pack, evaluation pack or save dumps its stacks and exits 71."""
