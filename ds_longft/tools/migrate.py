"""`ds-longft migrate FILE`: a run config of Axolotl, LLaMA-Factory, TRL or ms-swift as one of ours.

Names come from `config/other_trainers.py`, which also answers near misses. What changes its meaning on the way is
worked out here, and every key that is not carried over is listed with the reason: nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ds_longft.config.messages import all_keys, validation_problems
from ds_longft.config.optimizers import KINDS
from ds_longft.config.other_trainers import EXPLANATIONS, HOLDS_ANYWAY, KEYS_OF_OTHER_TOOLS
from ds_longft.config.read import read_config_file
from ds_longft.config.rules import contradictions
from ds_longft.config.run_config import EACH_KEY_ALONE, RunConfig, TrackerName
from ds_longft.config.unused import unused
from ds_longft.config.yaml_io import dump_yaml, load_yaml
from ds_longft.errors import ConfigError
from ds_longft.tools.migrate_defaults import ASKS_NOTHING, left_out, meant_by_absence, trainer_of

OPTIMIZERS = {  # all others are AdamW: fused, torch, 4 bit are ways to compute it
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw8bit"), "adamw_8bit"),
    "sgd": "sgd",
}
LEFT_OUT = "Left out by you; differs here"
SCHEDULES = {"cosine", "linear", "constant"}

CHANGES, BY_HAND, NOT_NEEDED = "changes what is trained", "set by hand", "not needed here"
KERNELS = ("liger_", "heads_k_stride", "ring_attn_func", "cut_cross_entropy", "unsloth_")


class Migration:
    """The keys of ours that come out, and what could not be carried over."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.notes: dict[str, list[str]] = {CHANGES: [], BY_HAND: [], NOT_NEEDED: []}

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key of ours."""
        self.keys[key] = value

    def note(self, key: str, why: str, weight: str = CHANGES) -> None:
        """Say that a key was not carried over, or what became of it."""
        self.notes[weight].append(f"{key}: {why}")


def migrate(file: str, out: str | None = None) -> None:
    """Print a run config made of another trainer's YAML, and what of it could not be carried over.

    Args:
        file: YAML of Axolotl, LLaMA-Factory, TRL or ms-swift.
        out: write the config to this file instead of printing it.
    """
    text, notes = migrated(Path(file).expanduser())
    if out is None:
        print(text + "".join(f"# {line}\n" for line in _by_weight(notes)), end="")
        return
    if Path(out).exists():
        raise ConfigError(f"--out {out} exists already: give a new file, or remove it first")
    Path(out).write_text(text, encoding="utf-8")
    print("".join(line for line in text.splitlines(keepends=True) if line.startswith("# ")), end="")
    print(f"{out} written; `ds-longft check {out}` checks it" + "".join(f"\n{line}" for line in _by_weight(notes)))


def _by_weight(notes: dict[str, list[str]]) -> list[str]:
    """What changes the result first."""
    return [line for weight, of in notes.items() if of for line in (f"{weight}:", *(f"  - {note}" for note in of))]


def migrated(file: Path) -> tuple[str, dict[str, list[str]]]:
    """YAML of our run config, and by weight a line for each key not carried over as it is. Raises ConfigError."""
    if file.suffix == ".py":
        raise ConfigError(
            f"{file} is a Python script: print its config with `print(yaml.safe_dump(training_args.to_dict()))`, put "
            "model_name_or_path and dataset_name into it, and give that file"
        )
    theirs = read_config_file(file)
    ours = {key.partition(".")[0] for key in all_keys(RunConfig)}
    if not set(theirs) - ours or isinstance(theirs.get("model"), dict):
        raise ConfigError(
            f"{file} holds no key of another trainer: expected YAML of Axolotl, LLaMA-Factory, TRL, swift"
        )
    made = Migration()
    for key, value in theirs.items():
        if value is not None and value != "":
            _carry(key, value, theirs, made)
    _infer_objective(theirs, made)
    lora = _uses_lora(theirs)
    for key, why in meant_by_absence(theirs, lora=lora, pairs=made.keys.get("objective") == "dpo"):
        made.note(key, why)
    trainer, defaults = left_out(theirs, made.keys, lora)
    for default in defaults:
        made.put(default.ours, default.value)
    made.keys.setdefault("output_dir", f"runs/{file.stem}")  # two migrated configs would share the default's
    if not lora:
        made.put("lora", None)
        for key in [key for key in made.keys if key.startswith("lora.")]:
            made.keys.pop(key)
            made.note(key, "left out, as every weight is trained", NOT_NEEDED)
    if theirs.get("finetuning_type") == "lora" and "lora.r" in made.keys:
        made.keys.setdefault("lora.alpha", 2 * made.keys["lora.r"])  # LLaMA-Factory's default
    tree = _nested(made.keys)
    try:
        run = RunConfig.model_validate(tree, context=EACH_KEY_ALONE)
        made.notes[BY_HAND] += contradictions(run)
        for text, is_so in unused(run).items():  # what would do nothing is left out
            if is_so:
                made.keys.pop(text.partition(" ")[0])
        tree = _nested(made.keys)
    except ValidationError as error:  # what is wrong is named, not written: the config can be used as it is
        for key, problem in validation_problems(error, tree).items():
            made.notes[BY_HAND].append(problem)
            made.keys = {k: v for k, v in made.keys.items() if k != key and not key.startswith((f"{k}.", f"{k}["))}
        tree = _nested(made.keys)
    said = [f"#   {d.ours}: {d.value} (here {d.here})\n" for d in defaults if d.ours in made.keys]
    head = f"# {LEFT_OUT}, so written out as {trainer} has it:\n" if said else ""
    return dump_yaml(tree) + head + "".join(said), made.notes


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, leaf = key.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[leaf] = value
    return tree


def _carry(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if key in ASKS_NOTHING and value == ASKS_NOTHING[key]:
        return
    if key in SPECIAL:
        SPECIAL[key](key, value, theirs, made)
    elif key in ("output_dir", "seed"):
        made.put(key, value)
    elif key in HOLDS_ANYWAY:
        return
    elif key in EXPLANATIONS:
        if value is not False and str(value) != "1":
            made.note(key, f"{str(value)[:60]} is not carried over: {EXPLANATIONS[key]}")
    elif (ours := KEYS_OF_OTHER_TOOLS.get(key)) is not None or (ours := _own_name(key)) is not None:
        made.put(ours, value)
    elif key.startswith(KERNELS) or (
        key == "plugins" and all("liger" in str(p) or "cut_cross" in str(p) for p in value)
    ):
        made.note(key, "its own kernels; nothing to set", NOT_NEEDED)
    elif value is not False:
        made.note(key, f"{str(value)[:60]!r} has nothing like it here")


def _own_name(key: str) -> str | None:
    """Our key that is called the same, e.g. learning_rate."""
    named = [ours for ours in all_keys(RunConfig) if ours.rpartition(".")[2] == key]
    return named[0] if len(named) == 1 else None


def _uses_lora(theirs: dict[str, Any]) -> bool:
    kinds = [theirs.get(key) for key in ("adapter", "finetuning_type", "train_type", "tuner_type")]
    named = next((str(kind).lower() for kind in kinds if kind), None)
    if named is not None:
        return named in ("lora", "qlora")
    if trainer_of(theirs) == "TRL" and "model_name_or_path" in theirs:
        return bool(theirs.get("use_peft"))
    return bool(theirs.get("use_peft")) or any(key in theirs for key in ("lora_r", "lora_rank"))


def _sources(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """Axolotl's list of sections, LLaMA-Factory's names, swift's ids with `#rows`, TRL's one name."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    sources: list[dict[str, Any]] = []
    for given in names if isinstance(names, list) else [names]:
        section = dict(given) if isinstance(given, dict) else {"path": str(given)}
        path = str(section.pop("path", ""))
        path, mark, rows = path.partition("#")
        source: dict[str, Any] = {"path": path}
        if mark and rows.isdigit():
            source["limit"] = int(rows)
        source |= {ours: section.pop(k) for k, ours in SOURCE_KEYS.items() if section.get(k) is not None}
        for left, seen in section.items():
            if seen not in USUAL_OF_SOURCES.get(left, (seen,)) or left not in USUAL_OF_SOURCES:
                made.note(f"{key}[].{left}", f"{seen!r} is not carried over: `format` and the columns decide")
        sources.append(source)
    if theirs.get("dataset_dir") or "finetuning_type" in theirs:
        made.note(
            key, "LLaMA-Factory's names stand for files in dataset_info.json: put their paths in their place", BY_HAND
        )
    split = theirs.get("dataset_config") or theirs.get("subset")
    named = [source | ({"subset": split} if split else {}) for source in sources]
    if key == "dataset_name" and theirs.get("dataset_train_split", "train") != "train":
        named = [source | {"split": theirs["dataset_train_split"]} for source in named]
    made.put("data.eval" if key in EVAL_SOURCES else "data.train", named)


# Keys of Axolotl's sections, and the values with which they ask for what is done here anyway.
USUAL_OF_SOURCES: dict[str, tuple[Any, ...]] = {
    "type": ("chat_template", "sharegpt", "alpaca", "completion", "chat_template.default"),
    "ds_type": ("json", "parquet", "arrow", "text"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn", "all"),
    "field_messages": ("messages", "conversations"),
}
SOURCE_KEYS = {"split": "split", "name": "subset", "revision": "revision", "shards_limit": "limit"}
EVAL_SOURCES = ("test_datasets", "eval_dataset", "val_dataset", "eval_file", "validation_file")


def _split(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """TRL's two: that of training stands in data.train (`_sources`)."""
    if key == "dataset_test_split" and value != "test":
        made.note(key, f"give the rows to evaluate as data.eval: [{{path: ..., split: {value}}}]", BY_HAND)


def _optimizer(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.put("optim.type", OPTIMIZERS.get(str(value).lower(), "adamw"))
    name = str(value).lower().removesuffix("_adamw")
    if name in KINDS and name not in OPTIMIZERS.values():
        made.note(key, f"AdamW in place of {value}: optim.type {name} needs other keys too (docs/config.md)")
    elif "adam" not in name and name != "sgd":
        made.note(key, f"{value} is not there: AdamW in its place")


def _schedule(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    name = str(value).lower().removesuffix("_with_warmup").removesuffix("_with_min_lr")
    made.put("optim.schedule", name if name in SCHEDULES else "cosine")
    if name not in SCHEDULES:
        made.note(key, f"{value} is not there: cosine in its place")


def _batch(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if value != 1:
        made.note(key, f"{value} rows are not carried over: {EXPLANATIONS['batch_size']}")


def _deepspeed(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    stage = next((s for s in ("3", "2", "1", "0") if f"z{s}" in str(value) or f"zero{s}" in str(value)), "3")
    made.put("ds_config", f"ds_configs/zero{'3' if stage == '3' else '2'}_sp.json")
    made.note(
        key,
        f"{value}: the shipped JSON nearest to it in its place; offload is chosen by another of ds_configs/",
        BY_HAND,
    )


def _epochs(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if not _ends_at_steps(theirs):
        made.put("train.epochs", float(value))


def _ends_at_steps(theirs: dict[str, Any]) -> bool:
    return isinstance(theirs.get("max_steps"), int) and theirs["max_steps"] > 0


def _steps(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if isinstance(value, int) and value > 0:
        made.put(KEYS_OF_OTHER_TOOLS.get(key, f"train.{key}"), value)
    elif value != -1:
        made.note(key, f"{value} is not carried over: steps are counted, not parts of a run", BY_HAND)


def _warmup(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.put("optim.warmup_ratio" if isinstance(value, float) and value < 1 else f"optim.{key}", value)


def _targets(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    names = [n.strip() for n in value.split(",")] if isinstance(value, str) else list(value)
    made.put("lora.targets", "all-linear" if names in (["all"], ["all-linear"]) else names)


def _template(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.note(key, f"{value}: the tokenizer's own template is used; set data.chat_template to a Jinja file for another")


def _objective(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    name = {"pt": "sft", "simpo": "dpo", "ipo": "dpo"}.get(str(value).lower(), str(value).lower())
    if name in ("sft", "dpo"):
        made.put("objective", name)
    else:
        made.note(key, f"{value} is not there: possible are sft and dpo")
    if str(value).lower() in ("simpo", "ipo"):
        made.put("dpo.loss", str(value).lower())


def _infer_objective(theirs: dict[str, Any], made: Migration) -> None:
    """TRL names the method by its command alone: a file for `trl dpo` is known by its keys."""
    dpo = [key for key in made.keys if key.startswith("dpo.")]
    other = next((name for key, name in METHODS_OF_TRL.items() if key in theirs), None)
    if other is not None:
        made.note("objective", f"{other} is not there: possible are sft and dpo")
    elif (asks := [*dpo, *sorted(KEYS_OF_DPO & set(theirs))]) and "objective" not in made.keys:
        made.put("objective", "dpo")
        made.note("objective", f"dpo, as {', '.join(asks)} ask for it: for supervised fine-tuning leave these out")
    if made.keys.get("objective") != "dpo":
        for key in dpo:
            made.note(key, f"{made.keys.pop(key)} left out: it is for objective dpo only")


KEYS_OF_DPO = {"ref_model", "ref_model_name_or_path", "precompute_ref_log_probs", "precompute_ref_batch_size"}
# Keys that only these trainers of TRL have, beside a beta and a loss_type as in DPO.
METHODS_OF_TRL = {"num_generations": "GRPO", "desirable_weight": "KTO"}


def _share(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if isinstance(value, float) and 0 < value < 1:
        made.put("data.eval_fraction", value)
    elif value:
        made.note(key, f"{value} rows: data.eval_fraction takes a share of the rows", BY_HAND)


def _wandb(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    names = value if isinstance(value, list) else [value]
    if "wandb" in names:
        made.put("log.wandb", "online")
    known = [name for name in names if name in get_args(TrackerName) and name != "wandb"]
    if known:
        made.put("log.trackers", known)
    others = [str(name) for name in names if name not in (*known, "wandb", "none", "all")]
    if others:
        made.note(key, f"{', '.join(others)}: log.trackers takes {', '.join(get_args(TrackerName))}", BY_HAND)


def _tuner(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if str(value).lower() == "qlora":
        made.keys.setdefault("model.quantize", "nf4")
    elif str(value).lower() not in ("lora", "full", "none"):
        made.note(key, f"{value} is not there: LoRA in its place")


def _bits(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """`load_in_4bit: true`, `quantization_bit: 4`: QLoRA's nf4, or eight bits."""
    bits = (4 if "4" in key else 8) if value is True else value
    if bits in (4, 8):
        made.put("model.quantize", "nf4" if bits == 4 else "int8")
    elif value:
        made.note(key, f"{value} is not there: see model.quantize")


def _average(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    default = "at the end only" if key == "saves_per_epoch" else "before the first step and at the end"
    ours = f"train.{key.removesuffix('s_per_epoch')}_every_steps"
    made.note(key, f"{value} is not carried over: set {ours}; without it {default}", BY_HAND)


def _entity(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.note(key, f"set WANDB_ENTITY={value} in the environment, which wandb reads", BY_HAND)


def _rope(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    kind = value.get("rope_type", value.get("type")) if isinstance(value, dict) else str(value)
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        made.put("model.rope.type", kind)
        if isinstance(value, dict) and value.get("factor"):
            made.put("model.rope.factor", value["factor"])
    else:
        made.note(key, f"{value!r} is not carried over: see model.rope")


def _packing(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    sorted_ = "length" in key and value
    made.put("data.packing", "sorted" if sorted_ else "best_fit" if value or "length" in key else "none")


def _flag(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """Keys whose usual value holds here anyway."""
    if value:
        made.note(key, f"{value} is not there: {UNUSUAL[key]}")


UNUSUAL = {
    "train_on_inputs": "questions are never trained",
    "train_on_prompt": "questions are never trained",
    "trust_remote_code": "set model.trust_remote_code and model.revision where the model needs code of its own",
    "push_to_hub": "set hub.repo for the same",
    "mask_history": "set data.train_turns: last for the same",
    "load_best_model_at_end": "the last step's weights are written; checkpoints of the others are kept",
}


def _dtype(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    names = {"bfloat16": "bf16", "float32": "fp32", "auto": "auto"}
    made.put("model.dtype", names.get(str(value).removeprefix("torch."), "auto"))


def _wandb_project(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.put("log.project", value)
    made.put("log.wandb", "online")


def _model(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.put("model.path", value)


def _loss_type(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """TRL's, of preferences in a list too; SFTTrainer's nll is what sft is here."""
    names = value if isinstance(value, list) else [value]
    if names in (["nll"], ["chunked_nll"]):
        return
    if len(names) == 1 and names[0] != "dft":
        made.put("dpo.loss", names[0])
    else:
        made.note(key, f"{', '.join(map(str, names))} is not carried over: one loss is taken, see dpo.loss")


def _parallelism(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """TRL's and Accelerate's parallelism_config, a dict or the JSON of one, or a key of it behind its name."""
    if isinstance(value, str) and key == "parallelism_config":
        value = load_yaml(value)
    sizes = value if isinstance(value, dict) else {key.removeprefix("parallelism_config_"): value}
    for name, size in sizes.items():
        if name in ("sp_size", "cp_size"):
            if str(size) != "1":  # one of them may be written out beside the other
                made.put("sp", size)
            made.keys.setdefault("sp", size)
        elif name == "tp_size" and str(size) != "1":
            made.note(key, f"tp_size {size} is not carried over: sp shares a sample, ZeRO the weights")


def _reference(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    if key == "precompute_ref_log_probs":
        if value:
            made.put("dpo.reference", "precomputed")
            made.note(key, "dpo.reference: precomputed; `ds-longft data ref_logps` makes them before the run")
    elif value != theirs.get("model_name_or_path"):
        made.note(key, f"{value} is not carried over: the reference is model.path as it was before the run")


def _liger(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.put("model.liger", "auto" if value else "off")


def _strategy(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """`bfd` is best_fit."""
    if value != "bfd":
        made.note(key, f"{value} is not there: documents stay whole in data.packing: best_fit, see data.overlong")


def _max_steps(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    """There it overrides the epochs: rows are taken again until it is reached. Here both are limits."""
    _steps(key, value, theirs, made)
    if _ends_at_steps(theirs):
        made.put("train.epochs", value)
        made.note(key, f"it alone ends the run there: train.epochs is {value} too, as each epoch has a step or more")


def _betas(key: str, value: Any, theirs: dict[str, Any], made: Migration) -> None:
    made.put("optim.betas", [theirs.get("adam_beta1", 0.9), theirs.get("adam_beta2", 0.999)])


SPECIAL: dict[str, Callable[[str, Any, dict[str, Any], Migration], None]] = {
    **dict.fromkeys(["datasets", "dataset", "dataset_name", "train_file", "train_data", *EVAL_SOURCES], _sources),
    **dict.fromkeys(["dataset_train_split", "dataset_test_split"], _split),
    **dict.fromkeys(["optimizer", "optim"], _optimizer),
    **dict.fromkeys(["lr_scheduler", "lr_scheduler_type"], _schedule),
    **dict.fromkeys(["micro_batch_size", "per_device_train_batch_size"], _batch),
    **dict.fromkeys(["deepspeed", "deepspeed_config"], _deepspeed),
    **dict.fromkeys(["num_epochs", "num_train_epochs"], _epochs),
    **dict.fromkeys(["save_steps", "eval_steps"], _steps),
    **dict.fromkeys(["warmup_ratio", "warmup_steps"], _warmup),
    **dict.fromkeys(["lora_target", "lora_target_modules", "target_modules"], _targets),
    **dict.fromkeys(["template", "chat_template", "chat_template_path"], _template),
    **dict.fromkeys(["stage", "rl", "rlhf_type"], _objective),
    **dict.fromkeys(["val_set_size", "val_size", "split_dataset_ratio"], _share),
    **dict.fromkeys(["report_to"], _wandb),
    **dict.fromkeys(["adapter", "finetuning_type", "train_type", "tuner_type"], _tuner),
    **dict.fromkeys(["load_in_4bit", "load_in_8bit", "quantization_bit", "quant_bits"], _bits),
    **dict.fromkeys(["saves_per_epoch", "evals_per_epoch"], _average),
    **dict.fromkeys(["rope_scaling"], _rope),
    **dict.fromkeys(["adam_beta1", "adam_beta2"], _betas),
    **dict.fromkeys(["sample_packing", "packing", "neat_packing", "group_by_length"], _packing),
    **dict.fromkeys(UNUSUAL, _flag),
    **dict.fromkeys(["torch_dtype", "dtype"], _dtype),
    "wandb_project": _wandb_project,
    "loss_type": _loss_type,
    "max_steps": _max_steps,
    "use_liger_kernel": _liger,
    "packing_strategy": _strategy,
    **dict.fromkeys(
        ["parallelism_config", *(f"parallelism_config_{n}_size" for n in ("sp", "cp", "tp"))], _parallelism
    ),
    **dict.fromkeys(["ref_model", "ref_model_name_or_path", "precompute_ref_log_probs"], _reference),
    "wandb_entity": _entity,
    "model": _model,
}
