"""What becomes of a key of another trainer whose meaning changes on the way. Names alone: `config/other_trainers`.

Each function takes the keys of a kind, and says whether the key was one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from ds_longft.config.optimizers import KINDS
from ds_longft.config.other_trainers import EXPLANATIONS, KEYS_OF_OTHER_TOOLS
from ds_longft.config.run_config import TrackerName
from ds_longft.config.yaml_io import load_yaml

CHANGES, BY_HAND, NOT_NEEDED = "changes what is trained", "set by hand", "not needed here"

EIGHT_BIT = {"adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw8bit"}
SCHEDULES = {"cosine", "linear", "constant"}
UNUSUAL = {  # keys whose usual value holds here anyway
    "train_on_inputs": "questions are never trained",
    "train_on_prompt": "questions are never trained",
    "trust_remote_code": "set model.trust_remote_code and model.revision where the model needs code of its own",
    "push_to_hub": "set hub.repo for the same",
    "mask_history": "set data.train_turns: last for the same",
    "load_best_model_at_end": "the last step's weights are written; checkpoints of the others are kept",
}
USUAL_OF_SOURCES: dict[str, tuple[Any, ...]] = {  # keys of Axolotl's sections, and values that hold here anyway
    "type": ("chat_template", "sharegpt", "alpaca", "completion", "chat_template.default"),
    "ds_type": ("json", "parquet", "arrow", "text"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn", "all"),
    "field_messages": ("messages", "conversations"),
}
SIZES_OF_GROUPS = {"parallelism_config", *(f"parallelism_config_{name}_size" for name in ("sp", "cp", "tp"))}
SOURCE_KEYS = {"split": "split", "name": "subset", "revision": "revision", "shards_limit": "limit"}


@dataclass
class Migration:
    """Another trainer's keys, the keys of ours that come out, and what could not be carried over."""

    theirs: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=lambda: {CHANGES: [], BY_HAND: [], NOT_NEEDED: []})

    def note(self, key: str, why: str, weight: str = CHANGES) -> None:
        """Say that a key was not carried over, or what became of it."""
        self.notes[weight].append(f"{key}: {why}")

    @property
    def ends_at_steps(self) -> bool:
        """Whether the file counts steps: then it overrides its epochs."""
        steps = self.theirs.get("max_steps")
        return isinstance(steps, int) and steps > 0


def of_data(key: str, value: Any, made: Migration) -> bool:
    """Sets, their shares, packing, templates."""
    match key:
        case "datasets" | "dataset" | "dataset_name" | "train_file" | "train_data":
            made.keys["data.train"] = _sources(key, value, made)
        case "test_datasets" | "eval_dataset" | "val_dataset" | "eval_file" | "validation_file":
            made.keys["data.eval"] = _sources(key, value, made)
        case "dataset_train_split":  # stands in data.train
            pass
        case "dataset_test_split":
            if value != "test":
                made.note(key, f"give the rows to evaluate as data.eval: [{{path: ..., split: {value}}}]", BY_HAND)
        case "val_set_size" | "val_size" | "split_dataset_ratio":
            if isinstance(value, float) and 0 < value < 1:
                made.keys["data.eval_fraction"] = value
            elif value:
                made.note(key, f"{value} rows: data.eval_fraction takes a share of the rows", BY_HAND)
        case "group_by_length":
            made.keys["data.packing"] = "sorted" if value else "best_fit"
        case "sample_packing" | "packing" | "neat_packing":
            made.keys["data.packing"] = "best_fit" if value else "none"
        case "packing_strategy":
            if value != "bfd":  # best_fit
                made.note(
                    key, f"{value} is not there: documents stay whole in data.packing: best_fit, see data.overlong"
                )
        case "template" | "chat_template" | "chat_template_path":
            own = "the tokenizer's own template is used; set data.chat_template to a Jinja file for another"
            made.note(key, f"{value}: {own}")
        case _ if key in UNUSUAL:
            if value:
                made.note(key, f"{value} is not there: {UNUSUAL[key]}")
        case _:
            return False
    return True


def _sources(key: str, value: Any, made: Migration) -> list[dict[str, Any]]:
    """Axolotl's list of sections, LLaMA-Factory's names, swift's ids with `#rows`, TRL's one name."""
    theirs = made.theirs
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    split = theirs.get("dataset_config") or theirs.get("subset")
    sources: list[dict[str, Any]] = []
    for given in names if isinstance(names, list) else [names]:
        section = dict(given) if isinstance(given, dict) else {"path": str(given)}
        path, mark, rows = str(section.pop("path", "")).partition("#")
        source: dict[str, Any] = {"path": path}
        if mark and rows.isdigit():
            source["limit"] = int(rows)
        source |= {ours: section.pop(k) for k, ours in SOURCE_KEYS.items() if section.get(k) is not None}
        for left, seen in section.items():
            if seen not in USUAL_OF_SOURCES.get(left, ()):
                made.note(f"{key}[].{left}", f"{seen!r} is not carried over: `format` and the columns decide")
        source |= {"subset": split} if split else {}
        if key == "dataset_name" and theirs.get("dataset_train_split", "train") != "train":
            source["split"] = theirs["dataset_train_split"]
        sources.append(source)
    if theirs.get("dataset_dir") or "finetuning_type" in theirs:
        files = "LLaMA-Factory's names stand for files in dataset_info.json: put their paths in their place"
        made.note(key, files, BY_HAND)
    return sources


def of_model(key: str, value: Any, made: Migration) -> bool:
    """Where the model lies, its type and RoPE, adapters."""
    match key:
        case "model":
            made.keys["model.path"] = value
        case "torch_dtype" | "dtype":
            names = {"bfloat16": "bf16", "float32": "fp32"}
            made.keys["model.dtype"] = names.get(str(value).removeprefix("torch."), "auto")
        case "load_in_4bit" | "load_in_8bit" | "quantization_bit" | "quant_bits":  # QLoRA's nf4, or eight bits
            bits = (4 if "4" in key else 8) if value is True else value
            if bits in (4, 8):
                made.keys["model.quantize"] = "nf4" if bits == 4 else "int8"
            elif value:
                made.note(key, f"{value} is not there: see model.quantize")
        case "use_liger_kernel":
            made.keys["model.liger"] = "auto" if value else "off"
        case "rope_scaling":
            kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else str(value)
            if kind not in ("linear", "dynamic", "yarn", "llama3"):
                made.note(key, f"{value!r} is not carried over: see model.rope")
                return True
            made.keys["model.rope.type"] = kind
            if isinstance(value, dict) and value.get("factor"):
                made.keys["model.rope.factor"] = value["factor"]
        case "lora_target" | "lora_target_modules" | "target_modules":
            modules = [n.strip() for n in value.split(",")] if isinstance(value, str) else list(value)
            made.keys["lora.targets"] = "all-linear" if modules in (["all"], ["all-linear"]) else modules
        case "adapter" | "finetuning_type" | "train_type" | "tuner_type":
            if str(value).lower() == "qlora":
                made.keys.setdefault("model.quantize", "nf4")
            elif str(value).lower() not in ("lora", "full", "none"):
                made.note(key, f"{value} is not there: LoRA in its place")
        case _:
            return False
    return True


def of_optimizer(key: str, value: Any, made: Migration) -> bool:
    """The optimizer and its schedule."""
    name = str(value).lower()
    match key:
        case "optimizer" | "optim":  # all others are AdamW: fused, torch, 4 bit are ways to compute it
            made.keys["optim.type"] = "adamw_8bit" if name in EIGHT_BIT else "sgd" if name == "sgd" else "adamw"
            plain = name.removesuffix("_adamw")
            if plain in KINDS and plain not in ("adamw_8bit", "sgd"):
                made.note(key, f"AdamW in place of {value}: optim.type {plain} needs other keys too (docs/config.md)")
            elif "adam" not in plain and plain != "sgd":
                made.note(key, f"{value} is not there: AdamW in its place")
        case "lr_scheduler" | "lr_scheduler_type":
            plain = name.removesuffix("_with_warmup").removesuffix("_with_min_lr")
            made.keys["optim.schedule"] = plain if plain in SCHEDULES else "cosine"
            if plain not in SCHEDULES:
                made.note(key, f"{value} is not there: cosine in its place")
        case "warmup_ratio" | "warmup_steps":
            is_share = isinstance(value, float) and value < 1
            made.keys["optim.warmup_ratio" if is_share else f"optim.{key}"] = value
        case "adam_beta1" | "adam_beta2":
            made.keys["optim.betas"] = [made.theirs.get("adam_beta1", 0.9), made.theirs.get("adam_beta2", 0.999)]
        case _:
            return False
    return True


def of_length(key: str, value: Any, made: Migration) -> bool:
    """How long it trains, on what, and when it saves."""
    match key:
        case "num_epochs" | "num_train_epochs":
            if not made.ends_at_steps:
                made.keys["train.epochs"] = float(value)
        case "save_steps" | "eval_steps" | "max_steps":
            if isinstance(value, int) and value > 0:
                made.keys[KEYS_OF_OTHER_TOOLS.get(key, f"train.{key}")] = value
            elif value != -1:
                made.note(key, f"{value} is not carried over: steps are counted, not parts of a run", BY_HAND)
            if key == "max_steps" and made.ends_at_steps:  # rows are taken again until then; here both are limits
                made.keys["train.epochs"] = value
                ends = f"it alone ends the run there: train.epochs is {value} too, as each epoch has a step or more"
                made.note(key, ends)
        case "saves_per_epoch" | "evals_per_epoch":
            default = "at the end only" if key == "saves_per_epoch" else "before the first step and at the end"
            ours = f"train.{key.removesuffix('s_per_epoch')}_every_steps"
            made.note(key, f"{value} is not carried over: set {ours}; without it {default}", BY_HAND)
        case "micro_batch_size" | "per_device_train_batch_size":
            if value != 1:
                made.note(key, f"{value} rows are not carried over: {EXPLANATIONS['batch_size']}")
        case "deepspeed" | "deepspeed_config":
            stage = next((s for s in "3210" if f"z{s}" in str(value) or f"zero{s}" in str(value)), "3")
            made.keys["ds_config"] = f"ds_configs/zero{'3' if stage == '3' else '2'}_sp.json"
            nearest = "the shipped JSON nearest to it in its place; offload is chosen by another of ds_configs/"
            made.note(key, f"{value}: {nearest}", BY_HAND)
        case _ if key in SIZES_OF_GROUPS:
            _parallelism(key, value, made)
        case _:
            return False
    return True


def _parallelism(key: str, value: Any, made: Migration) -> None:
    """TRL's and Accelerate's parallelism_config, a dict or the JSON of one, or a key of it behind its name."""
    if isinstance(value, str) and key == "parallelism_config":
        value = load_yaml(value)
    sizes = value if isinstance(value, dict) else {key.removeprefix("parallelism_config_"): value}
    for name, size in sizes.items():
        if name in ("sp_size", "cp_size"):
            if str(size) != "1":  # one of them may be written out beside the other
                made.keys["sp"] = size
            made.keys.setdefault("sp", size)
        elif name == "tp_size" and str(size) != "1":
            made.note(key, f"tp_size {size} is not carried over: sp shares a sample, ZeRO the weights")


def of_objective(key: str, value: Any, made: Migration) -> bool:
    """What is trained for: SFT, or preferences with a loss and a reference."""
    match key:
        case "stage" | "rl" | "rlhf_type":
            name = str(value).lower()
            if name in ("sft", "pt", "dpo", "simpo", "ipo"):
                made.keys["objective"] = "sft" if name in ("sft", "pt") else "dpo"
            else:
                made.note(key, f"{value} is not there: possible are sft and dpo")
            if name in ("simpo", "ipo"):
                made.keys["dpo.loss"] = name
        case "loss_type":  # TRL's, of preferences in a list too; SFTTrainer's nll is what sft is here
            names = value if isinstance(value, list) else [value]
            if len(names) == 1 and names[0] not in ("nll", "chunked_nll", "dft"):
                made.keys["dpo.loss"] = names[0]
            elif names not in (["nll"], ["chunked_nll"]):
                made.note(key, f"{', '.join(map(str, names))} is not carried over: one loss is taken, see dpo.loss")
        case "precompute_ref_log_probs":
            if value:
                made.keys["dpo.reference"] = "precomputed"
                made.note(key, "dpo.reference: precomputed; `ds-longft data ref_logps` makes them before the run")
        case "ref_model" | "ref_model_name_or_path":
            if value != made.theirs.get("model_name_or_path"):
                made.note(key, f"{value} is not carried over: the reference is model.path as it was before the run")
        case _:
            return False
    return True


def of_trackers(key: str, value: Any, made: Migration) -> bool:
    """Who is told how it goes."""
    match key:
        case "report_to":
            names = value if isinstance(value, list) else [value]
            if "wandb" in names:
                made.keys["log.wandb"] = "online"
            known = [name for name in names if name in get_args(TrackerName) and name != "wandb"]
            if known:
                made.keys["log.trackers"] = known
            others = [str(name) for name in names if name not in (*known, "wandb", "none", "all")]
            if others:
                made.note(key, f"{', '.join(others)}: log.trackers takes {', '.join(get_args(TrackerName))}", BY_HAND)
        case "wandb_project":
            made.keys |= {"log.project": value, "log.wandb": "online"}
        case "wandb_entity":
            made.note(key, f"set WANDB_ENTITY={value} in the environment, which wandb reads", BY_HAND)
        case _:
            return False
    return True


KINDS_OF_KEYS = (of_data, of_model, of_optimizer, of_length, of_objective, of_trackers)
