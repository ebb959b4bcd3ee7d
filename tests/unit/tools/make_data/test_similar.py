import numpy as np
import pytest

from ds_longft.data.rows import Turn
from ds_longft.tools.make_data.similar import anchors, groups_sharing_text, near_duplicates, signature, windows
from tests.unit.tools.make_data.texts import chinese, english


def qa(question, answer="It is so."):
    return (Turn("user", question), Turn("assistant", answer))


def test_nearly_the_same_rows_are_found_and_others_are_not():
    rows = [
        qa(english(20, 0), english(5, 1)),
        qa(english(20, 2), english(5, 3)),
        qa(english(20, 0).replace("the", "a", 2), english(5, 1)),  # a few words changed
        qa(english(200, 4) + "\nWho crossed the harbour?", english(3, 5)),
        qa(english(200, 4) + "\nWhat was measured?", english(3, 6)),  # another question about the same document
        qa(chinese(20, 7), chinese(3, 8)),
        qa(chinese(20, 7), chinese(3, 8)),
    ]
    assert near_duplicates([signature(row) for row in rows], 0.8) == {2: 0, 6: 5}


def test_jaccard_is_measured():
    words = [f"w{i}" for i in range(400)]
    whole, half = (Turn("text", " ".join(words)),), (Turn("text", " ".join(words[:300])),)
    true = 296 / 396  # 5-grams in common over all
    assert np.mean(signature(whole) == signature(half)) == pytest.approx(true, abs=0.12)


def test_a_passage_ties_rows_together_wherever_it_stands():
    passage = english(10, 0)  # some 150 words
    rows = [
        qa(english(30, 1) + "\n" + passage + "\n" + english(30, 2)),
        qa("Something before. " + passage),
        qa(english(30, 3)),
        qa("A short question", "a short answer"),
        qa("A short question", "a short answer"),
        qa(chinese(10, 4), chinese(4, 5)),
        qa("问：" + chinese(10, 4)),
    ]
    group = groups_sharing_text([anchors(row) for row in rows], common=50)
    assert group[0] == group[1]
    assert group[5] == group[6]
    assert len(set(group.tolist())) == 5, "short phrases tie nothing"


def test_what_stands_everywhere_ties_nothing():
    rows = [qa(f"{english(8, 0)} only{seed} {english(20, seed)}") for seed in range(1, 9)]
    assert len(set(groups_sharing_text([anchors(row) for row in rows], common=50).tolist())) == 1
    assert len(set(groups_sharing_text([anchors(row) for row in rows], common=5).tolist())) == 8


def test_windows_are_of_their_words_alone():
    words = np.arange(100, dtype=np.uint64)
    assert len(windows(words, 32)) == 69
    assert (windows(words, 32)[10:20] == windows(words[10:51], 32)).all()
    assert len(windows(words[:3], 32)) == 1
    assert len(windows(words[:0], 32)) == 0
    assert len(np.unique(windows(words, 32))) == 69
