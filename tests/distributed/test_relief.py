"""A full GPU in the middle of a step: what was kept is given back and the step goes on, to the same bits, on whichever rank
and in whichever phase it happens. Operations are made to fail as they do when memory runs out, on CPU ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_longft.sequence.relief import TRIED_ONCE
from tests.distributed.models import built_run, make_pack, tiny_config
from tests.distributed.test_rehearsed_memory import CountedMemory
from tests.unit.decide.tracked import Tracker

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"lora": {"r": 8}}
HOST: dict[str, Any] = {"train": {"offload_host_gib": 1.0, "recompute": "keep_attention"}}
PHASES = ("forward", "backward", "optimizer")


class Failing(TorchDispatchMode):
    """Makes the operation number `at` of a phase fail `times` times; counts the operations of each phase."""

    def __init__(self, phase: str, at: int, times: int) -> None:
        super().__init__()
        self.phase, self.at, self.times = phase, at, times
        self.now, self.counts = "", dict.fromkeys((*PHASES, ""), 0)
        self.failed, self.func = 0, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        again = self.failed and self.failed < self.times and func is self.func
        if not func.name().startswith(TRIED_ONCE):
            self.counts[self.now] += 1
        first = not self.failed and self.now == self.phase and self.counts[self.now] == self.at
        if first or again:
            self.failed, self.func = self.failed + 1, func
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB.")
        return func(*args, **(kwargs or {}))


def three_steps(
    rank: int, world: int, folder: str, keys: dict[str, Any], phase: str, share: float, times: int, counts: Any
) -> Any:
    """Losses and trained weights of three steps, in the second of which an operation of rank 1 fails.

    `share`: which operation of the phase, by its place in it. `counts`: of each phase, from a run without failures.
    """
    from ds_longft.sequence.shard import shard
    from ds_longft.train.rehearse import rehearse, settle
    from ds_longft.train.step import apply_step

    built, layout = built_run(folder, {"zero_optimization": {"stage": 3}}, world, sp=world, **keys)
    engine, pack = built.engine, make_pack([200, 56], seed=3)
    with Tracker() as tracker:
        memory = CountedMemory(tracker, 1 << 40)  # room for all linears
        settle(engine, layout, CPU)
        rehearse(engine, built.recompute, pack, layout, CPU, memory)
    kept = sum(len(keep.on_device) for keep in built.recompute.keep)
    relief = built.recompute.relief(CPU)
    assert relief is not None
    assert kept or keys == HOST
    at = max(1, round(share * counts[rank][phase])) if counts and rank == 1 else 0
    failing = Failing(phase, at, times)
    losses, given = [], []
    for step in range(3):
        counting = step == 1
        with failing, relief:
            failing.now = "forward" if counting else ""
            loss = engine(shard(pack, layout, CPU))
            failing.now = "backward" if counting else ""
            engine.backward(loss * world / 200.0, scale_wrt_gas=False)
            failing.now = "optimizer" if counting else ""
            apply_step(engine, float(loss.detach()), skip=False)
        losses.append(float(loss.detach()))
        given.append(relief.take_note())
    weights = [getattr(p, "ds_tensor", p).detach().clone() for p in built.model.parameters() if p.requires_grad]
    still = sum(len(keep.on_device) for keep in built.recompute.keep)
    host = sum(keep.input == "host" for keep in built.recompute.keep)
    engine.destroy()
    return losses, weights, given, (kept, still, host), failing.counts, failing.failed


def model(folder: Path) -> str:
    shape = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    tiny_config("llama", **shape).save_pretrained(folder)
    return str(folder)


FAILURES = [
    # phase, which of its operations, how often it fails, whether anything is kept then
    ("forward", 0.95, 3, True),
    ("backward", 0.3, 2, True),
    ("optimizer", 0.5, 1, False),
]


@pytest.mark.parametrize(
    ("keys", "failures"), [(LORA, FAILURES), ({"lora": None}, FAILURES[1:2])], ids=["adapters", "all weights"]
)
def test_a_step_goes_on_to_the_same_bits(pools: Any, tmp_path: Path, keys: Any, failures: Any) -> None:
    folder = model(tmp_path)
    quiet = pools(2).run(three_steps, folder, keys, "", 0.0, 0, None)
    counts = [rank[4] for rank in quiet]
    for phase, share, times, gives in failures:
        found = pools(2).run(three_steps, folder, keys, phase, share, times, counts)
        for mine, undisturbed in zip(found, quiet, strict=True):
            assert mine[0] == undisturbed[0], (phase, share)
            assert all(torch.equal(a, b) for a, b in zip(mine[1], undisturbed[1], strict=True)), (phase, share)
        assert found[1][5] == times, (phase, share)
        kept, still, _ = found[1][3]
        assert found[0][3][1] == kept, "the other rank keeps what it kept"
        assert (found[1][2][1] > 0) == gives, (phase, share)
        assert (still < kept) == gives
        assert found[1][2][2] == 0, "given back for good: the next step has nothing to give for it"


def test_layer_inputs_leave_for_the_host_when_nothing_else_is_left(pools: Any, tmp_path: Path) -> None:
    folder = model(tmp_path)
    quiet = pools(2).run(three_steps, folder, HOST, "", 0.0, 0, None)
    counts = [rank[4] for rank in quiet]
    found = pools(2).run(three_steps, folder, HOST, "backward", 0.2, 2, counts)
    for mine, undisturbed in zip(found, quiet, strict=True):
        assert mine[0] == undisturbed[0]
        assert all(torch.equal(a, b) for a, b in zip(mine[1], undisturbed[1], strict=True))
    assert found[0][3][2] == 0
    assert found[1][3][2] == 2, "two layers' inputs went, one for each failure"


@pytest.mark.slow
def test_it_ends_when_nothing_is_left(pools: Any, tmp_path: Path) -> None:
    folder = model(tmp_path)
    counts = [rank[4] for rank in pools(2).run(three_steps, folder, LORA, "", 0.0, 0, None)]
    with pytest.raises(AssertionError, match="OutOfMemoryError"):
        pools(2).run(three_steps, folder, LORA, "backward", 0.5, 1000, counts, timeout_s=15)
