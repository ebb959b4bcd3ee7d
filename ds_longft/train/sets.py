"""The sets of a run: its sources tokenized, checked against the model, and divided into training and held-out rows."""

from __future__ import annotations

from typing import Any

from ds_longft.config.data_keys import DataConfig, SourceConfig
from ds_longft.config.run_config import RunConfig
from ds_longft.data.pairs import PairSet
from ds_longft.data.stream import Stream
from ds_longft.data.tokenize import Input, tokenize_sources
from ds_longft.data.tokenized import TokenizedSet
from ds_longft.objectives.objective import Needs
from ds_longft.objectives.reference_cache import load_reference


def tokenized(
    config: RunConfig, tokenizer: Any, vocab: int, *, progress: bool, every_byte: bool = False
) -> tuple[TokenizedSet | Stream, TokenizedSet | None]:
    """The training set and, where asked for, the held-out set; from the cache when nothing changed. A stream is only
    opened.

    `vocab`: token ids that the model knows. `every_byte`: of the cache is looked at, not its sizes alone.

    With `dpo.reference: precomputed`, each with its log-probabilities.

    Raises:
        DataError: no usable row, tokens that the model does not know, or log-probabilities that are missing.
    """
    needs = Needs.of(config)

    def make(sources: list[SourceConfig], data: DataConfig = config.data) -> TokenizedSet:
        made = tokenize_sources(sources, tokenizer, data, progress=progress, pairs=config.pairs, every_byte=every_byte)
        made.check_ids(vocab)
        if needs.reference != "precomputed":
            return made
        assert isinstance(made, PairSet)
        return made.with_reference(load_reference(config, made))

    plain = config.data.model_copy(update={"weighting": "token"})  # held-out rows need no gains
    if config.data.stream_window_mib is not None:
        found = Input.of(config.data.train, tokenizer, config.data, progress=progress, streaming=True)
        return Stream(found, config.data, vocab), make(config.data.eval, plain) if config.data.eval else None
    train_set = make(config.data.train)
    if config.data.eval:
        return train_set, make(config.data.eval, plain)
    if config.data.eval_fraction:
        return train_set.split(config.data.eval_fraction, config.seed)
    return train_set, None
