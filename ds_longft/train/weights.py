"""What a run leaves for others to load: a PEFT adapter, or in full fine-tuning an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_longft.model.elsewhere import spell_for_older_readers
from ds_longft.model.lora import gather_adapter_state, save_adapter
from ds_longft.model.stops import serve_stop
from ds_longft.model.wrapped import is_wrapped, save_whole
from ds_longft.ranks.join import Agreement
from ds_longft.train.durable import as_readable_as_the_folder, insist


def trained_fingerprint(model: nn.Module) -> str:
    """Hash of the names and whole shapes of the trained parameters: what an optimizer state belongs to."""
    shapes = [(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in model.named_parameters() if p.requires_grad]
    return hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:16]


def start_fingerprint(model: nn.Module) -> str:
    """Hash of the first four elements of each frozen weight, of every weight where none is frozen; before training.

    Another model of the same shapes has other ones. Rounded to bf16, so that the type it is loaded in does not count.
    Of rank 0's share, which under ZeRO-3 holds the first elements whatever the number of ranks. "" where weights lie
    on NVMe.
    """
    weights = list(model.parameters())
    chosen: list[torch.Tensor] = [*([p for p in weights if not p.requires_grad] or weights)]
    chosen += [codes for name, codes in model.named_buffers() if name.endswith(".original")]  # `model.packed`
    shares = [getattr(p, "ds_tensor", getattr(p, "head", p)) for p in chosen]  # `sequence.frozen`
    if any(getattr(getattr(share, "status", None), "name", "") == "NOT_AVAILABLE" for share in shares):
        return ""
    heads = [share.detach().flatten()[:4].to("cpu", torch.bfloat16) for share in shares]
    return hashlib.sha256(torch.cat(heads).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer whole on the CPU of rank 0, {} elsewhere; one parameter at a time under ZeRO-3.

    There a tied parameter comes under its first name alone: the others are made of it when the model is loaded.
    """
    mine = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    # state_dict() has neither ds_id nor, of a partitioned parameter, any element; under the name of every alias
    partitioned = {n for n, p in model.named_parameters(remove_duplicate=False) if hasattr(p, "ds_id")}
    state = {n: b.detach().cpu() for n, b in model.state_dict().items() if mine and n not in partitioned}
    for name, p in model.named_parameters():
        if not hasattr(p, "ds_id"):
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            if mine:
                state[name] = p.detach().to("cpu", copy=True)
    return state


class ModelWriter:
    """Writes the trained model of one run. Every method is collective; rank 0 touches the disk."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        agreement: Agreement,
        as_saved: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`as_saved`: inside of it the model has the weights to save (`make_optimizer.averaged_weights`)."""
        self.model, self.tokenizer, self.agreement, self.as_saved = model, tokenizer, agreement, as_saved
        self.lora = hasattr(model, "peft_config")
        base: Any = model.get_base_model() if self.lora else model  # type: ignore[operator]
        self.stop_remark = serve_stop(tokenizer, base.config, getattr(base, "generation_config", None))

    def write_weights(self, folder: Path) -> None:
        """The adapter in PEFT's format. In full fine-tuning nothing: checkpoints hold the engine's own shards."""
        if self.lora:
            with self.as_saved():
                state = gather_adapter_state(self.model)
            if self.agreement.rank == 0:
                save_adapter(self.model, state, folder)

    def write_all(self, folder: Path, say: Callable[[str], None]) -> None:
        """Weights, tokenizer and chat template at the top of the output folder; a full disk is waited for a while."""
        with self.as_saved():  # to the end: on a CPU the state is no copy
            self._write_all(folder, say)

    def _write_all(self, folder: Path, say: Callable[[str], None]) -> None:
        state = gather_adapter_state(self.model) if self.lora else gather_weights(self.model)
        base: Any = self.model

        def write() -> None:
            if self.lora:
                save_adapter(self.model, state, folder)
            elif is_wrapped(base.config):
                save_whole(base, state, folder)
            else:
                self.model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
            as_readable_as_the_folder(folder)
            self.tokenizer.save_pretrained(folder)
            spell_for_older_readers(folder)

        if self.agreement.rank == 0 and (error := insist(write, "the trained model", say)) is not None:
            raise error
