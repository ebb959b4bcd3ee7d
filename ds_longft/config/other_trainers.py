"""Which key was meant: near misses, and what other trainers call our keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Our keys, and how other trainers spell them or what asks for the same.
_THEIRS = {
    "sp": "sequence_parallel_degree sequence_parallel_size context_parallel_size sp_size cp_size ulysses_size",
    "data.max_length_tokens": (
        "cutoff_len max_seq_length max_seq_len seq_length seq_len sequence_len max_length model_max_length block_size"
    ),
    "model.path": "model_name_or_path model_name base_model model_path pretrained_model",
    "data.train": "dataset datasets train_file dataset_name data_path train_data",
    "data.eval": "eval_file val_data eval_dataset validation_file",
    "data.eval_fraction": "val_set_size val_size eval_split",
    "lora.r": "lora_r lora_rank rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target lora_target_modules target_modules",
    "lora.rslora": "use_rslora lora_use_rslora",
    "lora.dora": "use_dora lora_use_dora peft_use_dora",
    "lora.modules_to_save": "additional_target lora_modules_to_save",
    "optim.learning_rate": "lr",
    "optim.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "optim.type": "optimizer",
    "optim.max_grad_norm": "gradient_clipping max_norm clip_grad_norm grad_clip",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.eps": "adam_epsilon adam_eps",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.gradient_accumulation_steps": "grad_accum accumulate_grad_batches gas",
    "train.save_every_steps": "save_steps save_interval",
    "train.eval_every_steps": "eval_steps eval_interval",
    "train.keep_checkpoints": "save_total_limit",
    "train.recompute": "gradient_checkpointing activation_checkpointing",
    "train.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "data.packing": "sample_packing neat_packing group_by_length sort_by_length",
    "data.stream_window_mib": "streaming pretraining_dataset",
    "data.workers": "preprocessing_num_workers dataset_num_proc num_proc",
    "model.kernel": "attn_implementation flash_attention flash_attn",
    "model.dtype": "bf16 torch_dtype precision",
    "model.quantize": "load_in_4bit load_in_8bit quantization_bit quant_bits",
    "model.rope.type": "rope_scaling rope_type",
    "model.rope.theta": "rope_theta",
    "log.project": "wandb_project",
    "log.name": "wandb_name run_name wandb_run_id",
    "log.trackers": "report_to log_with tracker",
    "log.wandb": "use_wandb",
    "hub.repo": "hub_model_id push_to_hub_model_id",
    "ds_config": "deepspeed deepspeed_config",
    "objective": "rl stage rlhf_type trainer_type",
    "dpo.beta": "pref_beta dpo_beta rl_beta",
    "dpo.loss": "loss_type pref_loss dpo_loss",
    "dpo.label_smoothing": "dpo_label_smoothing cdpo_label_smoothing",
    "dpo.rpo_alpha": "pref_ftx dpo_ftx rpo_alpha",
    "dpo.reference": "ref_model ref_model_name_or_path precompute_ref_log_probs",
}
KEYS_OF_OTHER_TOOLS = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}
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
    close = _close(word, known, cutoff)
    return f": did you mean {close}?" if close else ""


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


def _close(word: str, known: Iterable[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def _spelled_elsewhere(leaf: str, known: list[str]) -> str | None:
    """Another trainer's name, or our own name put into the wrong section, or a near miss of one."""
    if leaf in KEYS_OF_OTHER_TOOLS:
        return KEYS_OF_OTHER_TOOLS[leaf]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = _close(leaf, by_leaf, 0.8)
    return by_leaf[close] if close else None
