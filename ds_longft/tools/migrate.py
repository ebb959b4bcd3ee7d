"""`ds-longft migrate FILE`: a run config of Axolotl, LLaMA-Factory, TRL or ms-swift as one of ours.

Every key that is not carried over is listed with the reason: nothing is left out in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_longft.config.messages import all_keys, validation_problems
from ds_longft.config.other_trainers import EXPLANATIONS, HOLDS_ANYWAY, KEYS_OF_OTHER_TOOLS, trainer_of
from ds_longft.config.read import read_config_file
from ds_longft.config.rules import contradictions, unused
from ds_longft.config.run_config import EACH_KEY_ALONE, RunConfig
from ds_longft.config.yaml_io import dump_yaml
from ds_longft.errors import ConfigError
from ds_longft.tools.migrate_defaults import ASKS_NOTHING, left_out, meant_by_absence
from ds_longft.tools.migrate_keys import BY_HAND, KINDS_OF_KEYS, NOT_NEEDED, Migration

KERNELS = ("liger_", "heads_k_stride", "ring_attn_func", "cut_cross_entropy", "unsloth_")
KEYS_OF_DPO = {"ref_model", "ref_model_name_or_path", "precompute_ref_log_probs", "precompute_ref_batch_size"}
METHODS_OF_TRL = {"num_generations": "GRPO", "desirable_weight": "KTO"}
"""Keys that only these trainers of TRL have, beside a beta and a loss_type as in DPO."""


def migrate(file: str, out: str | None = None) -> None:
    """Print a run config made of another trainer's YAML, and what of it could not be carried over.

    Args:
        file: YAML of Axolotl, LLaMA-Factory, TRL or ms-swift.
        out: write the config to this file instead of printing it.
    """
    text, notes = migrated(Path(file).expanduser())
    by_weight = [line for weight, of in notes.items() if of for line in (f"{weight}:", *(f"  - {n}" for n in of))]
    if out is None:
        print(text + "".join(f"# {line}\n" for line in by_weight), end="")
        return
    if Path(out).exists():
        raise ConfigError(f"--out {out} exists already: give a new file, or remove it first")
    Path(out).write_text(text, encoding="utf-8")
    print("".join(line for line in text.splitlines(keepends=True) if line.startswith("# ")), end="")
    print("\n".join([f"{out} written; `ds-longft check {out}` checks it", *by_weight]))


def migrated(file: Path) -> tuple[str, dict[str, list[str]]]:
    """YAML of our run config, and by weight a line for each key not carried over as it is. Raises ConfigError."""
    made = Migration(_read(file))
    for key, value in made.theirs.items():
        if value is not None and value != "":
            _carry(key, value, made)
    _infer_objective(made)
    lora = _uses_lora(made.theirs)
    for key, why in meant_by_absence(made.theirs, lora=lora, pairs=made.keys.get("objective") == "dpo"):
        made.note(key, why)
    trainer, defaults = left_out(made.theirs, made.keys, lora)
    made.keys |= {default.ours: default.value for default in defaults}
    made.keys.setdefault("output_dir", f"runs/{file.stem}")  # two migrated configs would share the default's
    if not lora:
        made.keys["lora"] = None
        for key in [key for key in made.keys if key.startswith("lora.")]:
            del made.keys[key]
            made.note(key, "left out, as every weight is trained", NOT_NEEDED)
    if made.theirs.get("finetuning_type") == "lora" and "lora.r" in made.keys:
        made.keys.setdefault("lora.alpha", 2 * made.keys["lora.r"])  # LLaMA-Factory's default
    _leave_out_what_is_refused(made)
    said = [f"#   {d.ours}: {d.value} (here {d.here})\n" for d in defaults if d.ours in made.keys]
    head = f"# Left out by you; differs here, so written out as {trainer} has it:\n" if said else ""
    return dump_yaml(_nested(made.keys)) + head + "".join(said), made.notes


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".py":
        raise ConfigError(
            f"{file} is a Python script: print its config with `print(yaml.safe_dump(training_args.to_dict()))`, put "
            "model_name_or_path and dataset_name into it, and give that file"
        )
    theirs = read_config_file(file)
    if set(theirs) <= set(RunConfig.model_fields) or isinstance(theirs.get("model"), dict):
        raise ConfigError(
            f"{file} holds no key of another trainer: expected YAML of Axolotl, LLaMA-Factory, TRL, swift"
        )
    return theirs


def _leave_out_what_is_refused(made: Migration) -> None:
    """What is wrong, or would do nothing, is named, not written: the config can be used as it is."""
    tree = _nested(made.keys)
    try:
        run = RunConfig.model_validate(tree, context=EACH_KEY_ALONE)
    except ValidationError as error:
        for key, problem in validation_problems(error, tree).items():
            made.notes[BY_HAND].append(problem)
            made.keys = {k: v for k, v in made.keys.items() if k != key and not key.startswith((f"{k}.", f"{k}["))}
        return
    made.notes[BY_HAND] += contradictions(run)
    for text, is_so in unused(run).items():
        if is_so:
            del made.keys[text.partition(" ")[0]]


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


def _carry(key: str, value: Any, made: Migration) -> None:
    if key in ASKS_NOTHING and value == ASKS_NOTHING[key]:
        return
    if any(of_a_kind(key, value, made) for of_a_kind in KINDS_OF_KEYS) or key in HOLDS_ANYWAY:
        return
    if key in EXPLANATIONS:
        if value is not False and str(value) != "1":
            made.note(key, f"{str(value)[:60]} is not carried over: {EXPLANATIONS[key]}")
    elif ours := KEYS_OF_OTHER_TOOLS.get(key) or _own_name(key):
        made.keys[ours] = value
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
    only_if_asked = trainer_of(theirs)[0] == "TRL" and "model_name_or_path" in theirs
    return bool(theirs.get("use_peft")) or (not only_if_asked and ("lora_r" in theirs or "lora_rank" in theirs))


def _infer_objective(made: Migration) -> None:
    """TRL names the method by its command alone: a file for `trl dpo` is known by its keys."""
    dpo = [key for key in made.keys if key.startswith("dpo.")]
    asks = [*dpo, *sorted(KEYS_OF_DPO & set(made.theirs))]
    other = next((name for key, name in METHODS_OF_TRL.items() if key in made.theirs), None)
    if other is not None:
        made.note("objective", f"{other} is not there: possible are sft and dpo")
    elif asks and "objective" not in made.keys:
        made.keys["objective"] = "dpo"
        made.note("objective", f"dpo, as {', '.join(asks)} ask for it: for supervised fine-tuning leave these out")
    if made.keys.get("objective") != "dpo":
        for key in dpo:
            made.note(key, f"{made.keys.pop(key)} left out: it is for objective dpo only")
