"""Which key was meant: near misses, and what other trainers call our keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# How other trainers spell our keys, or what we do instead of what the key asks for.
KEYS_OF_OTHER_TOOLS = {
    **dict.fromkeys(
        [
            "sequence_parallel_degree",
            "sequence_parallel_size",
            "context_parallel_size",
            "sp_size",
            "cp_size",
            "ulysses_size",
        ],
        "sp",
    ),
    **dict.fromkeys(
        ["cutoff_len", "max_seq_length", "max_seq_len", "seq_length", "seq_len", "sequence_len", "max_length"],
        "data.max_length_tokens",
    ),
    **dict.fromkeys(["model_max_length", "block_size"], "data.max_length_tokens"),
    **dict.fromkeys(["model_name_or_path", "model_name", "base_model", "model_path", "pretrained_model"], "model.path"),
    **dict.fromkeys(["dataset", "datasets", "train_file", "dataset_name", "data_path", "train_data"], "data.train"),
    **dict.fromkeys(["eval_file", "val_data", "eval_dataset", "validation_file"], "data.eval"),
    **dict.fromkeys(["val_set_size", "val_size", "eval_split"], "data.eval_fraction"),
    **dict.fromkeys(["lora_r", "lora_rank", "rank"], "lora.r"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    **dict.fromkeys(["lora_target", "lora_target_modules", "target_modules"], "lora.targets"),
    **dict.fromkeys(["use_rslora", "lora_use_rslora"], "lora.rslora"),
    **dict.fromkeys(["use_dora", "lora_use_dora", "peft_use_dora"], "lora.dora"),
    **dict.fromkeys(["additional_target", "lora_modules_to_save"], "lora.modules_to_save"),
    "lr": "optim.learning_rate",
    **dict.fromkeys(["lr_scheduler_type", "lr_scheduler", "scheduler"], "optim.schedule"),
    "optimizer": "optim.type",
    **dict.fromkeys(["gradient_clipping", "max_norm", "clip_grad_norm", "grad_clip"], "optim.max_grad_norm"),
    **dict.fromkeys(["adam_beta1", "adam_beta2"], "optim.betas"),
    **dict.fromkeys(["adam_epsilon", "adam_eps"], "optim.eps"),
    **dict.fromkeys(["num_train_epochs", "num_epochs", "n_epochs"], "train.epochs"),
    **dict.fromkeys(["grad_accum", "accumulate_grad_batches", "gas"], "train.gradient_accumulation_steps"),
    **dict.fromkeys(["save_steps", "save_interval"], "train.save_every_steps"),
    **dict.fromkeys(["eval_steps", "eval_interval"], "train.eval_every_steps"),
    "save_total_limit": "train.keep_checkpoints",
    **dict.fromkeys(["gradient_checkpointing", "activation_checkpointing"], "train.recompute"),
    **dict.fromkeys(["resume_from_checkpoint", "auto_resume_from_checkpoints"], "train.resume"),
    **dict.fromkeys(["sample_packing", "neat_packing", "group_by_length", "sort_by_length"], "data.packing"),
    **dict.fromkeys(["streaming", "pretraining_dataset"], "data.stream_window_mib"),
    **dict.fromkeys(["preprocessing_num_workers", "dataset_num_proc", "num_proc"], "data.workers"),
    **dict.fromkeys(["attn_implementation", "flash_attention", "flash_attn"], "model.kernel"),
    **dict.fromkeys(["bf16", "torch_dtype", "precision"], "model.dtype"),
    **dict.fromkeys(["load_in_4bit", "load_in_8bit", "quantization_bit", "quant_bits"], "model.quantize"),
    **dict.fromkeys(["rope_scaling", "rope_type"], "model.rope.type"),
    **dict.fromkeys(["rope_theta"], "model.rope.theta"),
    **dict.fromkeys(["wandb_project"], "log.project"),
    **dict.fromkeys(["wandb_name", "run_name", "wandb_run_id"], "log.name"),
    **dict.fromkeys(["report_to", "log_with", "tracker"], "log.trackers"),
    **dict.fromkeys(["use_wandb"], "log.wandb"),
    **dict.fromkeys(["hub_model_id", "push_to_hub_model_id"], "hub.repo"),
    **dict.fromkeys(["deepspeed", "deepspeed_config"], "ds_config"),
    **dict.fromkeys(["rl", "stage", "rlhf_type", "trainer_type"], "objective"),
    **dict.fromkeys(["pref_beta", "dpo_beta", "rl_beta"], "dpo.beta"),
    **dict.fromkeys(["loss_type", "pref_loss", "dpo_loss"], "dpo.loss"),
    **dict.fromkeys(["dpo_label_smoothing", "cdpo_label_smoothing"], "dpo.label_smoothing"),
    **dict.fromkeys(["pref_ftx", "dpo_ftx", "rpo_alpha"], "dpo.rpo_alpha"),
    **dict.fromkeys(["ref_model", "ref_model_name_or_path", "precompute_ref_log_probs"], "dpo.reference"),
}
EXPLANATIONS = {
    **dict.fromkeys(
        ["per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu", "batch_size"],
        "a micro batch is always one pack; set its size with data.pack_tokens and the packs per optimizer step with "
        "train.gradient_accumulation_steps",
    ),
    "fp16": "weights are bf16 or fp32, see model.dtype; in fewer bits see model.quantize",
    **dict.fromkeys(
        ["special_tokens", "pad_token", "eos_token"],
        "nothing is padded, and the chat template ends an answer; new tokens stand in model.add_tokens",
    ),
    "push_to_hub": "hub.repo names the repository, and asks for the upload",
    **dict.fromkeys(
        ["early_stopping_patience", "early_stopping", "load_best_model_at_end", "metric_for_best_model"],
        "no evaluation ends a run or chooses its weights; train.eval_every_steps evaluates, train.keep_checkpoints "
        "says among how many checkpoints you can choose",
    ),
    **dict.fromkeys(
        ["use_lora", "adapter", "finetuning_type"], "`lora: null` trains every weight, a lora section adapters"
    ),
}

# Keys that change nothing about what is trained, or that hold here anyway.
HOLDS_ANYWAY = {
    "do_train", "do_eval", "overwrite_output_dir", "overwrite_cache", "plot_loss", "logging_steps", "logging_dir",
    "logging_first_step", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory", "remove_unused_columns",
    "disable_tqdm", "dataset_prepared_path", "include_num_input_tokens_seen", "strict", "save_strategy",
    "eval_strategy", "evaluation_strategy", "save_safetensors", "bf16", "tf32", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "flash_attention", "flash_attn", "attn_implementation", "sample_packing_eff_est",
    "pad_to_sequence_len", "eval_sample_packing", "per_device_eval_batch_size", "eval_batch_size", "save_only_model",
    "wandb_watch", "wandb_log_model", "completion_only_loss", "assistant_only_loss", "use_peft", "lora_target_linear",
    "model_type", "tokenizer_type", "dataset_dir", "dataset_config", "subset", "xformers_attention", "local_rank",
}  # fmt: skip

MARKS = {  # keys that one trainer alone has
    "Axolotl": {
        "base_model", "sequence_len", "num_epochs", "adapter", "val_set_size", "micro_batch_size", "saves_per_epoch",
        "evals_per_epoch", "sequence_parallel_degree", "dataset_prepared_path",
    },
    "LLaMA-Factory": {
        "finetuning_type", "cutoff_len", "stage", "pref_beta", "pref_loss", "lora_target", "quantization_bit",
    },
    "ms-swift": {
        "model", "tuner_type", "train_type", "rlhf_type", "quant_bits", "split_dataset_ratio", "tuner_backend",
    },
    "TRL": {
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft",
        "assistant_only_loss", "completion_only_loss", "packing_strategy", "precompute_ref_log_probs",
    },
}  # fmt: skip


def trainer_of(keys: Iterable[str]) -> tuple[str, int]:
    """Whose keys these at the top of a file are, and how many show it; TRL's, which has fewest, where none does."""
    given = set(keys)
    found = {trainer: len(given & marks) for trainer, marks in MARKS.items()}
    whose = max(found, key=found.__getitem__)
    return whose if found[whose] else "TRL", found[whose]


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`: did you mean X?` for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f": did you mean {close[0]}?" if close else ""


def unknown_key(key: str, known: list[str]) -> str:
    """The problem text for a dotted key that is not among the known ones, naming the one most likely meant."""
    if explanation := EXPLANATIONS.get(_leaf(key)):
        return f"unknown key {key}: {explanation}"
    if _leaf(key) == "overwrite_output_dir":
        return f"unknown key {key}: train.resume: never starts anew in a folder that holds a run"
    if _leaf(key) in HOLDS_ANYWAY:
        return f"unknown key {key}: leave it out, it has nothing to set here (`ds-longft migrate` reads a whole config)"
    if key in known:
        return f"unknown key {key!r}: in YAML nest it, `{key.partition('.')[0]}:` and the rest indented below"
    meant = meant_key(key, known)
    return f"unknown key {key}: did you mean {meant}?" if meant else f"unknown key {key}: --help lists every key"


def meant_key(key: str, known: list[str]) -> str | None:
    """The known key most likely meant by this one."""
    plain = key.lower().replace("-", "_")
    return _close(plain, known, 0.85) or _spelled_elsewhere(_leaf(key), known) or _close(plain, known, 0.6)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2].lower().replace("-", "_")


def _close(word: str, known: list[str], cutoff: float) -> str | None:
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return close[0] if close else None


def _spelled_elsewhere(leaf: str, known: list[str]) -> str | None:
    """Another trainer's name, or our own name put into the wrong section, or a near miss of one."""
    if leaf in KEYS_OF_OTHER_TOOLS:
        return KEYS_OF_OTHER_TOOLS[leaf]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.8)
    return by_leaf[close[0]] if close else None
