"""What is rehearsed is what lasts: no later step, evaluation, save or resume needs more memory than the rehearsal saw and
then spent. Every storage is counted while it is alive, on CPU ranks, through the engine that a run builds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import built_run, make_pack, tiny_config
from tests.unit.decide.tracked import Tracker

CPU = torch.device("cpu")
SLACK_BYTES = 64 << 10  # counters, sums and rounding up of a few vectors


@dataclass(frozen=True)
class CountedMemory:
    """A device of `total` bytes whose allocations are those that the tracker counts."""

    tracker: Tracker
    total: int

    def reset_peak(self) -> None:
        self.tracker.peak = self.tracker.now

    def now(self) -> int:
        return self.tracker.now

    def peak(self) -> int:
        return self.tracker.peak

    def free(self) -> int:
        return max(0, self.total - self.tracker.peak)

    def release(self) -> None:
        pass


def own(parameter: Any) -> torch.Tensor:
    """This rank's part of a parameter."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def peaks(rank: int, world: int, folder: str, stage: int, keys: dict[str, Any], total: int) -> Any:
    """The rehearsed peak, what was spent after it, and the peak of everything that follows, by name."""
    from ds_longft.train.checkpoint import rng_state
    from ds_longft.train.rehearse import choose_passes, rehearse, settle
    from ds_longft.train.step import apply_step, backpropagate, evaluate_pack
    from tests.distributed.dpo_cases import pair_pack

    pairs = "objective" in keys

    def pack(tokens: int) -> Any:
        made = (
            pair_pack([(tokens // 2, tokens // 4, tokens // 4)], seed=tokens) if pairs else make_pack([tokens], seed=1)
        )
        return made

    with Tracker() as tracker:
        memory = CountedMemory(tracker, total)
        built, layout = built_run(folder, {"zero_optimization": {"stage": stage}}, world, sp=world, **keys)
        engine, longest = built.engine, pack(512)
        accumulation = engine.gradient_accumulation_steps()
        before, state = {n: own(p).clone() for n, p in built.model.named_parameters()}, rng_state()
        settle(engine, layout, CPU)
        choose_passes(engine, "auto" if pairs else "one", longest, layout, CPU, memory)
        assert rehearse(engine, built.recompute, longest, layout, CPU, memory)
        rehearsed = memory.peak()
        moved = [n for n, p in built.model.named_parameters() if not torch.equal(own(p), before[n])]
        assert not moved, f"the rehearsal changed {moved}"
        assert all(torch.equal(a, b) for a, b in zip(state.values(), rng_state().values(), strict=True))
        del before
        spent = (
            sum(
                sum(m.base.out_features + (m.lora[0].out_features if m.lora else 0) for m in group.members)
                for keep in built.recompute.keep
                for group in keep.on_device
            )
            * (512 // world)
            * 4
        )
        found = {}

        def measure(name: str, work: Any) -> None:
            memory.reset_peak()
            work()
            found[name] = memory.peak()

        def step() -> None:
            packs = [pack(256)] * (accumulation - 1) + [longest]
            total_loss = backpropagate(engine, packs, 100.0, layout, CPU)
            apply_step(engine, float(total_loss), skip=False)

        def evaluate() -> None:
            engine.eval()
            evaluate_pack(engine, longest, layout, CPU)
            engine.train()

        for i in range(1, 5):
            measure(f"step {i}", step)
        measure("evaluation", evaluate)
        measure("save", lambda: engine.save_checkpoint(f"{folder}/saved", tag="it"))
        measure("step after the save", step)
        measure("resume", lambda: engine.load_checkpoint(f"{folder}/saved", tag="it", load_module_strict=False))
        measure("step after the resume", step)
        engine.destroy()
    return rehearsed, spent, found


LORA: dict[str, Any] = {"lora": {"r": 8}}
FULL: dict[str, Any] = {"lora": None}
DPO: dict[str, Any] = {"objective": "dpo"}
ACCUMULATED: dict[str, Any] = {"train": {"gradient_accumulation_steps": 3}}

CASES = [
    (stage, {**kind, **objective, **accumulation})
    for stage in (0, 1, 2, 3)
    for kind in (LORA, FULL)
    for objective in ({}, DPO)
    for accumulation in ({}, ACCUMULATED)
]
OFTEN = [(3, {**LORA}), (3, {**FULL, **ACCUMULATED}), (2, {**LORA, **DPO}), (1, {**FULL})]


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        pytest.param(*case, marks=[] if case in OFTEN else pytest.mark.slow, id=f"zero{case[0]} {json.dumps(case[1])}")
        for case in CASES
    ],
)
def test_no_later_peak_is_above_the_rehearsed_one(pools: Any, tmp_path: Path, stage: int, keys: dict[str, Any]) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "max_position_embeddings": 4096}
    tiny_config("llama", **shape).save_pretrained(tmp_path)
    for rehearsed, spent, found in pools(2).run(peaks, str(tmp_path), stage, keys, 64 << 20):
        assert spent > 0
        late = {
            name: peak - rehearsed - spent for name, peak in found.items() if peak > rehearsed + spent + SLACK_BYTES
        }
        assert not late, f"bytes above the rehearsed {rehearsed:,} and {spent:,} that were spent: {late}"
