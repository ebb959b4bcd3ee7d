"""Rules across keys of a run config: which values go together. Without the machine, the JSON or the model.

Each rule is a text and whether it is broken; the text names every key that the rule reads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_longft.config.run_config import RunConfig
    from ds_longft.config.section import Section

Rules = dict[str, bool]


def contradictions(config: RunConfig) -> list[str]:
    """The text of every broken rule."""
    parts = (_parts_of_run, _base, _objective, _tokens, _stream, _optimizer, _muon, _memory_and_code, unused)
    return [text for part in parts for text, broken in part(config).items() if broken]


def _parts_of_run(config: RunConfig) -> Rules:
    data, hub, lora = config.data, config.hub, config.lora
    both = "lora.dropout" if lora and lora.dropout else "lora.dora"
    return {
        "data.eval and data.eval_fraction are both set: keep one of them": bool(data.eval and data.eval_fraction),
        "hub has keys, but hub.repo is not set: name the repository, e.g. me/mine, or leave them out": (
            hub.repo is None and hub != type(hub)()
        ),
        "hub.push_every_save is true, but lora is null: checkpoints of all weights are the engine's own shards. Leave "
        "it out; hub.repo alone uploads the result": hub.push_every_save and lora is None,
        f"lora.experts is true, and {both} is set: PEFT adapts stacked weights, which have neither dropout in front "
        f"nor DoRA. Leave {both} out, or lora.experts": (
            lora is not None and lora.experts and (lora.dropout > 0 or lora.dora)
        ),
    }


def _base(config: RunConfig) -> Rules:
    """Where frozen weights may not lie."""
    seen, lora = f"model.base is {config.model.base}", config.lora
    moved, streamed = config.model.base not in ("auto", "engine"), config.model.base in ("sharded", "host")
    return {
        f"{seen}, but lora is null: weights that are trained stay with the engine. Leave it out, or set lora": (
            moved and lora is None
        ),
        f"{seen}, and train.recompute is none: the backward pass would read weights that are gone. Take "
        "train.recompute: auto, or model.base: resident": (
            streamed and lora is not None and config.train.recompute == "none"
        ),
        f"{seen}, and lora.dora is true: DoRA reads the weights when adapters are made. Leave lora.dora out, or take "
        "model.base: engine": streamed and lora is not None and lora.dora,
    }


def _tokens(config: RunConfig) -> Rules:
    """Tokens that are added."""
    tokens, lora, untrained = config.model.add_tokens, config.lora, not config.model.train_added
    odd = [token for token in tokens if not token.strip() or tokens.count(token) > 1]
    names = [] if lora is None else [lora.targets] if isinstance(lora.targets, str) else lora.targets
    ends = sorted({"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name in names})
    return {
        "model.train_added is false, but model.add_tokens is empty: leave it out, or name the tokens": (
            untrained and not tokens
        ),
        f"model.add_tokens holds {(odd or [''])[0]!r}, which is blank or there twice: take it out": bool(odd),
        "model.train_added is false, but lora: null trains every row: leave it out, or set lora": (
            bool(tokens) and untrained and lora is None
        ),
        f"lora.targets holds {(ends or [''])[0]}, and model.add_tokens trains rows of its own there: name it in "
        "lora.modules_to_save instead, which trains all rows, or leave it out": bool(tokens and ends),
    }


def _stream(config: RunConfig) -> Rules:
    """Keys that ask for the whole training set, where it is read as a stream."""
    if config.data.stream_window_mib is None:
        return {}
    limited = [source.path for source in config.data.train if source.limit is not None]
    problems = {
        "train.max_steps is missing: nobody counts the steps of a stream ahead": config.train.max_steps is None,
        "train.epochs is given: behind its end a stream begins again, leave it out": config.train.epochs != 1,
        "data.eval_fraction is given: name held-out rows in data.eval": config.data.eval_fraction > 0,
        "objective is dpo: pairs are read whole, leave it out": config.objective != "sft",
        f"data.train[].limit is given ({', '.join(limited)}): leave it out": bool(limited),
    }
    return {f"data.stream_window_mib is given, but {text}": broken for text, broken in problems.items()}


def _objective(config: RunConfig) -> Rules:
    """Keys of `dpo` that contradict each other, or would do nothing."""
    dpo, sources, train, lora = config.dpo, [*config.data.train, *config.data.eval], config.train, config.lora
    usual, dropout = type(dpo)(), lora.dropout if lora else 0.0
    if config.objective == "sft":
        return {
            "dpo has keys, but objective is sft: set objective to dpo": dpo != usual,
            "dpo is written out, but objective is not, and is sft then: add the line `objective: dpo`, or leave dpo "
            "out": dpo == usual and "dpo" in config.model_fields_set and "objective" not in config.model_fields_set,
            "data: a source has format preference, but objective is sft: set objective to dpo": any(
                source.format == "preference" for source in sources
            ),
        }
    return {
        f"data: {source.path} has format {source.format}, but objective is dpo: pairs have format preference": (
            source.format not in ("auto", "preference")
        )
        for source in sources
    } | {
        "train.router_aux_loss or train.router_z_loss is set, but objective is dpo: leave both out": (
            train.router_aux_loss > 0 or train.router_z_loss > 0
        ),
        "data.overlong is cut_turns, but the two answers of a pair end its prompt: set drop or truncate": (
            config.data.overlong == "cut_turns"
        ),
        f"data.weighting is {config.data.weighting}, but with objective dpo each pair counts once: leave it out": (
            config.data.weighting != "token"
        ),
        f"lora.dropout is {dropout:g}, but objective dpo compares log-probabilities of the model with those of its "
        "reference, which dropout would blur: set it to 0": dropout > 0,
        f"dpo.label_smoothing is {dpo.label_smoothing:g}, but dpo.loss ipo has no labels to smooth": (
            dpo.label_smoothing > 0 and dpo.loss == "ipo"
        ),
        f"dpo.simpo_gamma is {dpo.simpo_gamma:g}, but dpo.loss is {dpo.loss}: it is for simpo only": (
            dpo.loss != "simpo" and dpo.simpo_gamma != usual.simpo_gamma
        ),
        f"dpo.reference is {dpo.reference}, but dpo.loss simpo has no reference: leave it out": (
            dpo.loss == "simpo" and dpo.reference != "auto"
        ),
        "lora.init_from is given, but with objective dpo the model without its adapter is the reference, not the one "
        "this run starts from: merge it with `ds-longft export` and give the result as model.path": (
            lora is not None and lora.init_from is not None and dpo.loss != "simpo"
        ),
        "dpo.reference is adapter_off, but lora is null: set it to model or precomputed": (
            dpo.reference == "adapter_off" and lora is None
        ),
        "dpo.reference is model, but lora is on, and the same weights without adapters are the reference: set it to "
        "adapter_off (or auto), which needs no second model": dpo.reference == "model" and lora is not None,
    }


def _optimizer(config: RunConfig) -> Rules:
    """Keys of `optim` that an optimizer does not have."""
    optim, usual = config.optim, type(config.optim)()
    averaged = optim.type == "schedule_free"
    return {
        f"optim.{key} is given, but optim.type is adafactor, which has none: leave it out": (
            optim.type == "adafactor" and getattr(optim, key) != getattr(usual, key)
        )
        for key in ("betas", "eps")
    } | {
        f"optim.schedule is {optim.schedule}, but optim.type is schedule_free, which averages weights instead: set it "
        "to constant (the warmup stays)": averaged and optim.schedule != "constant",
        "optim.betas begins with 0, but optim.type schedule_free divides by it: 0.9 is usual": (
            averaged and optim.betas[0] == 0
        ),
    }


def _muon(config: RunConfig) -> Rules:
    optim, lora, muon = config.optim, config.lora, config.optim.type == "muon"
    beside = lora is None or lora.modules_to_save or config.model.add_tokens
    return {
        "optim.adam_learning_rate is given, but optim.type is not muon: optim.learning_rate is for all weights": (
            not muon and optim.adam_learning_rate is not None
        ),
        f"optim.max_grad_norm is {optim.max_grad_norm or 0:g}, but optim.type is muon, whose updates have one length "
        "whatever the gradient's is, and which DeepSpeed would clip in its place: set it to null": (
            muon and optim.max_grad_norm is not None
        ),
        "optim.adam_learning_rate is missing: optim.type muon trains embeddings, output head and norms with AdamW, "
        "for which Muon's optim.learning_rate is far too high": bool(
            muon and beside and optim.adam_learning_rate is None
        ),
        "train.verify_first reads gradients, which DeepSpeed has replaced by Muon's updates by then: leave it out with "
        "optim.type muon; `ds-longft verify` checks the same": muon and config.train.verify_first,
    }


def _memory_and_code(config: RunConfig) -> Rules:
    model, train = config.model, config.train
    return {
        "train.offload_disk is given, but train.recompute is none, which keeps everything on the GPU: leave one of "
        "them out": train.offload_disk is not None and train.recompute == "none",
        "model.trust_remote_code needs model.revision pinned to a full commit hash (40 hex digits), seen "
        f"{model.revision!r}": model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""),
    }


def unused(config: RunConfig) -> Rules:
    """Keys that would do nothing beside the others: said, and not ignored."""
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
