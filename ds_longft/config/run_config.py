"""`RunConfig`: everything a run is made of, typed, frozen, documented where it is declared.

Data only: building it touches no file, no network, no GPU. Keys are checked against each other in `rules.py`, against
the machine, the DeepSpeed JSON and the model's config in `check.py`; `read.py` reads YAML and the command line.
Token counts accept "128K" and "1M" (1024-based).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ds_longft.config.rules import contradictions


def parse_tokens(value: Any) -> Any:
    """`"128K"` -> 131072, `"1M"` -> 1048576; anything else is handed on for pydantic to judge."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM])\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    return int(float(match[1]) * {"k": 1024, "m": 1024**2}[match[2].lower()])


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]


Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]

T = TypeVar("T")


class OnResume(Enum):
    """What a run that goes on from a checkpoint does about another value of a key. Every key has one of these."""

    REFUSED = "refused"  # it decides what is trained
    BY_CONTENT = "by content"  # what it leads to is compared: the rows, the weights, the engine's settings
    APPLIED = "applied"  # it counts from the step on at which the run goes on; written down in changes.json
    ROUNDING = "rounding"  # another way to the same losses, equal to rounding; written down as well
    FREE = "free"  # it decides nothing that is trained


Refused = Annotated[T, OnResume.REFUSED]
ByContent = Annotated[T, OnResume.BY_CONTENT]
Applied = Annotated[T, OnResume.APPLIED]
Rounding = Annotated[T, OnResume.ROUNDING]
Free = Annotated[T, OnResume.FREE]

DOCUMENTS_PER_ROW = {"sft": 1, "dpo": 2}
"""Documents in one row of each objective: a preference pair is two."""

EACH_KEY_ALONE = "each key alone"
"""Validation context that leaves out the rules across keys; `read` asks `contradictions` for them itself."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `true` for 1."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(part, bool) for part in parts) and not _takes_booleans(annotation):
            raise ValueError("true and false are no numbers")
        return value


def _takes_booleans(annotation: Any) -> bool:
    """Whether they may stand there, or in a section below, which judges them itself."""
    if isinstance(annotation, type) and issubclass(annotation, bool | Section):
        return True
    return any(map(_takes_booleans, get_args(annotation)))


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

    add_tokens: Refused[list[str]] = []
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

    experts: Refused[bool] = False
    """Adapters on the experts of a mixture too, each expert its own of rank `r`; without dropout and DoRA."""

    rslora: Refused[bool] = False
    """Rank-stabilised scale, alpha / sqrt(r)."""

    dora: Refused[bool] = False
    """Weight-decomposed adapters (DoRA)."""

    modules_to_save: Refused[list[str]] = []
    """Whole modules trained and saved beside the adapters, e.g. [embed_tokens, lm_head]."""

    init_from: Refused[str | None] = None
    """Folder of an adapter (PEFT's format, e.g. a run's output_dir) to go on from, on the base it was trained on. The
    other keys have to be those it was made with."""


def is_pattern(path: str) -> bool:
    """Whether a path may stand for several files, as texts_*.jsonl does; a file really called so comes first."""
    return any(mark in path for mark in "*?[")


class SourceConfig(Section):
    """One set of rows. A bare path stands for `{path: ...}`, so that `--data.train a.jsonl,b.jsonl` works, and in YAML
    `train: a.jsonl`.
    """

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    path: ByContent[str] = Field(min_length=1)
    """A file of JSON, JSONL, parquet, Arrow, CSV or text (packed too: .gz, .bz2, .lz4, .zst, .tar), a folder of them, a
    pattern (texts_*.jsonl), a remote path (s3://, gs://, hf://), or a hub id."""

    format: ByContent[
        Literal[
            "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "longalign", "grounded", "preference"
        ]
    ] = "auto"
    """Row layout; `auto` recognises it by the first row's columns. `grounded`: a reference text and a dialogue about
    it."""

    columns: ByContent[dict[str, str]] = {}
    """Their column: the one of a row layout that it stands for, e.g. {frage: question, antwort: answer}."""

    split: ByContent[str] = "train"
    """Split of a hub set or of a folder whose files are named after splits, as a clone of a hub set has them."""

    subset: ByContent[str | None] = None
    """Configuration (subset) of a hub set, or the subfolder of a clone that holds it."""

    revision: ByContent[str | None] = None
    """Branch, tag or commit of a hub set."""

    limit: ByContent[int | None] = Field(default=None, gt=0)
    """Take only the first N rows."""


class DataConfig(Section):
    """What is trained on, and how it is laid into packs."""

    train: ByContent[list[SourceConfig]] = []
    """Training sets, concatenated."""

    eval: Applied[list[SourceConfig]] = []
    """Held-out sets for the evaluation loss. Mutually exclusive with `eval_fraction`."""

    eval_fraction: Refused[float] = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows held out for the evaluation loss, chosen by `seed`."""

    max_length_tokens: Refused[Tokens] = 131072
    """Longest row, or with `objective: dpo` longest prompt with one answer. Longer ones are treated by `overlong`."""

    pack_tokens: Refused[Tokens | None] = None
    """Token budget of one pack. Left out: `max_length_tokens`, with `objective: dpo` twice that (a pair lies in one
    pack). Less makes more and smaller steps of short rows; a row longer than it takes a pack alone."""

    packing: Refused[Literal["best_fit", "sorted", "none"]] = "best_fit"
    """Documents lie head to tail in a pack, isolated from each other. `best_fit`: as few packs as possible. `sorted`:
    rows of like length share packs and steps (LongAlign's sorted batching). `none`: one row per pack."""

    overlong: ByContent[Literal["drop", "truncate", "cut_turns", "error"]] = "drop"
    """`truncate` cuts the middle of the longest untrained turn (the document), never an answer. `cut_turns` keeps the
    turns from the first on that fit, up to a whole answer: for trajectories of agents."""

    thinking: ByContent[Literal["all", "last", "none"]] = "all"
    """Which thoughts of answers are kept and trained (`<think>`, `reasoning_content`, `thinking`). `all`: rows are
    refused whose template leaves one out. `last`: those behind the last question, and of these what the template
    writes. `none`: none."""

    train_turns: ByContent[Literal["all", "last"]] = "all"
    """Which answers of a row are trained."""

    weighting: Refused[Literal["token", "sample", "gain"]] = "token"
    """`token`: each target counts 1. `sample`: each of a row's N targets counts 1/N (LongAlign). `gain`: a target on
    which far context gains g nats counts e^g, up to 5 (LongCE, with weights fixed beforehand): column `token_gains`,
    which `ds-longft data score --tokens` writes. Targets of `eval` sets count 1."""

    chat_template: ByContent[str | None] = None
    """Path of a Jinja chat template, or a shipped one's name (docs/data.md). Left out: the tokenizer's own. It is saved
    with the trained model only where the tokenizer has none."""

    workers: Free[int | None] = Field(default=None, gt=0)
    """Processes that tokenise. Left out: one per core."""

    cache_dir: Free[str] = "~/.cache/ds_longft"
    """Where tokenized sets are kept, by fingerprint."""

    max_bad_fraction: Free[float] = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of the rows is unusable (each is listed in the ledger)."""

    stream_window_mib: Refused[int | None] = Field(default=None, gt=0)
    """Read the training set as a stream: tokenise N MiB of its rows at a time, the next ones while these are
    trained, and keep no more on disk. Rows share packs and steps inside such a window only, and windows follow each
    other in the order of the files; behind the end the set begins again, up to `train.max_steps`. Left out: all of it
    is tokenised before step 1."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value else value

    def budget_tokens(self, documents_per_row: int) -> int:
        """Tokens of a full pack of several rows; a pair is a row of two documents."""
        return self.pack_tokens or documents_per_row * self.max_length_tokens


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


TrackerName = Literal["wandb", "tensorboard", "trackio", "mlflow"]


class LogConfig(Section):
    """Where the records go, beside metrics.jsonl."""

    trackers: Free[list[TrackerName]] = []
    """Trackers that get every record too, e.g. [wandb, tensorboard]. All but wandb are extras:
    pip install -e .[tensorboard]."""

    wandb: Free[Literal["off", "offline", "online"]] = "off"
    """How wandb records, and short for naming it in `trackers`, which alone means online. The run id is kept on
    resume."""

    project: Free[str | None] = None
    """Project (of MLflow: experiment) that the run is filed under. Left out: the environment's WANDB_PROJECT, else
    ds_longft."""

    name: Free[str | None] = None
    """Name of the run in trackers. Left out: the name of `output_dir`."""

    @property
    def tracker_names(self) -> list[str]:
        """Trackers that are asked for, each once."""
        return list(dict.fromkeys([*self.trackers, *(["wandb"] if self.wandb != "off" else [])]))


class HubConfig(Section):
    """Upload of the result to a model hub, by huggingface_hub and its login (`hf auth login` or HF_TOKEN)."""

    repo: Free[str | None] = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    """Repository, e.g. me/mine: gets the result at the end of the run. Made at the start where it is not there."""

    push_every_save: Free[bool] = False
    """The adapter of every checkpoint too, in the background. A failed upload is said and ends nothing."""

    private: Free[bool] = True
    """Whether a repository that is made is private."""


class RunConfig(Section):
    """One run. Precedence: defaults < YAML file (`mine.yaml`) < command line (`--a.b value`)."""

    ds_config: ByContent[str] = "ds_configs/zero3_sp.json"
    """DeepSpeed JSON; values of "auto" are filled from this config."""

    output_dir: Free[str] = "runs/default"
    """Adapter or model, checkpoints, metrics and the resolved config go here."""

    sp: Rounding[Positive | Literal["auto"]] = "auto"
    """GPUs that share one sample. `auto`: the JSON's `sequence_parallel_size`, else all ranks of a node."""

    seed: Refused[int] = Field(default=0, ge=0, lt=2**32)
    """Data order, adapter initialisation, dropout."""

    objective: Refused[Literal["sft", "dpo"]] = "sft"
    """`sft`: supervised fine-tuning on answers or text. `dpo`: preference pairs, see `dpo`."""

    model: ModelConfig = ModelConfig()
    lora: Refused[LoraConfig | None] = LoraConfig()
    """null trains every weight."""
    data: DataConfig = DataConfig()
    dpo: DpoConfig = DpoConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> RunConfig:
        problems = [] if info.context == EACH_KEY_ALONE else contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def documents_per_row(self) -> int:
        """A pair is two documents of one pack."""
        return DOCUMENTS_PER_ROW[self.objective]

    @property
    def budget_tokens(self) -> int:
        """Tokens of a full pack of several rows."""
        return self.data.budget_tokens(self.documents_per_row)

    @property
    def longest_pack_tokens(self) -> int:
        """The most tokens a pack can have: full, or the longest row alone."""
        return max(self.budget_tokens, self.documents_per_row * self.data.max_length_tokens)
