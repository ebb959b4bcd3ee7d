"""What another trainer takes where its key is left out, and differs here. `migrate` writes it out."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ds_longft.config.other_trainers import trainer_of
from ds_longft.config.run_config import RunConfig


@dataclass(frozen=True)
class Default:
    """Key of ours, the other trainer's value for it, and the keys by which it would be given there."""

    ours: str
    value: Any
    theirs: tuple[str, ...]

    @property
    def here(self) -> Any:
        """Our own default."""
        value = attrgetter(self.ours)(RunConfig())
        return list(value) if isinstance(value, tuple) else value


END = Default("optim.min_lr_ratio", 0.0, ("lr_scheduler_kwargs", "cosine_min_lr_ratio"))
BETAS = Default("optim.betas", [0.9, 0.999], ("adam_beta1", "adam_beta2"))
SEED = Default("seed", 42, ("seed",))
EPOCHS = Default("train.epochs", 3.0, ("num_train_epochs",))
TRANSFORMERS = (  # TrainingArguments of 5.24
    SEED, EPOCHS, BETAS, END,
    Default("optim.schedule", "linear", ("lr_scheduler_type",)),
    Default("optim.warmup_ratio", 0.0, ("warmup_ratio", "warmup_steps")),
    Default("train.save_every_steps", 500, ("save_steps", "save_strategy")),
)  # fmt: skip
CUT = Default("data.overlong", "truncate", ())
TRL = (  # SFTConfig, DPOConfig and ModelConfig of 1.16
    *TRANSFORMERS, CUT,
    Default("optim.learning_rate", 2e-5, ("learning_rate",)),
    Default("data.max_length_tokens", 1024, ("max_length", "max_seq_length")),
    Default("lora.dropout", 0.05, ("lora_dropout",)),
)  # fmt: skip
TRL_DPO = tuple(
    Default("optim.learning_rate", 1e-6, d.theirs) if d.ours == "optim.learning_rate" else d
    for d in TRL
    if d.ours != "lora.dropout"  # DPOTrainer switches dropout off
)
LLAMA_FACTORY = (
    *TRANSFORMERS, CUT,
    Default("optim.learning_rate", 5e-5, ("learning_rate",)),
    Default("data.max_length_tokens", 2048, ("cutoff_len",)),
    Default("lora.r", 8, ("lora_rank",)),
)  # fmt: skip
# What `args.to_dict()` writes where nothing was asked for.
ASKS_NOTHING: dict[str, Any] = {
    "average_tokens_across_devices": True, "dataloader_in_order": True, "dataset_text_field": "text", "debug": [],
    "eval_delay": 0, "eval_do_concat_batches": True, "hub_strategy": "every_save", "hub_token": "<HUB_TOKEN>",
    "include_for_metrics": [], "label_smoothing_factor": 0.0, "length_column_name": "length", "log_level": "passive",
    "log_level_replica": "warning", "log_on_each_node": True, "logging_nan_inf_filter": True,
    "logging_strategy": "steps", "skip_memory_metrics": True, "train_sampling_strategy": "random",
    "truncation_mode": "keep_start", "eos_token": "<EOS_TOKEN>", "pad_token": "<PAD_TOKEN>", "project": "huggingface",
    "activation_checkpointing": True,
}  # fmt: skip
LORA_KEYS = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
ABSENT = {  # keys left out of a file of TRL, and what it then does and this does not. TRL 1.16, PEFT 0.21
    "use_peft": "not asked for: TRL then trains every weight, whatever lora_r is, and so does this config",
    "lora_target_modules": "left out: of most models PEFT adapts q_proj and v_proj, this every linear; "
    "lora.targets: [q_proj, v_proj] for the same",
    "assistant_only_loss": "not asked for: TRL then trains every token of `messages` rows, this the answers alone",
}


def meant_by_absence(theirs: dict[str, Any], *, lora: bool, pairs: bool) -> list[tuple[str, str]]:
    """(key, words) of those keys of `ABSENT` that the file `theirs` leaves out, and that would matter to it."""
    if trainer_of(theirs)[0] != "TRL" or "model_name_or_path" not in theirs:
        return []
    matters = {
        "use_peft": not lora and bool(LORA_KEYS & set(theirs)),
        "lora_target_modules": lora and not theirs.get("lora_target_modules"),
        "assistant_only_loss": not pairs and not theirs.get("assistant_only_loss"),
    }
    return [(key, why) for key, why in ABSENT.items() if matters[key]]


def left_out(theirs: dict[str, Any], ours: dict[str, Any], lora: bool) -> tuple[str, list[Default]]:
    """(Name of the trainer, its defaults that hold in a file `theirs`, of which the dotted keys `ours` were made)."""
    trainer, _ = trainer_of(theirs)
    known = {
        "TRL": TRL_DPO if ours.get("objective") == "dpo" else TRL,
        "LLaMA-Factory": LLAMA_FACTORY,
        "Axolotl": (BETAS, END),
        "ms-swift": (SEED, EPOCHS, END),
    }[trainer]
    constant = ours.get("optim.schedule") == "constant"
    return trainer, [
        default
        for default in known
        if default.ours not in ours
        and all(theirs.get(key) in (None, "", {}) for key in default.theirs)
        and (lora or not default.ours.startswith("lora."))
        and not (constant and default is END)
    ]
