"""Keys of a run config that would do nothing beside the others: said, and not ignored. As in `rules.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_longft.config.run_config import RunConfig
    from ds_longft.config.section import Section


def unused(config: RunConfig) -> dict[str, bool]:
    """Text -> whether the key with which it begins does nothing."""
    data, train, log, optim = config.data, config.train, config.log, config.optim
    no_rows = bool(data.train) and not (data.eval or data.eval_fraction)
    trackers = {
        f"log.{key} is {getattr(log, key)}, but there is no tracker that would show it: set log.trackers: [wandb], or "
        "leave it out": not log.tracker_names and _given(log, key)
        for key in ("project", "name")
    }
    return trackers | {
        f"train.eval_every_steps is {train.eval_every_steps}, but there are no rows to evaluate: name a file in "
        "data.eval, or hold some out with data.eval_fraction: 0.05; or leave it out": (
            no_rows and _given(train, "eval_every_steps")
        ),
        f"train.recompute_every is {train.recompute_every}, but train.recompute is {train.recompute}: it is for "
        "every_k only": train.recompute != "every_k" and _given(train, "recompute_every"),
        f"train.offload_host_gib is {train.offload_host_gib:g}, but train.recompute is none, which keeps everything on "
        "the GPU: leave one of them out": train.recompute == "none" and _given(train, "offload_host_gib"),
        f"train.max_skipped_in_a_row is {train.max_skipped_in_a_row}, but train.on_nonfinite is stop, which skips "
        "none: set it to skip, or leave it out": (
            train.on_nonfinite == "stop" and _given(train, "max_skipped_in_a_row")
        ),
        f"data.pack_tokens is {data.pack_tokens}, but data.packing is none: each row is a pack. Leave it out": (
            data.packing == "none" and _given(data, "pack_tokens")
        ),
        f"optim.min_lr_ratio is {optim.min_lr_ratio:g}, but optim.schedule is constant, which does not fall: leave it "
        "out": optim.schedule == "constant" and _given(optim, "min_lr_ratio"),
    }


def _given(section: Section, key: str) -> bool:
    """Whether the key has another value than its default."""
    return bool(getattr(section, key) != type(section).model_fields[key].default)
