import threading

import numpy as np
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.loader import StepLoader
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import DataError
from tests.unit.conftest import chat


@pytest.fixture(scope="module")
def tokenized(tokenizer, tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("loader")
    rows = [{**chat("question " * (i % 13 + 1), "answer " * (i % 5 + 1)), "weight": 1 + i % 3} for i in range(90)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(cache_dir=str(folder / "cache"), max_length_tokens=512, workers=1)
    return tokenize_sources([SourceConfig(path=str(folder / "rows.jsonl"))], tokenizer, data)


def loader(tokenized, dp=1, dp_rank=0, sp=1, accumulation=1, seed=0, **settings):
    data = DataConfig(**{"max_length_tokens": 512, **settings})
    return StepLoader(
        tokenized, data=data, dp=dp, dp_rank=dp_rank, sp=sp, accumulation=accumulation, seed=seed, pad_id=0
    )


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "position_ids", "labels", "loss_weights", "cu_seqlens", "rows")
    )


@pytest.mark.parametrize("weighting", ["token", "sample"])
@pytest.mark.parametrize("packing", ["best_fit", "sorted", "none"])
def test_numbers_of_a_step_are_those_of_its_packs_on_all_ranks(tokenized, weighting, packing):
    ranks = [
        list(loader(tokenized, dp=2, dp_rank=r, sp=4, accumulation=2, weighting=weighting, packing=packing).steps(0))
        for r in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) > 1
    rows = []
    for steps in zip(*ranks, strict=True):
        packs = [pack for step in steps for pack in step.packs]
        assert len(packs) == 4
        assert all(pack.tokens % 4 == 0 or pack.whole_documents(4) for pack in packs)
        for step in steps:
            assert step.total_weight == pytest.approx(
                sum(p.loss_weights.sum(dtype=np.float64) for p in packs), rel=1e-12
            )
            assert step.padding_tokens == sum(p.padding_tokens for p in packs)
            assert step.tokens == sum(p.tokens - p.padding_tokens for p in packs)
        rows += [row for pack in packs for row in pack.rows]
    assert sorted(rows) == list(range(90))


def test_same_steps_for_any_split_of_the_ranks(tokenized):
    one = list(loader(tokenized, accumulation=4).steps(2))
    four = [list(loader(tokenized, dp=4, dp_rank=r).steps(2)) for r in range(4)]
    assert loader(tokenized, accumulation=4).fingerprint == loader(tokenized, dp=4, dp_rank=1, sp=2).fingerprint
    for i, step in enumerate(one):
        assert all(same(pack, four[r][i].packs[0]) for r, pack in enumerate(step.packs) if pack.rows)
        assert step.total_weight == four[0][i].total_weight


@pytest.mark.parametrize("sp", [2, 3])
def test_documents_are_dealt_whole_where_that_goes(tokenized, sp):
    """The rows of each pack stay, in another order; no rank has more than a part of the fullest pack."""
    split, dealt = (list(loader(tokenized, sp=n, pack_tokens=4096).steps(0)) for n in (1, sp))
    most = -(-max(step.packs[0].tokens for step in split) // sp)
    whole = 0
    for a, b in zip(split, dealt, strict=True):
        pack = b.packs[0]
        assert sorted(pack.rows) == sorted(a.packs[0].rows)
        assert b.total_weight == a.total_weight
        parts = [pack.part(sp, rank) for rank in range(sp)]
        assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
        assert parts[-1].stop == pack.tokens
        if pack.whole_documents(sp):
            whole += 1
            assert set(pack.rank_borders) <= set(pack.cu_seqlens.tolist())
            assert max(p.stop - p.start for p in parts) <= most
            assert pack.padding_tokens == 0
    assert whole > len(dealt) // 2
    fullest = loader(tokenized, sp=sp, pack_tokens=4096).fullest_pack(0)
    assert fullest.rank_borders is None, "what has to fit is the split one"


def test_resuming_inside_an_epoch_gives_the_steps_that_were_left(tokenized):
    whole = list(loader(tokenized).steps(1))
    rest = list(loader(tokenized).steps(1, start=2))
    assert [step.index for step in rest] == [step.index for step in whole][2:]
    assert all(same(a.packs[0], b.packs[0]) for a, b in zip(rest, whole[2:], strict=True))
    assert list(loader(tokenized).steps(1, start=len(whole))) == []


def test_epochs_differ_and_seeds_too(tokenized):
    first = [step.packs[0].rows for step in loader(tokenized).steps(0)]
    assert first != [step.packs[0].rows for step in loader(tokenized).steps(1)]
    assert first != [step.packs[0].rows for step in loader(tokenized, seed=1).steps(0)]
    assert len(first) == loader(tokenized).steps_per_epoch(0)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"accumulation": 2}, {"packing": "none"}, {"weighting": "sample"}, {"max_length_tokens": 600}],
)
def test_the_fingerprint_changes_with_what_changes_the_steps(tokenized, change):
    assert loader(tokenized, **change).fingerprint != loader(tokenized).fingerprint


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ds_longft-loader")]


def test_closing_early_ends_the_thread(tokenized):
    steps = loader(tokenized, packing="none").steps(0)
    next(steps)
    assert len(loader_threads()) == 1
    steps.close()
    assert loader_threads() == []


def test_what_fails_in_the_thread_is_raised_to_the_trainer(tokenized, monkeypatch):
    monkeypatch.setattr("ds_longft.data.tokenized.build_pack", lambda *_, **__: 1 / 0)
    made = loader(tokenized)
    with pytest.raises(ZeroDivisionError):
        next(made.steps(0))
    assert loader_threads() == []


def test_waiting_is_measured(tokenized, monkeypatch):
    import time

    from ds_longft.data import tokenized as module

    build = module.build_pack
    monkeypatch.setattr(module, "build_pack", lambda *a, **k: time.sleep(0.05) or build(*a, **k))
    made = loader(tokenized)
    steps = list(made.steps(0))
    assert 0.04 * len(steps) < made.wait_s < 0.05 * len(steps) + 1


def test_tokens_of_another_models_tokenizer_are_named(tokenized):
    largest = max(int(tokenized.row(i).input_ids.max()) for i in range(len(tokenized)))
    tokenized.check_ids(largest + 1)
    with pytest.raises(DataError, match=rf"rows\.jsonl:\d+: token id {largest}, but the model knows ids 0 to"):
        tokenized.check_ids(largest)
