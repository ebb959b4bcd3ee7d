"""LoRA through PEFT: added before the engine, gathered once under ZeRO-3, saved as plain PEFT files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_longft.config.run_config import LoraConfig
from ds_longft.errors import ModelError
from ds_longft.model.elsewhere import spell_for_older_readers
from ds_longft.model.lora_targets import check_names, targets_of
from ds_longft.model.new_tokens import rows_of_adapter, whole_rows, widen
from ds_longft.model.packed import packed_weights, seen_dense
from ds_longft.model.rope_formulas import rope_parts
from ds_longft.model.wrapped import on_meta, text_class

WEIGHTS_NAME = "adapter_model.safetensors"
BASE_CONFIG_FOLDER = "base_config"  # the base's config as trained: its RoPE may differ from the base's own


@dataclass(frozen=True)
class ParameterCounts:
    """How many weights there are (whole model, not this rank's share), and how many are trained."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} weights trained ({100 * self.trainable / self.total:.2f}%)"


def check_lora(hf_config: PretrainedConfig, lora: LoraConfig) -> None:
    """See that the layers which `lora` names are there, on the model without memory ("meta"): before data is read.
    Raises ModelError: as `add_lora` would, once data is tokenised and weights are loaded.
    """
    model = on_meta(text_class(hf_config), hf_config)
    targets_of(model, lora)
    check_names("lora.modules_to_save", lora.modules_to_save, _leaf_names(model))


def add_lora(
    model: PreTrainedModel, lora: LoraConfig, *, seed: int, revision: str | None = None, train_rows: Sequence[int] = ()
) -> peft.PeftModel:
    """Wrap `model` with adapters in the model's dtype, initialised from `seed` alike on every rank; the base is frozen.

    `train_rows`: ids of tokens whose rows in the embeddings are trained besides.
    Raises ModelError: a name of `lora.targets` or `lora.modules_to_save` is no layer of the model, or PEFT refuses.
    """
    # PEFT initialises on the CPU and then moves: the CPU's seed alone decides
    with seen_dense(model, linears=not lora.dora), torch.random.fork_rng(devices=[]), whole_rows():
        config = _peft_config(model, lora, revision, list(train_rows))
        torch.manual_seed(seed)
        try:
            # PEFT would keep adapters of a bf16 model in fp32; the optimizer holds fp32 master weights already
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"PEFT cannot adapt this {model.config.model_type} so: {error}. Change lora.targets, "
                f"lora.experts, lora.modules_to_save, lora.dropout or lora.dora"
            ) from error
        assert isinstance(adapted, peft.PeftModel)
        if lora.init_from is not None:
            _go_on_from(Path(lora.init_from).expanduser(), adapted)
    return adapted


def _peft_config(model: PreTrainedModel, lora: LoraConfig, revision: str | None, rows: list[int]) -> peft.LoraConfig:
    targets = targets_of(model, lora)
    check_names("lora.modules_to_save", lora.modules_to_save, _leaf_names(model))
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    saved = set(lora.modules_to_save) & {"embed_tokens", "lm_head"}
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters,
        exclude_modules=targets.excluded,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,  # PEFT may add to the list it is given
        # one matrix that is both embedding and head must stay one while it is trained, or it could not be merged
        ensure_weight_tying=tied and bool(saved),
        trainable_token_indices=_rows_by_module(model, lora, rows, tied) or None,
        base_model_name_or_path=model.config.name_or_path,
        revision=revision,
    )


def _rows_by_module(model: PreTrainedModel, lora: LoraConfig, rows: list[int], tied: bool) -> dict[str, list[int]]:
    """Name of a matrix -> its rows that are trained; where it is saved whole it is trained whole."""
    ends = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in ends)]
    return {name: rows for name in names if rows and name not in lora.modules_to_save}


def _go_on_from(folder: Path, model: peft.PeftModel) -> None:
    """Put the weights of a saved adapter in place of the initial ones.
    Raises ModelError: no adapter there, or one of another shape, scale or RoPE than this model's.
    """
    if not (folder / WEIGHTS_NAME).is_file() or not (folder / peft.utils.CONFIG_NAME).is_file():
        raise ModelError(f"lora.init_from: {folder} holds no {peft.utils.CONFIG_NAME} with {WEIGHTS_NAME}")
    theirs, ours = peft.PeftConfig.from_pretrained(folder), model.peft_config["default"]
    keys = {"r": "r", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
    differ = {key: getattr(theirs, name) for name, key in keys.items() if getattr(theirs, name) != getattr(ours, name)}
    if differ:
        these = ", ".join(f"lora.{key}: {value}" for key, value in differ.items())
        raise ModelError(f"lora.init_from: the adapter in {folder} was made with other keys: set {these}")
    if (folder / BASE_CONFIG_FOLDER).is_dir():
        trained, own = AutoConfig.from_pretrained(folder / BASE_CONFIG_FOLDER), model.get_base_model().config
        if rope_parts(trained) != rope_parts(own):
            raise ModelError(
                f"lora.init_from: the adapter in {folder} was trained with RoPE {rope_parts(trained)}, this run has "
                f"{rope_parts(own)}: set model.rope as that run's config.yaml has it"
            )
    state = load_file(folder / WEIGHTS_NAME)
    wanted = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    try:
        outcome = set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        raise ModelError(f"lora.init_from: the adapter in {folder} does not fit: {str(error)[:300]}") from error
    missing = sorted(wanted & set(outcome.missing_keys))
    if missing or outcome.unexpected_keys:
        odd = (missing or sorted(outcome.unexpected_keys))[0]
        raise ModelError(
            f"lora.init_from: the adapter in {folder} adapts other layers than lora.targets and lora.modules_to_save "
            f"name, the first is {odd}"
        )


def load_adapter(base: PreTrainedModel, folder: str | Path) -> peft.PeftModel:
    """The adapter that lies in `folder` on `base`, in the base's dtype.
    Raises ModelError: it does not fit, or a tensor of its file is not in the model afterwards: PEFT warns at most, and
    goes on with what the adapter was initialised with.
    """
    widen(base, rows_of_adapter(Path(folder), BASE_CONFIG_FOLDER))
    try:
        with seen_dense(base):
            model = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the adapter in {folder} does not fit {base.config.name_or_path}: {error}") from error
    # beside the adapter's own: embeddings, which PEFT saves with it where they had grown
    present = {**model.state_dict(), **get_peft_model_state_dict(model, save_embedding_layers=False)}
    file = load_file(Path(folder) / WEIGHTS_NAME)
    lost = sorted(name for name, tensor in file.items() if not _same_bytes(tensor, present.get(name)))
    if lost:
        raise ModelError(
            f"the adapter in {folder} does not load whole: {len(lost)} of its {len(file)} tensors do not arrive in "
            f"{base.config.model_type}, the first is {lost[0]}. The versions of transformers and PEFT name this "
            "model's layers differently; use those the adapter was trained with, or others"
        )
    return model


@contextmanager
def adapters_off(model: peft.PeftModel) -> Iterator[None]:
    """Inside, the model is the one without adapters: LoRA adds nothing, `modules_to_save` are the originals.

    For passes without gradient: PEFT freezes what it switches off. Fused linears and the chunked head look at PEFT's
    own switch at each call.
    """
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


def trainable_parameters(model: nn.Module) -> ParameterCounts:
    """Counts over the whole model, also where ZeRO-3 holds only this rank's share."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    sizes += [(packed.shape.numel(), False) for _, packed in packed_weights(model)]
    return ParameterCounts(trainable=sum(n for n, on in sizes if on), total=sum(n for n, _ in sizes))


def gather_adapter_state(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The adapter in PEFT's on-disk names, whole, on the CPU. Call on every rank; only rank 0 gets it, others get {}.

    `model` is the PEFT model itself, not the engine around it.
    """
    # tied weights count under each of their names, as PEFT expects them
    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    gathered: AbstractContextManager[Any] = nullcontext()
    if any(hasattr(p, "ds_id") for p in trained.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(dict.fromkeys(trained.values())), modifier_rank=None)
    with gathered:
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return {}
        whole = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
    state = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    assert state, "no adapter weight was gathered"
    assert not empty, f"adapter weights gathered with size zero: {empty[:3]}"
    return state


def save_adapter(model: peft.PeftModel, state_dict: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write adapter_model.safetensors, adapter_config.json and base_config/config.json. Rank 0 only.

    `state_dict` is what `gather_adapter_state` returned.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_own_storage(state_dict), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True  # as PEFT writes it: the adapter is frozen when it is loaded
    config.save_pretrained(folder)
    save_base_config(model.get_base_model(), folder)


def save_base_config(base: PreTrainedModel, folder: str | Path) -> None:
    """The base model's config as trained, in a folder of its own.

    Not at the top: transformers takes a config.json beside adapter_config.json for a complete model.
    """
    config = copy.deepcopy(base.config)
    config.use_cache = True  # off for training only
    config.save_pretrained(Path(folder) / BASE_CONFIG_FOLDER)
    spell_for_older_readers(Path(folder) / BASE_CONFIG_FOLDER)


def _own_storage(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Safetensors refuses tensors that share memory (tied embeddings): the later one gets a copy."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in state_dict.items():
        owned[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return owned


def _same_bytes(tensor: torch.Tensor, loaded: torch.Tensor | None) -> bool:
    """Whether this is what was loaded of it, rounded to its dtype; not a comparison of numbers, for NaN is none."""
    if loaded is None or loaded.shape != tensor.shape:
        return False
    a, b = (t.to("cpu", loaded.dtype).contiguous().view(torch.uint8) for t in (tensor, loaded))
    return torch.equal(a, b)


def _leaf_names(model: nn.Module) -> list[str]:
    """Full names of the modules that hold weights themselves."""
    return [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))]
