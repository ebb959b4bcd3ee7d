"""Loss by position under sp: two ranks with half a text each count what one rank with all of it counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.distributed.pool import WorkerPool


def case(rank: int, world: int, folder: str, sp: int, window: int) -> NDArray[np.float64]:
    import torch

    from ds_longft.layout import ParallelLayout
    from ds_longft.sequence.attention import ULYSSES, register
    from ds_longft.tools.evaluate.position_loss import read_in_windows, token_losses
    from ds_longft.tools.evaluate.subject import find_subject, load_subject

    register()
    loaded = load_subject(find_subject(folder), torch.device("cpu"), attention=ULYSSES)
    ids = torch.randint(3, 128, (61,), generator=torch.Generator().manual_seed(0)).tolist()
    layout = ParallelLayout.create(sp) if sp > 1 else ParallelLayout(world, rank, 1)
    at, losses = token_losses(loaded, read_in_windows(ids, window, sp), layout, "auto")
    return np.stack([np.bincount(at, losses, minlength=61), np.bincount(at, minlength=61)])


DYNAMIC = {"max_position_embeddings": 20, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}}


@pytest.mark.parametrize(("window", "rope"), [(61, {}), (24, {}), (24, DYNAMIC)])
def test_two_ranks_count_what_one_counts(
    pools: Callable[[int], WorkerPool], tmp_path: Path, window: int, rope: dict[str, Any]
) -> None:
    from tests.unit.model.tiny import save_tiny

    folder = str(save_tiny(tmp_path / "model", **rope))
    together = sum(pools(2).run(case, folder, 2, window))
    alone = pools(2).run(case, folder, 1, window)[0]
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-6)
    np.testing.assert_array_equal(together[1], alone[1])
