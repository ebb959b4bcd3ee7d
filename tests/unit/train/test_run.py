"""What a run says before its first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ds_longft.config import RunConfig
from ds_longft.train.run import _header
from tests.distributed.models import tiny_config


@pytest.mark.parametrize(("warmup_steps", "said"), [(None, False), (4, False), (5, True)])
def test_a_warmup_longer_than_the_epochs_is_said(warmup_steps: int | None, said: bool, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    config = RunConfig.model_validate({"model": {"path": str(tmp_path)}, "optim": {"warmup_steps": warmup_steps}})
    layout: Any = SimpleNamespace(world=1, sp=1, dp=1)
    loader: Any = SimpleNamespace(steps_per_epoch=lambda epoch: 4, budget_tokens=64)
    state = cast(Any, SimpleNamespace(total_steps=4, step=0))
    text = _header(config, layout, torch.device("cpu"), loader, state, None)
    assert ("optim.warmup_steps is 5" in text) == said
