"""What is verified: the user's model (or its first layers), packs of the user's data, adapters that do something."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ds_longft.batch import Pack, Step
from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.run_config import RunConfig
from ds_longft.data.loader import StepLoader
from ds_longft.data.stream import Stream
from ds_longft.errors import DataError, ModelError
from ds_longft.exactness.packs import shortened, weight_of
from ds_longft.layout import ParallelLayout
from ds_longft.model.load import load_config
from ds_longft.model.read_model import load_tokenizer, model_path
from ds_longft.ranks.join import Agreement
from ds_longft.train.sets import tokenized

DEFAULT_TOKENS = {"cuda": 8192, "cpu": 512}
"""Of each pack. Long enough for documents that lie across shards; the reference computes in float32."""

ADAPTER_STD = 0.02
"""Scale of the weights put into LoRA's B matrices. They start as zeros, and then A has no gradient and a lost adapter
changes nothing."""


@contextmanager
def first_layers(config: RunConfig, layers: int | None) -> Iterator[RunConfig]:
    """The config with a model of its first `layers` decoder layers: the same files beside a config.json cut short.

    Weights of the other layers stay in the files and are not read. Raises ModelError: it has fewer.
    """
    if layers is None:
        yield config
        return
    path = model_path(config.model)
    folder = Path(path if Path(path).is_dir() else snapshot_download(path, revision=config.model.revision))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    count = content.get("num_hidden_layers")
    if not isinstance(count, int) or layers > count:
        raise ModelError(f"--layers is {layers}, the model in {folder} has {count} layers: give at most that")
    # Lists with one entry a layer (layer_types and the like) are cut with it.
    cut = {k: v[:layers] if isinstance(v, list) and len(v) == count else v for k, v in content.items()}
    with tempfile.TemporaryDirectory(prefix="ds_longft-verify-") as work:
        for file in folder.iterdir():
            if file.is_file() and file.name != "config.json":
                (Path(work) / file.name).symlink_to(file.resolve())
        (Path(work) / "config.json").write_text(json.dumps({**cut, "num_hidden_layers": layers}))
        model = config.model.model_copy(update={"path": work, "revision": None})
        yield config.model_copy(update={"model": model})


@dataclass(frozen=True)
class VerifiedRun:
    """Everything the checks need, the same on every rank but for coordinates."""

    config: RunConfig
    settings: DeepSpeedSettings
    layout: ParallelLayout
    device: torch.device
    agreement: Agreement
    dtype: torch.dtype
    tokenizer: Any
    step: Step
    """The run's own first step, whole."""
    packs: list[Pack]
    """At least two, and one a rank: those of the run's first epoch, cut short. Packs of padding where data ends."""

    @classmethod
    def make(
        cls, config: RunConfig, settings: DeepSpeedSettings, sp: int, device: torch.device, agreement: Agreement, *,
        tokens: int | None,
    ) -> VerifiedRun:  # fmt: skip
        """Read the user's data and lay it into packs as the run would. Collective.

        Raises:
            DataError: nothing in the first packs is trained.
        """
        # It changes only which rank holds what, and DeepSpeed's own reading of gradients does not know (0.19.8).
        settings.engine["zero_optimization"].pop("round_robin_gradients", None)
        # Plain transformers on each document alone, which is compared with, has no routers' losses of a whole step.
        without = {"router_aux_loss": 0.0, "router_z_loss": 0.0}
        config = config.model_copy(update={"train": config.train.model_copy(update=without)})
        layout = ParallelLayout.create(sp)
        tokenizer = load_tokenizer(config.model)
        hf_config = load_config(config.model, config.data.max_length_tokens, attn_implementation="eager")
        vocab = hf_config.get_text_config().vocab_size
        train_set, _ = agreement.rank0_first(
            lambda: tokenized(config, tokenizer, vocab, progress=False, every_byte=agreement.rank == 0)
        )
        rows = train_set.window(0) if isinstance(train_set, Stream) else train_set
        tokens = tokens or DEFAULT_TOKENS[device.type]
        count = max(2, layout.world)

        def first_step(dp: int, dp_rank: int, accumulation: int) -> Step:
            loader = StepLoader(
                rows, data=config.data, dp=dp, dp_rank=dp_rank, sp=sp, accumulation=accumulation, seed=config.seed,
            )  # fmt: skip
            steps = loader.steps(0)
            step = next(steps)
            steps.close()
            return step

        # Documents are dealt whole to the ranks where that goes; both ways are checked, in turns.
        whole = [
            pack if i % 2 else replace(pack, rank_borders=None) for i, pack in enumerate(first_step(1, 0, count).packs)
        ]
        packs = [shortened(pack, tokens, sp) for pack in whole]
        if not weight_of(packs):
            raise DataError(f"the first {count} packs, cut to {tokens} tokens each, hold no target: give more --tokens")
        return cls(
            config=config,
            settings=settings,
            layout=layout,
            device=device,
            agreement=agreement,
            dtype=torch.bfloat16 if settings.engine.get("bf16", {}).get("enabled") else torch.float32,
            tokenizer=tokenizer,
            step=first_step(layout.dp, layout.dp_rank, config.train.gradient_accumulation_steps),
            packs=packs,
        )


@torch.no_grad()
def wake_adapters(model: nn.Module) -> None:
    """Fill LoRA's B matrices with small numbers that depend on the parameter's name alone."""
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
            p.copy_(torch.randn(p.shape, generator=generator) * ADAPTER_STD)
