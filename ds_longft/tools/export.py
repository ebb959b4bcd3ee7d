"""`ds-longft export RUN OUT`: a run's result as an ordinary Hugging Face folder, checked by loading it again.

A LoRA run's adapter is merged into its base model, a full run's weights are copied. The folder appears under its name
only when it is complete and checked. One model is in memory at a time, on the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import json as json_format
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers import PreTrainedModel as Model
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from ds_longft.config.read import config_of_run
from ds_longft.config.run_config import ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.elsewhere import spell_for_older_readers
from ds_longft.model.load_packed import base_format, load_packed, round_as_packed, stored_as
from ds_longft.model.lora import BASE_CONFIG_FOLDER, WEIGHTS_NAME, load_adapter
from ds_longft.model.new_tokens import narrowed
from ds_longft.model.packed import Format
from ds_longft.model.rope import check_rope
from ds_longft.model.rope_formulas import rope_parts
from ds_longft.model.stops import serve_stop, stop_ids
from ds_longft.model.wrapped import copy_preparation, whole_class
from ds_longft.train.card import copy_card
from ds_longft.train.durable import as_readable_as_the_folder
from ds_longft.train.hub import OF_MODEL

PROMPT = "The capital of France is"
NO_CODE = {"trust_remote_code": False}  # said, or transformers asks at the terminal
MAX_LOGIT_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Relative to the largest logit: merging rounds each weight once to its type."""

PREDICTION_HEADS = "mtp."
"""What names of multi-token-prediction heads begin with (Qwen3-Next, Qwen3.5, OLMo-Hybrid)."""

Into = Literal["trained", "original"]


def export(run: str, out: str, base: str | None = None, json: bool = False, into: Into = "trained") -> None:
    """Turn a run's output folder into a model folder that any Hugging Face tool loads.

    Beside a merged adapter, the base's multi-token-prediction heads stay as they are.
    The adapter of a quantised base is merged into that base, made dense.

    Args:
        run: The run's output folder: an adapter at its top (merged into its base), or a full model (copied).
        out: Folder to make. Must not exist.
        base: The base model, where it has moved since the run.
        json: Print one JSON object instead of lines.
        into: `original` merges it into the unquantised base (of a checkpoint that is quantised in its files: give it
            as --base): another model than the one trained, `ds-longft eval` says how good.
    """
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    report = export_model(Path(run).expanduser(), Path(out).expanduser(), base, into)
    if json:
        print(json_format.dumps(report))
        return
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<34} {f'{value:.3g}' if isinstance(value, float) else value}")


def export_model(run: Path, out: Path, base: str | None = None, into: Into = "trained") -> dict[str, Any]:
    """Export and check; returns what was measured.

    Raises:
        ModelError: no result in `run`, `out` exists, the base is missing, or the folder does not load as written.
    """
    if out.exists():
        raise ModelError(f"OUT {str(out)!r} exists already: give a new folder, or remove it first")
    merges = (run / "adapter_config.json").is_file() and (run / WEIGHTS_NAME).is_file()
    if not merges and not ((run / "config.json").is_file() and any(run.glob("*.safetensors"))):
        raise ModelError(
            f"RUN {str(run)!r} holds no result: expected adapter_config.json and {WEIGHTS_NAME}, or config.json and "
            f"*.safetensors, at its top. Is it the output_dir of a finished run?"
        )
    if into == "original" and not merges:
        raise ModelError(f"--into original is for an adapter, and RUN {str(run)!r} is a full model: leave it out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        work = Path(name) / "model"
        report: dict[str, Any] = {"run": str(run), "out": str(out)}
        report["kind"] = "merged adapter" if merges else "full model"
        report |= _merge(run, work, base, into) if merges else _copy(run, work)
        copy_card(run, work, out)
        as_readable_as_the_folder(work)
        work.rename(out)
    return report


def _merge(run: Path, work: Path, base: str | None, into: Into) -> dict[str, Any]:
    import peft

    adapter = peft.PeftConfig.from_pretrained(run)
    base = base or adapter.base_model_name_or_path
    if not base:
        raise ModelError(f"{run / 'adapter_config.json'} names no base model: give --base")
    source = {"revision": adapter.revision} if adapter.revision else {}
    try:
        hf_config = _trained_config(run, base, source)
        of_base = AutoConfig.from_pretrained(base, **NO_CODE, **source)
        narrowed(hf_config, of_base)
        form, merged_into = _merged_into(run, base, hf_config, of_base, into)
        how = {"dtype": "auto", "use_safetensors": True, **NO_CODE, **source}
        if stored := stored_as(of_base):  # made dense; its own config says how it lies in the files
            hf_config.quantization_config = stored
            model, _ = load_packed(
                whole_class(hf_config), base, ModelConfig(path=base, quantize="none"), hf_config,
                output_loading_info=True, **how,
            )  # fmt: skip
        else:
            model = whole_class(hf_config).from_pretrained(base, config=hf_config, **how)
    except (OSError, ValueError) as error:  # ValueError: it wants to run code of its own
        raise ModelError(
            f"the base model {base!r} cannot be loaded: {str(error).splitlines()[0]}; give --base"
        ) from error
    dtype = model.dtype
    if form is not None and not stored:  # the base that the adapter was trained on
        round_as_packed(model, form)
    if {"embed_tokens", "lm_head"} & {name.rpartition(".")[2] for name in adapter.target_modules or ()}:
        _untie(model)
    adapted = load_adapter(model, run).eval()
    tokens = _prompt_tokens(run, base, hf_config)
    with_adapter = _logits(adapted, tokens)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter in {str(run)!r} cannot be merged: {error}") from error
    after = _logits(merged, tokens)
    difference, largest = float((after - with_adapter).abs().max()), float(with_adapter.abs().max())
    limit = MAX_LOGIT_DIFFERENCE.get(dtype, 0.1) * largest
    if not difference <= limit:
        raise ModelError(
            f"the merged model's logits differ from the adapter's by {difference:.3g}, allowed {limit:.3g}"
        )
    _save(merged, run, work, base, source)
    report = {
        "base": base,
        "merged_into": merged_into,
        "dtype": str(dtype).removeprefix("torch."),
        "merged_logits_max_difference": difference,
        "largest_logit": largest,
    }
    del model, adapted, merged
    gc.collect()
    return report | _check_reload(work, after, tokens)


def _merged_into(
    run: Path, base: str, trained: PretrainedConfig, of_base: PretrainedConfig, into: Into
) -> tuple[Format | None, str]:
    """How the base is to be rounded before the adapter is merged, and that in words. `trained` may be changed.

    Raises:
        ModelError: the base that the adapter was trained on is quantised in its files, and those of `base` are not: the
            adapter would go into other weights; or `into` asks for what there is not.
    """
    asked = config_of_run(run).model if (run / "config.yaml").is_file() else ModelConfig()
    stored = bool(stored_as(trained))
    form = base_format(trained if stored else of_base, asked)
    if into == "original":
        if stored_as(of_base):
            raise ModelError(f"--into original: {base!r} is quantised: give the unquantised checkpoint as --base")
        if form is None:
            raise ModelError("--into original: the adapter was trained on the unquantised base: leave it out")
        if stored:
            del trained.quantization_config
        return None, f"the unquantised base: another model than the one trained, which was on {form.name}"
    if stored and not stored_as(of_base):
        raise ModelError(
            f"the adapter was trained on a checkpoint that is quantised, but the files of {base!r} are not: the merged "
            "model would be another one. Give that checkpoint as --base, or --into original if that is what you want"
        )
    return form, f"the base rounded as {form.name} has it, as it was trained" if form else "the base as it is"


def _untie(model: Model) -> None:
    """Give the head a matrix of its own: an adapter on one of the two would be merged into both."""
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _copy(run: Path, work: Path) -> dict[str, Any]:
    """Copy the files of the model and nothing else of the run."""
    work.mkdir()
    for path in sorted(run.iterdir()):
        if path.is_file() and (OF_MODEL.fullmatch(path.name) or path.suffix == ".safetensors"):
            shutil.copy2(path, work / path.name)
    config = AutoConfig.from_pretrained(work, **NO_CODE)
    config.use_cache = True
    tokenizer = _tokenizer(work, str(work))
    if tokenizer is not None:
        generation = GenerationConfig.from_model_config(config)
        with contextlib.suppress(OSError):
            generation = GenerationConfig.from_pretrained(work)
        if _stop_where_served(tokenizer, config, generation):
            tokenizer.save_pretrained(work)
        generation.save_pretrained(work)
    config.save_pretrained(work)
    spell_for_older_readers(work)
    model = whole_class(config).from_pretrained(work, dtype="auto", use_safetensors=True, **NO_CODE)
    dtype, tokens = model.dtype, _prompt_tokens(run, str(work), config)
    logits = _logits(model, tokens)
    del model
    gc.collect()
    return {"dtype": str(dtype).removeprefix("torch.")} | _check_reload(work, logits, tokens)


def _trained_config(run: Path, base: str, source: dict[str, str]) -> PretrainedConfig:
    """The base's config as it was trained (with the RoPE change, if there was one), in the base's own dtype."""
    of_base = AutoConfig.from_pretrained(base, **NO_CODE, **source)
    folder = run / BASE_CONFIG_FOLDER
    if not folder.is_dir():
        return of_base
    trained = AutoConfig.from_pretrained(folder, **NO_CODE)
    trained.dtype = of_base.dtype
    return trained


def _save(model: Model, run: Path, work: Path, base: str, source: dict[str, str]) -> None:
    model.config.use_cache = True
    generation = model.generation_config
    with contextlib.suppress(OSError):  # some models have none
        generation = GenerationConfig.from_pretrained(base, **source)
    tokenizer = _tokenizer(run, base)
    if tokenizer is not None:
        _stop_where_served(tokenizer, model.config, generation)
    unread = _prediction_heads(base, source)
    model.save_pretrained(work, state_dict={**model.state_dict(), **unread} if unread else None)
    copy_preparation(base, work, **source)
    generation.save_pretrained(work)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    spell_for_older_readers(work)


def _prediction_heads(base: str, source: dict[str, str]) -> dict[str, torch.Tensor]:
    """Weights of the base's multi-token-prediction heads: transformers leaves them out, servers draft with them."""
    file_of = partial(cached_file, base, _raise_exceptions_for_missing_entries=False, **source)
    files = {SAFE_WEIGHTS_NAME}
    if (index := file_of(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        placed = json_format.loads(Path(index).read_text())["weight_map"]
        files = {file for name, file in placed.items() if name.startswith(PREDICTION_HEADS)}
    paths = [path for path in map(file_of, files) if path is not None]
    return {name: tensor for path in paths for name, tensor in _tensors_of(Path(path), PREDICTION_HEADS)}


def _stop_where_served(tokenizer: Any, config: PretrainedConfig, generation: Any) -> bool:
    """The end of an answer in what is exported, also where the run wrote it into its own config alone; whether the
    tokenizer changed.
    """
    changed = serve_stop(tokenizer, config, generation) is not None
    if set(stop_ids(config)) - set(stop_ids(generation)):
        generation.eos_token_id = stop_ids(generation, config)
    return changed


def _tokenizer(run: Path, base: str) -> Any | None:
    """The run's tokenizer (its chat template may be patched), else the base's, else None (random-weight rehearsals)."""
    for folder in (str(run), base):
        if Path(folder).is_dir() and not (Path(folder) / "tokenizer_config.json").is_file():
            continue
        try:
            return AutoTokenizer.from_pretrained(folder, **NO_CODE)
        except (OSError, ValueError):
            continue
    return None


def _prompt_tokens(run: Path, base: str, hf_config: PretrainedConfig) -> torch.Tensor:
    """A short prompt [1, n]: real text where there is a tokenizer."""
    tokenizer = _tokenizer(run, base)
    if tokenizer is None:
        return torch.arange(1, 17).remainder(hf_config.get_text_config().vocab_size)[None]
    return tokenizer(PROMPT, return_tensors="pt").input_ids


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=tokens, use_cache=False).logits.float()


def _check_reload(work: Path, logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
    """Load the folder as a user would: every weight bit-equal to the file, RoPE as in its config, logits as before."""
    config = AutoConfig.from_pretrained(work, **NO_CODE)
    model = whole_class(config).from_pretrained(work, dtype="auto", use_safetensors=True, **NO_CODE)
    loaded = revert_weight_conversion(model, model.state_dict())  # files hold experts one by one, the model all in one
    files = set()
    for name, tensor in _tensors_in(work):
        if name.startswith(PREDICTION_HEADS):
            continue
        files.add(name)
        if name not in loaded or not torch.equal(loaded[name], tensor):
            raise ModelError(f"reload check: weight {name} of {work} does not come back as it was written")
    shared = {loaded[name].data_ptr() for name in files}
    lost = sorted(name for name in loaded if name not in files and loaded[name].data_ptr() not in shared)
    if lost:
        raise ModelError(f"reload check: {len(lost)} weights were not written, the first is {lost[0]}")
    rope_error = check_rope(model.get_decoder(), model.config) if rope_parts(model.config) else 0.0
    difference = float((_logits(model, tokens) - logits).abs().max())
    if difference > 1e-3 * float(logits.abs().max()):
        raise ModelError(f"reload check: the logits differ by {difference:.3g} from those before writing")
    return {
        "weights_bit_equal_after_reload": len(files),
        "reload_logits_max_difference": difference,
        "rope_max_relative_error": rope_error,
        "rope": {str(k or "all"): v["rope_type"] for k, v in rope_parts(model.config).items()},
        "max_position_embeddings": getattr(config.get_text_config(), "max_position_embeddings", None),
    }


def _tensors_in(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from _tensors_of(path)


def _tensors_of(path: Path, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
            if name.startswith(prefix):
                yield name, file.get_tensor(name)
