"""`RunConfig`: everything a run is made of, typed, frozen, documented where it is declared.

Data only: building it touches no file, no network, no GPU. Sections of their own: `model_keys`, `data_keys`,
`train_keys`. Keys are checked against each other in `rules.py`, against the machine in `preflight.py`; `read.py` reads
YAML and the command line.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from ds_longft.config.data_keys import DataConfig
from ds_longft.config.model_keys import LoraConfig, ModelConfig
from ds_longft.config.rules import contradictions
from ds_longft.config.section import ByContent, Free, Positive, Refused, Rounding, Section
from ds_longft.config.train_keys import DpoConfig, OptimConfig, TrainConfig

EACH_KEY_ALONE = "each key alone"
"""Validation context that leaves out the rules across keys; `read` asks `contradictions` for them itself."""


TrackerName = Literal["wandb", "tensorboard", "trackio", "mlflow"]


class LogConfig(Section):
    """Where the records go, beside metrics.jsonl."""

    trackers: Free[list[TrackerName]] = Field(default=[])
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
    def pairs(self) -> bool:
        """Whether the objective's rows are preference pairs."""
        return self.objective == "dpo"

    @property
    def documents_per_row(self) -> int:
        """A pair is two documents of one pack."""
        return 2 if self.pairs else 1

    @property
    def budget_tokens(self) -> int:
        """Tokens of a full pack of several rows."""
        return self.data.budget_tokens(self.documents_per_row)

    @property
    def longest_pack_tokens(self) -> int:
        """The most tokens a pack can have: full, or the longest row alone."""
        return max(self.budget_tokens, self.documents_per_row * self.data.max_length_tokens)
