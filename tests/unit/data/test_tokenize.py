import copy
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ds_longft.batch import IGNORE_INDEX
from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data import encode_blocks
from ds_longft.data import tokenize as module
from ds_longft.data.pack import build_pack
from ds_longft.data.readers import find_source
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import ConfigError, DataError
from tests.unit.conftest import chat


@pytest.fixture
def run(tokenizer, tmp_path):
    def tokenize(*paths, tokenizer=tokenizer, format="auto", **settings):
        settings = {"cache_dir": str(tmp_path / "cache"), "max_length_tokens": 4096, "workers": 1, **settings}
        return tokenize_sources([SourceConfig(path=p, format=format) for p in paths], tokenizer, DataConfig(**settings))

    return tokenize


def ledger_of(error_or_cache):
    return [json.loads(line) for path in sorted(error_or_cache.rglob("ledger.jsonl")) for line in path.open()]


def test_columns_agree_with_each_other(run, write_jsonl):
    rows = [chat("q", "one two three"), chat("q", "a", "r", "bb", system="be kind"), chat("q" * 50, "x" * 20)]
    rows[1]["messages"][2]["weight"] = 0.25
    rows[2]["weight"] = 3
    tokenized = run(write_jsonl(rows))
    assert len(tokenized) == 3
    for i in range(3):
        row = tokenized.row(i)
        assert tokenized.lengths[i] == len(row.input_ids)
        assert tokenized.targets[i] == row.targets == (row.span_end - row.span_start).sum()
        per_label = np.repeat(row.label_weights("token"), row.span_end - row.span_start)
        assert tokenized.weight_sums("token")[i] == pytest.approx(per_label.sum())
        assert row.origin.endswith(f"rows.jsonl:{i + 1}")
    lengths = tokenized.row(1).span_end - tokenized.row(1).span_start
    assert tokenized.weight_sums("token")[1] == pytest.approx(0.25 * lengths[0] + lengths[1])
    assert tokenized.weight_sums("sample")[1] == pytest.approx((0.25 * lengths[0] + lengths[1]) / lengths.sum())
    assert tokenized.weight_sums("sample").tolist()[::2] == pytest.approx([1.0, 3.0])


def test_targets_weighed_by_what_context_gains(run, write_jsonl, tmp_path):
    """Each target times min(e^gain, 5), also behind a message's and a row's own weight, on any number of ranks."""
    rows = [chat("q", "one two three", "r", "four"), {"text": "some plain words"}, chat("q", "a")]
    rows[0]["messages"][1]["weight"], rows[0]["weight"] = 0.5, 2
    plain = [run(write_jsonl([row])).row(0) for row in rows]
    for row, encoded in zip(rows, plain, strict=True):
        row["token_gains"] = [0.1 * i - 0.2 for i in range(encoded.targets)]
    rows[2]["token_gains"][:2] = [9, 0.5]
    for i, (row, before) in enumerate(zip(rows, plain, strict=True)):
        found = run(write_jsonl([row]), weighting="gain")
        once, weighed = (
            build_pack([r], pad_to_multiple=6, pad_id=0, weighting=name)
            for r, name in ((before, "token"), (found.row(0), "gain"))
        )
        assert (once.labels == weighed.labels).all()
        at = once.labels != IGNORE_INDEX
        expected = np.minimum(np.exp(row["token_gains"]), 5) * once.loss_weights[at]
        np.testing.assert_allclose(weighed.loss_weights[at], expected, rtol=1e-6)
        assert not weighed.loss_weights[~at].any()
        assert found.targets[0] == before.targets
        assert found.weight_sums("gain")[0] == pytest.approx(weighed.loss_weights.sum(dtype=np.float64), rel=1e-12)
        for sp in (2, 3):
            parts = [weighed.loss_weights[weighed.part(sp, rank)].sum(dtype=np.float64) for rank in range(sp)]
            assert sum(parts) == pytest.approx(expected.sum(), rel=1e-6)
        if i == 2:
            assert weighed.loss_weights.max() == 5
    even = rows[1] | {"token_gains": [0.0] * plain[1].targets}
    assert len(run(write_jsonl([even]), weighting="gain").row(0).span_start) == 1, "spans are cut where weights change"
    for wrong, said in (
        ([0.1], "token_gains are of other targets"),
        (None, "no token_gains"),
        ("a", "no list of numbers"),
    ):
        with pytest.raises(DataError, match=said):
            run(write_jsonl([rows[1] | {"token_gains": wrong}]), weighting="gain")


def test_plain_text_is_trained_whole_and_ends(run, write_jsonl, tokenizer):
    row = run(write_jsonl([{"text": "some words"}])).row(0)
    assert tokenizer.decode(row.input_ids) == "some words<|im_end|>"
    assert (row.span_start.tolist(), row.span_end.tolist()) == ([0], [len(row.input_ids)])
    assert row.targets == len(row.input_ids) - 1  # nothing predicts the first token


def test_text_needs_no_chat_template(run, write_jsonl, tokenizer):
    base = copy.copy(tokenizer)
    base.chat_template = None
    assert len(run(write_jsonl([{"text": "some words"}]), tokenizer=base)) == 1
    with pytest.raises(ConfigError, match="no chat template"):
        run(write_jsonl([chat("q", "a")], "chat.jsonl"), tokenizer=base)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_begins_with_plain_text_may_hold_chats(run, write_jsonl, tokenizer, workers):
    """As `data mix` writes them, in any order; without a template they are bad rows with a reason."""
    rows = [{"text": "some words"}, chat("q", "an answer"), {"text": "more"}]
    found = run(write_jsonl(rows), workers=workers)
    alone = [run(write_jsonl([row], name="alone.jsonl")).row(0) for row in rows]
    assert [list(found.row(i).input_ids) for i in range(3)] == [list(one.input_ids) for one in alone]
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    assert len(run(write_jsonl(rows), tokenizer=base, max_bad_fraction=0.5, workers=workers)) == 2
    with pytest.raises(DataError, match="a chat, and the tokenizer has no usable chat template"):
        run(write_jsonl(rows), tokenizer=base, max_bad_fraction=0.0, workers=workers)


def test_bad_rows_go_to_the_ledger_with_their_line(run, write_jsonl, tmp_path):
    rows = [chat("q", "a")] * 8 + ["{broken", chat("q", "")]
    path = write_jsonl(rows)
    tokenized = run(path, max_bad_fraction=0.2)
    assert len(tokenized) == 8
    assert (tokenized.tally.read, tokenized.tally.bad) == (10, {"broken JSON": 1, "empty answer": 1})
    assert [(e["origin"], e["reason"]) for e in ledger_of(tmp_path)] == [
        (f"{path}:9", "broken JSON"),
        (f"{path}:10", "empty answer"),
    ]
    with pytest.raises(DataError, match=r"2 of 10 rows \(20\.0%\).*max_bad_fraction.*(19\.0%).*ledger\.jsonl"):
        run(path, max_bad_fraction=0.19)


def test_no_usable_row_is_an_error_that_names_ledger_and_reasons(run, write_jsonl):
    path = write_jsonl([chat("q", ""), chat("q", ""), chat("q")])
    with pytest.raises(DataError, match=r"(?s)none of the 3 rows.*ledger\.jsonl.*2 x empty answer.*1 x no answer"):
        run(path, max_bad_fraction=1.0)
    with pytest.raises(DataError, match=r"2 x empty answer, first \S+rows\.jsonl:1"):
        run(path, max_bad_fraction=1.0)
    with pytest.raises(DataError, match="no readable row"):
        run(write_jsonl([], "empty.jsonl"))
    with pytest.raises(DataError, match=r"data\.train is empty"):
        run()


def test_rows_without_targets_are_bad(run, write_jsonl):
    untrained = chat("q", "a")
    untrained["messages"][1]["weight"] = 0
    tokenized = run(write_jsonl([chat("q", "a"), untrained, {**chat("q", "a"), "weight": 0}]), max_bad_fraction=1.0)
    assert len(tokenized) == 1
    assert tokenized.tally.bad == {"nothing to train on": 2}


def long_row():
    return chat(
        "BEGIN " + "some words of a document " * 200 + "END",
        "the answer",
        "short question",
        "another answer",
        system="s",
    )


def test_overlong_drop_is_listed_but_is_no_fault(run, write_jsonl, tmp_path):
    tokenized = run(write_jsonl([chat("q", "a"), long_row()]), max_length_tokens=300, max_bad_fraction=0.0)
    assert (len(tokenized), tokenized.tally.overlong, tokenized.tally.bad) == (1, 1, {})
    (entry,) = ledger_of(tmp_path)
    assert entry["kind"] == "overlong"
    assert entry["origin"].endswith(":2")
    assert "the limit is 300" in entry["detail"]


def test_overlong_error_names_row_length_and_keys(run, write_jsonl):
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*limit is 300.*data\.max_length_tokens.*data\.overlong"):
        run(write_jsonl([chat("q", "a"), long_row()]), max_length_tokens=300, overlong="error")


@pytest.mark.parametrize("limit", [120, 300, 777])
def test_truncate_cuts_the_middle_of_the_document_and_nothing_else(run, write_jsonl, tokenizer, limit):
    tokenized = run(write_jsonl([long_row()]), max_length_tokens=limit, overlong="truncate")
    assert limit - 4 <= tokenized.lengths[0] <= limit
    assert tokenized.tally.truncated == 1
    text = tokenizer.decode(tokenized.row(0).input_ids)
    head, _, rest = text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")
    assert head.startswith("BEGIN some words")
    assert head.endswith("END")
    assert (
        rest.count("the answer<|im_end|>")
        == rest.count("another answer<|im_end|>")
        == rest.count("short question")
        == 1
    )


def test_truncate_never_cuts_answers(run, write_jsonl):
    rows = [chat("a short question", "an answer " * 100), {"messages": chat("q", "a")["messages"]}]
    tokenized = run(write_jsonl(rows), max_length_tokens=100, overlong="truncate")
    assert len(tokenized) == 1
    assert tokenized.tally.overlong == 1


def test_truncate_says_of_plain_text_that_it_is_never_cut(run, write_jsonl, tmp_path):
    assert (
        len(run(write_jsonl([{"text": "word " * 500}, {"text": "word"}]), max_length_tokens=99, overlong="truncate"))
        == 1
    )
    (entry,) = ledger_of(tmp_path)
    assert (entry["kind"], entry["reason"]) == ("overlong", "too long, and plain text is trained whole, never cut")


def test_truncate_takes_from_the_longest_turns_first(run, write_jsonl, tokenizer):
    row = chat("A" + " one two" * 100 + "Z", "a1", "B" + " one two" * 90 + "Y", "a2", "keep me whole", "a3", system="s")
    tokenized = run(write_jsonl([row]), max_length_tokens=200, overlong="truncate")
    text = tokenizer.decode(tokenized.row(0).input_ids)
    assert 190 <= tokenized.lengths[0] <= 200
    assert all(
        part in text for part in ("A one", "Z<|im_end|>", "B one", "Y<|im_end|>", "keep me whole", "a1", "a2", "a3")
    )


def test_the_cache_is_used_until_something_changes(run, write_jsonl, monkeypatch, tmp_path):
    path = write_jsonl([chat("q", "a")])
    first = run(path)
    with monkeypatch.context() as patch:
        patch.setattr(encode_blocks, "encode_block", lambda *_: pytest.fail("tokenized again"))
        assert run(path).fingerprint == first.fingerprint
        assert run(path, workers=2, packing="none", weighting="sample").fingerprint == first.fingerprint
    assert run(path, max_length_tokens=1000).fingerprint != first.fingerprint
    assert run(path, overlong="truncate").fingerprint != first.fingerprint
    write_jsonl([chat("q", "another")])
    assert run(path).fingerprint != first.fingerprint
    assert not list((tmp_path / "cache").glob(".*")), "temporary folders are gone"


def test_a_failed_run_leaves_nothing_in_the_cache(run, write_jsonl, monkeypatch, tmp_path):
    path = write_jsonl([chat("q", "a")])
    monkeypatch.setattr(encode_blocks, "encode_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(path)
    assert [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == []


def test_a_full_disk_keeps_the_whole_parts_for_the_next_call(run, write_jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PART_BLOCKS", 1)
    monkeypatch.setattr("ds_longft.data.blocks.BLOCK_BYTES", 500)
    path = write_jsonl([chat(f"question {i}", f"answer {i}") if i % 9 else "{" for i in range(50)])
    whole = run(path, max_bad_fraction=1.0, cache_dir=str(tmp_path / "whole"))
    write, written = module._write_part, []

    def full(folder, part, *rest):
        written.append(part)
        if len(written) == 4:
            (folder / f"rows-{part:05d}.arrow").write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, part, *rest)

    monkeypatch.setattr(module, "_write_part", full)
    with pytest.raises(DataError, match=r"No space left.*is kept.*data\.cache_dir"):
        run(path, max_bad_fraction=1.0)
    copy_ledger, copied = module.shutil.copyfileobj, []

    def full_again(part, ledger):
        copied.append(part)
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy_ledger(part, ledger)

    monkeypatch.setattr(module.shutil, "copyfileobj", full_again)
    with pytest.raises(DataError, match="No space left"):  # while the ledgers of the parts are put together
        run(path, max_bad_fraction=1.0)
    again = run(path, max_bad_fraction=1.0)
    assert written == [0, 1, 2, 3, *range(3, len(list(find_source(SourceConfig(path=path)).blocks())))]
    assert again.tally == whole.tally
    assert again.column("origin").tolist() == whole.column("origin").tolist()
    assert ledger_of(tmp_path / "cache") == ledger_of(tmp_path / "whole")


def test_what_is_odd_in_the_template_is_said_once(run, write_jsonl, tokenizer, tmp_path, capsys):
    path, odd = write_jsonl([chat("q", "a")]), copy.copy(tokenizer)
    odd.chat_template = "{% for m in messages %}{{ '|' + m.role + '|' + m.content }}{% endfor %}"
    for _ in range(2):
        tokenize_sources([SourceConfig(path=path)], odd, DataConfig(cache_dir=str(tmp_path)), progress=True)
    assert capsys.readouterr().err.count("learn to stop") == 1


def test_a_killed_run_is_taken_up_behind_its_whole_parts(run, write_jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PART_BLOCKS", 2)
    monkeypatch.setattr("ds_longft.data.blocks.BLOCK_BYTES", 500)
    path = write_jsonl([chat(f"question {i}", f"answer {i}") if i % 9 else "{" for i in range(100)])
    expected = run(path, max_bad_fraction=1.0, cache_dir=str(tmp_path / "whole"))
    encode, seen = encode_blocks.encode_block, []

    def killed(task, encoder):
        seen.append(task.block.first)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return encode(task, encoder)

    monkeypatch.setattr(encode_blocks, "encode_block", killed)
    with pytest.raises(KeyboardInterrupt):
        run(path, max_bad_fraction=1.0)
    again = run(path, max_bad_fraction=1.0)
    assert seen[6:][0] == seen[4], "the part under way is done again, the two before it are not"
    assert again.fingerprint == expected.fingerprint
    assert again.tally == expected.tally
    assert again.column("origin").tolist() == expected.column("origin").tolist()
    assert ledger_of(tmp_path / "whole") == ledger_of(tmp_path / "cache")


def test_processes_give_the_same_set_in_the_same_order(run, write_jsonl, monkeypatch, tmp_path):
    monkeypatch.setattr(encode_blocks, "INLINE_BYTES", 0)
    monkeypatch.setattr("ds_longft.data.blocks.BLOCK_BYTES", 2000)
    path = write_jsonl([chat(f"question {i}", f"answer {i} " * (i % 7 + 1)) if i % 10 else "{" for i in range(300)])
    one = run(path, max_bad_fraction=1.0)
    many = run(path, max_bad_fraction=1.0, workers=2, cache_dir=str(tmp_path / "other"))
    assert len(list(find_source(SourceConfig(path=path)).blocks())) > 5
    assert len(one) == len(many) == 270
    assert all((one.row(i).input_ids == many.row(i).input_ids).all() for i in range(270))
    assert one.tally == many.tally
    assert ledger_of(tmp_path / "cache") == ledger_of(tmp_path / "other")


def test_split_holds_out_rows_once_and_always_the_same(run, write_jsonl):
    tokenized = run(write_jsonl([chat(f"q{i}", f"a{i}") for i in range(40)]))
    train, held_out = tokenized.split(0.2, seed=1)
    origins = [part.row(i).origin for part in (train, held_out) for i in range(len(part))]
    assert (len(train), len(held_out)) == (32, 8)
    assert len(set(origins)) == 40
    assert (tokenized.split(0.2, seed=1)[1].column("origin") == held_out.column("origin")).all()
    assert (
        len({tokenized.fingerprint, train.fingerprint, held_out.fingerprint, tokenized.split(0.2, 2)[0].fingerprint})
        == 4
    )
    assert math.isclose(train.weight_sums("token").sum() + held_out.weight_sums("token").sum(), tokenized.targets.sum())
    with pytest.raises(DataError, match="eval_fraction"):
        tokenized.split(0.001, seed=1)


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from ds_longft.data.encode_blocks import _start_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, mp_context=get_context("forkserver"), initializer=_start_worker, initargs=(None,))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_killed_command(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True, env=env)
    assert int(command.stdout.readline()) != command.pid
    command.kill()
    command.communicate(timeout=30)  # its end is seen when no worker holds the other side any more
