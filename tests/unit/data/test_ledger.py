from ds_longft.data.ledger import Entry, Ledger, Tally


def test_each_reason_is_told_with_its_count_and_its_first_row(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.add(Entry("a.jsonl:3", "no answer"))
        ledger.add(Entry("a.jsonl:4", "broken JSON", "Expecting\n  value" + "." * 1000))
        ledger.add(Entry("a.jsonl:5", "broken JSON", "another"))
        ledger.add(Entry("a.jsonl:6", "an earlier row has the same id", "doc0", "repeated"))
        ledger.add(Entry("a.jsonl:7", "too long, and so on", "9 tokens", "overlong"))
        ledger.add(Entry("a.jsonl:8", "too long", "8 tokens", "overlong"))
        ledger.add(Entry("a.jsonl:9", "nearly the same", "", "set_aside"))
    tally = ledger.tally
    assert (tally.bad_rows, tally.repeated, tally.unusable_rows, tally.overlong) == (3, 1, 4, 2)
    assert tally.left_out == {
        "no answer": 1, "broken JSON": 2, "repeated id": 1, "too long": 2, "nearly the same": 1,
    }  # fmt: skip
    assert set(tally.first) == set(tally.left_out)
    lines = tally.reasons().split("\n  - ")
    assert lines[1].startswith("2 x broken JSON, first a.jsonl:4 (Expecting value...")
    assert len(lines[1]) < 300
    assert "2 x longer than data.max_length_tokens (see data.overlong), first a.jsonl:7 (9 tokens)" in lines
    assert "1 x no answer, first a.jsonl:3" in lines
    assert "1 x repeated id, first a.jsonl:6 (doc0)" in lines


def test_a_tally_kept_without_first_rows_can_still_be_told():
    assert Tally(read=1, bad={"no answer": 1}).reasons() == "\n  - 1 x no answer"
