"""Precomputed log-probabilities: the same for any split over ranks, taken up where they stopped, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ds_longft.config.preflight import preflight
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError, DataError, NonFiniteError
from tests.distributed.test_dpo_verify import pair_config


def filled(rank: int, world: int, content: dict[str, Any], forget: list[int]) -> Any:
    """(how many were computed, all values) after the pairs `forget` were lost."""
    from ds_longft.data.tokenize import tokenize_sources
    from ds_longft.layout import ParallelLayout
    from ds_longft.model.read_model import load_tokenizer
    from ds_longft.objectives.reference_cache import load_reference, open_reference
    from ds_longft.ranks.join import Agreement
    from ds_longft.tools.ref_logps import fill
    from ds_longft.train.engine import build
    from ds_longft.train.install import known_run

    config = RunConfig.model_validate(content)
    settings, sp = preflight(config, world=world, local_world=world, device="cpu")
    agreement, layout = Agreement(), ParallelLayout.create(sp)
    tokenizer = load_tokenizer(config.model)
    pairs: Any = agreement.rank0_first(lambda: tokenize_sources(config.data.train, tokenizer, config.data, pairs=True))
    if forget:
        agreement.on_rank0(lambda: open_reference(config, pairs).__setitem__(forget, np.nan))
    built = build(known_run(config, settings, layout, torch.device("cpu")), layout, torch.device("cpu"))
    result = fill(built.engine, config, pairs, layout, torch.device("cpu"), agreement)
    built.engine.destroy()
    return result["computed"], load_reference(config, pairs)


def test_any_split_gives_the_same_and_a_second_start_does_what_is_missing(pools, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    content = pair_config(tmp_path / "a", reference="precomputed")
    computed, whole = pools(2).run(filled, content, [])[0]
    assert computed == 24
    assert (whole < 0).all()
    computed, again = pools(2).run(filled, content, [3, 17, 18])[0]
    assert computed == 3
    np.testing.assert_allclose(again, whole, rtol=1e-6)
    content["data"]["cache_dir"] = str(tmp_path / "other")
    content["sp"] = 1
    computed, two_at_a_time = pools(2).run(filled, content, [])[0]
    assert computed == 24
    np.testing.assert_allclose(two_at_a_time, whole, rtol=1e-6)


def no_numbers(rank: int, world: int, content: dict[str, Any]) -> str:
    def faulty(engine: Any, pack: Any, *_: Any) -> torch.Tensor:
        return torch.full((len(pack.pairs), 2), torch.nan, dtype=torch.float64)

    with patch("ds_longft.objectives.passes.reference_logps", faulty):
        try:
            filled(rank, world, content, [])
        except NonFiniteError as error:
            return f"{error.exit_code}: {error}"
    return ""


def test_a_reference_that_gives_no_numbers_is_refused(pools, tmp_path: Path) -> None:
    """In the file they would count as still to be done, for ever."""
    says = pools(2).run(no_numbers, pair_config(tmp_path, reference="precomputed"))
    assert all(text.startswith("70: the log-probabilities of pair ") for text in says), says


def test_a_file_of_another_model_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_longft.data.tokenize import tokenize_sources
    from ds_longft.model.read_model import load_tokenizer
    from ds_longft.objectives.reference_cache import load_reference, open_reference

    config = RunConfig.model_validate(pair_config(tmp_path, reference="precomputed"))
    pairs: Any = tokenize_sources(config.data.train, load_tokenizer(config.model), config.data, pairs=True)
    with pytest.raises(DataError, match="there are no log-probabilities"):
        load_reference(config, pairs)
    store = open_reference(config, pairs)
    store[:-1] = -1.0
    with pytest.raises(DataError, match="lacks 1 of 24 pairs"):
        load_reference(config, pairs)
    store[-1] = -2.0
    store.flush()
    assert load_reference(config, pairs)[-1, 0] == -2.0
    weights = next((tmp_path / "model").glob("*.safetensors"))
    weights.touch()
    with pytest.raises(DataError, match="there are no log-probabilities"):
        load_reference(config, pairs)


def test_the_command_says_what_it_is_not_for(tmp_path: Path) -> None:
    from ds_longft.tools.ref_logps import of_pairs

    (tmp_path / "rows.jsonl").write_text("{}\n")
    keys = ["--data.train", str(tmp_path / "rows.jsonl")]
    with pytest.raises(ConfigError, match="objective is sft"):
        of_pairs(load_run_config(keys))
    with pytest.raises(ConfigError, match="simpo has no reference"):
        of_pairs(load_run_config([*keys, "--objective", "dpo", "--dpo.loss", "simpo"]))
    config = of_pairs(load_run_config([*keys, "--objective", "dpo", "--lora", "null"]))
    assert config.dpo.reference == "precomputed"
