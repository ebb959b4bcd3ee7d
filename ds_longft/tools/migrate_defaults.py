"""What another trainer takes where its key is left out, and differs here. `migrate` writes it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_longft.config.run_config import LoraConfig, RunConfig


@dataclass(frozen=True)
class Default:
    """Key of ours, the other trainer's value for it, and the keys by which it would be given there."""

    ours: str
    value: Any
    theirs: tuple[str, ...]

    @property
    def here(self) -> Any:
        """Our own default."""
        section, _, key = self.ours.rpartition(".")
        place: Any = LoraConfig() if section == "lora" else RunConfig()
        for name in () if section in ("", "lora") else section.split("."):
            place = getattr(place, name)
        value = getattr(place, key)
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
MARKS = {  # keys that only this trainer has
    "Axolotl": ("base_model", "sequence_len", "adapter"),
    "LLaMA-Factory": ("finetuning_type", "stage", "cutoff_len", "quantization_bit"),
    "ms-swift": ("model", "tuner_type", "train_type", "rlhf_type", "quant_bits"),
}


LORA_KEYS = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}


def trainer_of(theirs: dict[str, Any]) -> str:
    """Whose file it is."""
    return next((name for name, marks in MARKS.items() if set(marks) & set(theirs)), "TRL")


def meant_by_absence(theirs: dict[str, Any], *, lora: bool, pairs: bool) -> list[tuple[str, str]]:
    """(key left out of a file of TRL, what it does without and this does not). TRL 1.16, PEFT 0.21."""
    if trainer_of(theirs) != "TRL" or "model_name_or_path" not in theirs:
        return []
    said = []
    if not lora and LORA_KEYS & set(theirs):
        said.append(
            ("use_peft", "not asked for: TRL then trains every weight, whatever lora_r is, and so does this config")
        )
    if lora and not theirs.get("lora_target_modules"):
        said.append(
            (
                "lora_target_modules",
                "left out: of most models PEFT adapts q_proj and v_proj, this every linear; "
                "lora.targets: [q_proj, v_proj] for the same",
            )
        )
    if not pairs and not theirs.get("assistant_only_loss"):
        said.append(
            (
                "assistant_only_loss",
                "not asked for: TRL then trains every token of `messages` rows, this the answers alone",
            )
        )
    return said


def left_out(theirs: dict[str, Any], ours: dict[str, Any], lora: bool) -> tuple[str, list[Default]]:
    """(Name of the trainer, its defaults that hold in a file `theirs`, of which the dotted keys `ours` were made)."""
    trainer = trainer_of(theirs)
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
