"""The same faults in preference training, where it runs code of its own: pairs as packs, two backward passes a pack, a
reference beside the model, a loss with settings.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_longft.config.read import load_run_config
from ds_longft.errors import CheckpointError
from ds_longft.train.checkpoint import Checkpoints
from ds_longft.train.resume_rules import refuse_another_run, what_decides
from tests.faults.alone import Alone
from tests.faults.assets import pair_keys
from tests.faults.ranks import CRASH, Launcher, checkpoints, trace
from tests.faults.test_resume import assert_close, cut


@pytest.fixture(scope="module")
def keys(launcher: Launcher) -> tuple[str, ...]:
    return pair_keys(launcher.config)


@pytest.fixture(scope="module")
def golden_pairs(launcher: Launcher, keys: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("pairs") / "out"
    codes, run = launcher.run(output, *keys)
    assert codes == [0, 0], run.text()
    return output


def test_stopped_between_packs_then_killed_between_passes(
    launcher: Launcher, keys: tuple[str, ...], golden_pairs: Path, tmp_path: Path
) -> None:
    """F7: step 3 is given up after its first pack. F1: in step 5 the gradient of the chosen answers is there, that of
    the rejected ones is not. The third start makes the losses of a run that nothing happened to.
    """
    output = tmp_path / "out"
    codes, run = launcher.run(output, *keys, faults={1: {"point": "side", "step": 3, "do": "SIGUSR1"}})
    assert codes == [75, 75], run.text()
    assert checkpoints(output) == [2]
    codes, run = launcher.run(output, *keys, faults={1: {"point": "side", "step": 5, "do": "kill"}}, timeout_s=40)
    assert codes[1] == CRASH
    assert codes[0] not in (0, None), "the peer must end by itself, and not well"
    assert checkpoints(output) == [2, 4]
    codes, run = launcher.run(output, *keys)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden_pairs)


@pytest.mark.slow
def test_stopped_in_an_evaluation(
    launcher: Launcher, keys: tuple[str, ...], golden_pairs: Path, tmp_path: Path
) -> None:
    """F7: it is made up for."""
    output = tmp_path / "out"
    codes, run = launcher.run(output, *keys, faults={1: {"point": "eval", "step": 4, "do": "SIGTERM"}})
    assert codes == [75, 75], run.text()
    assert checkpoints(output) == [2, 4]
    codes, run = launcher.run(output, *keys)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden_pairs)


def test_other_sp_and_one_pass(launcher: Launcher, keys: tuple[str, ...], golden_pairs: Path, tmp_path: Path) -> None:
    """F17; and the other number of passes changes no loss."""
    output = Path(shutil.copytree(golden_pairs, tmp_path / "out"))
    expected = cut(output)
    changed = ("--sp", "1", "--train.gradient_accumulation_steps", "1", "--dpo.passes", "one")
    codes, run = launcher.run(output, *keys, *changed)
    assert codes == [0, 0], run.text()
    assert "resumed from" in run.text(0)
    assert_close(output, expected)


@pytest.mark.slow
def test_other_number_of_ranks_beside_a_frozen_copy(launcher: Launcher, keys: tuple[str, ...], tmp_path: Path) -> None:
    """F18 with all weights trained: the reference is in no checkpoint, and read from the model's folder again. Decayed
    and other weights are two groups of the optimizer, each with its own settings and count of steps.
    """
    output = tmp_path / "out"
    full = tuple(key for key in keys if key not in ("--lora.dropout", "0"))
    full += ("--lora", "null", "--optim.learning_rate", "1e-3", "--optim.weight_decay", "0.3")
    codes, run = launcher.run(output, *full)
    assert codes == [0, 0], run.text()
    expected = cut(output)
    codes, run = launcher.run(output, *full, "--sp", "1", world=1)
    assert codes == [0], run.text()
    assert "was written by 2 ranks" in run.text(0)
    assert_close(output, expected)


def test_another_loss_is_refused(keys: tuple[str, ...], golden_pairs: Path) -> None:
    """F19: half a run with another beta would be a run of neither."""
    checkpoints = Checkpoints(golden_pairs, Alone(), keep=2)  # type: ignore[arg-type]
    found = checkpoints.find("auto")
    assert found is not None
    path, state = found
    engine = json.loads((golden_pairs / "ds_config.json").read_text())

    def go_on_with(*changed: str) -> None:
        config = load_run_config(["--config", str(golden_pairs / "config.yaml"), *changed])
        layout: Any = SimpleNamespace(dp=1)
        refuse_another_run(path, state, replace(state, decides=what_decides(config, engine, layout)))

    go_on_with()
    go_on_with("--dpo.passes", "one", "--dpo.reference", "precomputed", "--optim.learning_rate", "1e-3")
    with pytest.raises(CheckpointError, match=r"dpo.beta was 0.1 and is 0.3 now; dpo.rpo_alpha was 0.0 and is 1.0 now"):
        go_on_with("--dpo.beta", "0.3", "--dpo.rpo_alpha", "1.0")
    with pytest.raises(CheckpointError, match=r"dpo.loss was sigmoid and is ipo now. Undo the change"):
        go_on_with("--dpo.loss", "ipo")
    with pytest.raises(CheckpointError, match="objective was sft and is dpo now"):
        refuse_another_run(path, replace(state, decides={"objective": "sft"}), state)
