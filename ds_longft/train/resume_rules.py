"""What a checkpoint may be continued with: every key, by the class that its declaration has in `config`.

Nothing is listed here by name but what a key leads to: the type that `auto` became, the packs of a step, the rows, the
weights. Two spellings of the same run are the same run, and a key nobody thought of is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from ds_longft import __version__
from ds_longft.config.messages import keys_on_resume
from ds_longft.config.run_config import RunConfig
from ds_longft.config.section import OnResume
from ds_longft.errors import CheckpointError
from ds_longft.layout import ParallelLayout
from ds_longft.run_files import StateOfAnyVersion
from ds_longft.stored import Unreadable, read_file, read_if_good

STATE_FORMAT = 2
"""Raised when older states say too little to be continued exactly. Format 1 named the data by files and their times,
not by the rows: whether the rows are still the same cannot be told from it.
"""
SOFTWARE = "transformers_version"
UNKNOWN = "unknown to this version"
STAGE = "zero_optimization.stage in ds_config"
CHANGES = "changes.json"
OF_THE_SOFTWARE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Keys of a model's config that do not decide what it computes, or are compared elsewhere."""


@dataclass(frozen=True)
class TrainState:
    """Where the run stands after `step` optimizer steps, and what it may be continued with."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # read back by `stored`; a key more is a newer version's

    step: int
    epoch: int
    step_in_epoch: int  # of the next step
    tokens_seen: int
    total_steps: int
    world: int
    rows: str  # names the training rows by their tokens, targets, weights and order
    order: str  # of the rows and everything that decides their order
    trained: str  # of the trainable parameters' names and shapes
    decides: dict[str, Any]  # key -> value, of keys that a run is not continued without
    may_change: dict[str, Any]  # key -> value, of keys that may be others from here on
    model: dict[str, Any]  # the base model's config, as far as it decides what is computed
    changes: list[dict[str, Any]] = field(default_factory=list)  # of `may_change` so far: step, key, was, now
    tracker_id: str | None = None
    eval_due: bool = False  # stopped before the evaluation that belongs to `step`
    base: str = ""  # of the weights before training; "" where they are out of reach
    format: int = STATE_FORMAT
    written_by: str = __version__  # of ds_longft


class OtherVersion(Unreadable):
    """A state that is whole, and says less or more than this version compares."""


def read_state(path: Path) -> TrainState:
    """The state of a checkpoint. Raises Unreadable, or OtherVersion, which names the version as far as it is known."""
    try:
        return read_file(path, TrainState)
    except Unreadable as damage:
        found = read_if_good(path, StateOfAnyVersion)
        if found is None:
            raise
        if found.fingerprint is not None and found.rows is None:
            raise OtherVersion(
                f"it was written by an earlier version of ds_longft (state format 1, this is {STATE_FORMAT}), which "
                "noted where the data lay and not which rows they were: whether it would go on exactly cannot be told"
            ) from None
        if found.written_by not in (None, __version__) or (found.format or 0) > STATE_FORMAT:
            raise OtherVersion(
                f"it was written by ds_longft {found.written_by} (state format {found.format}), this is {__version__} "
                f"(state format {STATE_FORMAT}); {damage}"
            ) from None
        raise


def what_decides(config: RunConfig, engine_config: dict[str, Any], layout: ParallelLayout) -> dict[str, Any]:
    """Key -> what its value leads to, for every key that a checkpoint is not continued without."""
    values = keys_on_resume(config, {OnResume.REFUSED})
    if not config.pairs:
        values = {key: value for key, value in values.items() if not key.startswith("dpo.")}
    # Two ways to say the same are one: what counts is what came of the key.
    packs = values.pop("train.gradient_accumulation_steps")
    optimizer = engine_config.get("optimizer", {}).get("type", config.optim.type)
    return values | {
        "lora": "null" if config.lora is None else "given",
        "model.dtype": "bf16" if engine_config.get("bf16", {}).get("enabled") else "fp32",
        "data.pack_tokens": config.budget_tokens,
        "dp x train.gradient_accumulation_steps": layout.dp * packs,
        "optim.type": str(optimizer).lower(),
        STAGE: engine_config.get("zero_optimization", {}).get("stage", 0),
    }


def what_may_change(config: RunConfig) -> dict[str, Any]:
    """Key -> value, for every key that may be another one in the next start."""
    return keys_on_resume(config, {OnResume.APPLIED, OnResume.ROUNDING})


def what_the_model_is(hf_config: Any) -> dict[str, Any]:
    """What the model's config adds to its weights: norms, activation, RoPE; only what is not the family's default."""
    own = {key: value for key, value in hf_config.to_diff_dict().items() if key not in OF_THE_SOFTWARE}
    as_read_back: dict[str, Any] = json.loads(json.dumps(own, default=str))  # tuples are lists, keys are text
    return as_read_back


def refuse_another_run(path: Path, saved: TrainState, new: TrainState) -> None:
    """Refuse to continue a run whose data, their order, base model, trained weights or function changed.

    Raises:
        CheckpointError: lists everything that changed, with both values where they are values.
    """
    others = _others(saved.decides, new.decides, _defaults())
    changed = [f"{key} was {_shown(was)} and is {_shown(now)} now" for key, was, now in others]
    chosen_otherwise = any(key.startswith(("seed", "data.")) for key, _, _ in others)
    if saved.rows != new.rows and not chosen_otherwise:
        changed.append(
            "the training rows are others: their tokens, targets, weights or order (data.train, data.overlong, "
            "data.chat_template, the tokenizer of model.path); not where files lie or when they were written"
        )
    if not changed and saved.order != new.order:
        changed.append("the order of the rows, or the packs of a step, would be others in this version of ds_longft")
    if not changed and saved.trained != new.trained:
        changed.append("the trained parameters have other names or shapes (lora.*, model.path)")
    if saved.base and new.base and saved.base != new.base:
        changed.append("model.path leads to other weights than those the run began with")
    if not changed:
        # What is not written down is the family's default, which another version of the software may have moved.
        same_software = SOFTWARE in saved.model and saved.model[SOFTWARE] == new.model.get(SOFTWARE)
        known = set(saved.model | new.model if same_software else saved.model.keys() & new.model.keys()) - {SOFTWARE}
        before, now = ({key: state.model.get(key, "the default") for key in known} for state in (saved, new))
        changed += [
            f"model.path: {key} in config.json was {_shown(was)} and is {_shown(is_now)} now"
            for key, was, is_now in _others(before, now)
        ]
    if changed:
        raise CheckpointError(
            f"{path} cannot be continued exactly: {'; '.join(changed)}. "
            "Undo the change, or give a new output_dir, or set train.resume to never."
        )


def changes_since(saved: TrainState, new: TrainState) -> list[dict[str, Any]]:
    """Earlier changes and those of this start: from which step on each key has another value."""
    others = _others(saved.may_change, new.may_change, _defaults())
    return saved.changes + [{"after_step": saved.step, "key": key, "was": was, "now": now} for key, was, now in others]


def in_words(changes: Iterable[dict[str, Any]]) -> str:
    """Changes in one line."""
    return "; ".join(
        f"{c['key']} was {_shown(c['was'])} up to step {c['after_step']} and is {_shown(c['now'])} from then on"
        for c in changes
    )


def _others(
    before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """(key, before, now) of keys that differ.

    A key that one side lacks was not there in its version, which did what the default does. Keys of a section that one
    side lacks are reported by the section.
    """
    others = [(key, value, now[key]) for key, value in before.items() if key in now and now[key] != value]
    if defaults is None:
        return others
    for key in sorted(before.keys() ^ now.keys()):
        section = key.partition(".")[0] + "."
        if "." in key and not all(any(k.startswith(section) for k in side) for side in (before, now)):
            continue
        if key in before:
            others.append((key, before[key], UNKNOWN))
        elif now[key] != defaults.get(key, UNKNOWN):
            others.append((key, defaults.get(key, UNKNOWN), now[key]))
    return others


def _defaults() -> dict[str, Any]:
    return keys_on_resume(RunConfig(), set(OnResume))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
