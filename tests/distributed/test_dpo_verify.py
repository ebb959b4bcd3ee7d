"""`verify` and `train.verify_first` on preference pairs: a right run passes, planted faults are found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_verify import ALL, first_step, verified
from tests.distributed.user_files import user_config


def pair_config(folder: Path, *, stage: int = 3, lora: bool = True, **dpo: Any) -> dict[str, Any]:
    """The user's files, with pairs in the place of chats."""
    content = user_config(folder, stage=stage)
    rng = random.Random(0)

    def words(n: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=n))

    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(24):
            row = {
                "prompt": words(rng.randint(4, 40)),
                "chosen": words(rng.randint(2, 20)),
                "rejected": words(rng.randint(2, 20)),
            }
            file.write(json.dumps(row) + "\n")
    content |= {"objective": "dpo", "dpo": dpo, "sp": 2}
    return content if lora else content | {"lora": None}


@pytest.mark.parametrize(
    ("world", "stage", "lora", "dpo"),
    [
        (2, 3, True, {"passes": "two"}),
        pytest.param(4, 2, True, {"loss": "ipo", "rpo_alpha": 0.5}, marks=pytest.mark.slow),
        (2, 3, False, {"beta": 0.5}),
    ],
)
def test_a_right_run_passes(pools, tmp_path, world, stage, lora, dpo):
    found, facts, text = pools(world).run(verified, pair_config(tmp_path, stage=stage, lora=lora, **dpo), ALL, None)[0]
    assert [(f.check, f.what, f.measured, f.note) for f in found if f.ok is False] == []
    assert {f.check[0] for f in found} == set("12345678")
    assert facts["documents"] % 2 == 0
    assert text.endswith("<|im_end|>")


def test_a_planted_fault_is_found(pools, tmp_path):
    found, _, _ = pools(2).run(verified, pair_config(tmp_path), frozenset({1}), "gradient_scaled_by_sp")[0]
    assert any("scaled by sp" in f.note for f in found if f.ok is False)


def test_verify_first(pools, tmp_path):
    assert pools(2).run(first_step, pair_config(tmp_path), None) == [None] * 2
    says = pools(2).run(first_step, pair_config(tmp_path), "gradient_scaled_by_sp")
    assert all("scaled by sp" in text for text in says), says
