"""Answers of prompts that are split over ranks are those of one process, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool

Made = tuple[list[list[int]], list[list[float]]]


def case(rank: int, world: int, folder: str, sp: int, lengths: list[int], new: int) -> Made:
    """Tokens, and the logits before the third of them."""
    import torch

    from ds_longft.layout import ParallelLayout
    from ds_longft.tools.evaluate.cached_attention import CACHED, register
    from ds_longft.tools.evaluate.generate import ALONE, Reader, generate
    from ds_longft.tools.evaluate.subject import find_subject, load_subject

    register()
    loaded = load_subject(find_subject(folder), torch.device("cpu"), attention=CACHED)
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (n,), generator=rng).tolist() for n in lengths]
    layout = ParallelLayout.create(sp) if sp > 1 else ALONE
    tokens = generate(loaded, prompts, max_new_tokens=new, stop_ids=set(), layout=layout)
    reader = Reader(loaded, layout)
    reader.read(prompts, 2)
    for i in range(2):
        logits = reader.add([reply[i] for reply in tokens])
    return tokens, logits.tolist()


DYNAMIC = {"max_position_embeddings": 20, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}}
GQA = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "changed", "sp", "lengths"),
    [
        ("llama", GQA, 2, [41, 6, 30]),
        ("llama", GQA, 3, [41, 6, 30]),
        ("llama", DYNAMIC, 2, [41, 15]),
        ("mistral", {}, 3, [50, 3]),  # a window
        ("gemma2", {}, 2, [3, 44]),  # a window in every other layer, a cap
        ("gpt_oss", {}, 2, [37]),  # a window and sinks
    ],
)
def test_ranks_answer_what_one_answers(
    pools: Callable[[int], WorkerPool],
    tmp_path: Path,
    family: str,
    changed: dict[str, Any],
    sp: int,
    lengths: list[int],
) -> None:
    import torch

    from tests.unit.model.tiny import save_tiny

    folder = str(save_tiny(tmp_path / "model", family, **changed))
    together = pools(sp).run(case, folder, sp, lengths, 8)
    tokens, logits = pools(sp).run(case, folder, 1, lengths, 8)[0]
    for rank_tokens, rank_logits in together:
        assert rank_tokens == tokens
        torch.testing.assert_close(torch.tensor(rank_logits), torch.tensor(logits), rtol=1e-5, atol=1e-5)
