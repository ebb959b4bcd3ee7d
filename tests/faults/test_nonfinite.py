"""F9: a loss or gradient that is not finite on one rank never reaches the weights, whatever ZeRO stage and dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.ranks import Launcher, checkpoints, status, trace


def poisoned_step(rank: int, world: int, stage: int, bf16: bool, clip: float, lora: bool, value: float) -> Any:
    """Weights before and after a step whose gradient is `value` on rank 1 alone, and after a good one behind it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from ds_longft.layout import ParallelLayout
    from ds_longft.objectives.sft import SftObjective
    from ds_longft.sequence.attention import ULYSSES, register
    from ds_longft.train.step import apply_step, backpropagate_pack
    from tests.distributed.models import make_pack, tiny_config, tiny_model
    from tests.distributed.test_exact import prepared

    register()
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = prepared(tiny_model(tiny_config("llama"), attn=ULYSSES, dtype=dtype, std=0.08), lora).to(dtype)
    layout = ParallelLayout.create(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=SftObjective(model, layout),
        optimizer=torch.optim.AdamW(trained, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": clip,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )

    def weights() -> torch.Tensor:
        if stage == 0 and not bf16:
            whole = [p.detach().clone() for p in trained]
        elif stage == 0:
            whole = [p.detach().float() for p in trained]
        else:
            whole = [safe_get_full_fp32_param(p).clone() for p in trained]
        return torch.cat([w.flatten() for w in whole])

    def step(scale: float) -> Any:
        loss = backpropagate_pack(engine, make_pack([40, 24], seed=0), scale, layout, torch.device("cpu"))
        return apply_step(engine, float(loss), skip=True)

    start = weights()
    bad = step(value if rank == 1 else 1e-3)
    after_bad = weights()
    good = step(1e-3)
    after_good = weights()
    engine.destroy()
    return bad, torch.equal(start, after_bad), good, bool(after_good.isfinite().all()), torch.equal(start, after_good)


CASES = [
    (stage, bf16, clip, value)
    for stage in (0, 1, 2, 3)
    for bf16 in (False, True)
    for clip, value in ((1.0, float("nan")), (0.0, float("inf")))
]


@pytest.mark.parametrize(("stage", "bf16", "clip", "value"), CASES)
def test_weights_stay(pools, stage: int, bf16: bool, clip: float, value: float) -> None:
    for bad, unchanged, good, finite, stuck in pools(2).run(poisoned_step, stage, bf16, clip, stage % 2 == 0, value):
        assert bad == ("the gradient is not finite", None)
        assert unchanged
        assert good[0] is None
        assert finite
        assert not stuck, "the next step must train again"


def test_run_ends_with_70_and_names_the_rows(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    fault = {"point": "poison", "step": 3, "what": "loss"}
    codes, run = launcher.run(output, faults={1: fault})
    assert codes == [70, 70], run.text()
    assert status(output)["exit_code"] == 70
    report = json.loads((output / "nonfinite-step-3.json").read_text())
    assert [[p["loss_is_finite"] for p in rank["packs"]] for rank in report["ranks"]] == [[True, True], [False, False]]
    assert all("rows.jsonl:" in p["origins"][0] for rank in report["ranks"] for p in rank["packs"])
    assert checkpoints(output) == [2]
    codes, run = launcher.run(output)  # without the fault it goes on as if nothing had been
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


def test_skip_and_at_most_so_many_in_a_row(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    keys = ["--train.on_nonfinite", "skip", "--train.max_skipped_in_a_row", "2"]
    codes, run = launcher.run(output, *keys, faults={1: {"point": "poison", "step": 3, "steps": 2, "what": "gradient"}})
    assert codes == [0, 0], run.text()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "skipped" in r] == [3, 4]
    assert all(r["loss"] is not None for r in records if "loss" in r and "skipped" not in r)
    output = tmp_path / "out3"
    codes, run = launcher.run(output, *keys, faults={1: {"point": "poison", "step": 3, "steps": 3, "what": "loss"}})
    assert codes == [70, 70], run.text()
    assert "2 steps before it were skipped" in run.text(0)
