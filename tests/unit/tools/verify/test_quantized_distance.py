"""How far a quantised base is from the unquantised model: the distance of the two models' own logits, and no silence."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ModelError
from ds_longft.exactness.finding import Finding
from ds_longft.model import load_packed
from ds_longft.model.load_packed import round_as_packed
from ds_longft.model.packed import FORMATS, quantize
from ds_longft.tools.verify.quantized_distance import check_distance
from tests.distributed.models import VOCAB, make_pack, reference_sum
from tests.unit.model.tiny import save_tiny
from tests.unit.tools.test_quantized_results import stored_fp8

CPU = torch.device("cpu")
PACKS = [make_pack([20, 1, 30], seed=0), make_pack([7], seed=1)]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": VOCAB}
    return save_tiny(tmp_path / "dense", "qwen3", **shape, initializer_range=0.05)


def distance(base: Path, original: Path | None = None, **model: Any) -> list[Finding]:
    content = {"model": {"path": str(base), **model}, "data": {"max_length_tokens": 64}}
    config = RunConfig.model_validate(content)
    return check_distance(config, original and str(original), PACKS, torch.float32, CPU)


@torch.no_grad()
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_it_is_that_of_the_two_models_alone(dense: Path, form: Any) -> None:
    losses, logits = [], []
    for rounded in (True, False):
        model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager")
        if rounded:
            round_as_packed(model, FORMATS[form])
        losses.append(
            float(sum(reference_sum(model, pack) for pack in PACKS) / sum(p.loss_weights.sum() for p in PACKS))
        )
        rows = []
        for pack in PACKS:
            for a, b in pairwise(pack.cu_seqlens.tolist()):
                of = model(input_ids=torch.from_numpy(pack.input_ids[None, a:b])).logits[0]
                rows.append(of[torch.from_numpy(pack.loss_weights[a:b] > 0)])
        every = torch.cat(rows)
        logits.append(every - every.mean(-1, keepdim=True))
    of_loss, of_logits = distance(dense, quantize=form)
    assert of_loss.measured.startswith(f"{losses[0]:.4f} and {losses[1]:.4f} (")
    assert of_loss.value == pytest.approx(losses[0], rel=1e-5)
    assert of_logits.value == pytest.approx(float((logits[0] - logits[1]).norm() / logits[1].norm()), rel=1e-4)
    assert of_logits.ok
    assert of_logits.value > 1e-3
    assert f"{len(logits[0])} targets" in of_logits.note


def test_weights_read_wrongly_are_far(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*args: Any) -> Any:
        codes, scales = quantize(*args)
        return (codes >> 4) | (codes << 4), scales

    monkeypatch.setattr(load_packed, "quantize", swapped)
    assert distance(dense, quantize="nf4")[1].ok is False


def test_a_checkpoint_that_is_quantised_is_compared_with_what_is_given(dense: Path, tmp_path: Path) -> None:
    stored = stored_fp8(tmp_path / "stored")
    (nothing,) = distance(stored)
    assert nothing.ok is None
    assert "--original" in nothing.note
    same = save_tiny(tmp_path / "same", "qwen3", hidden_size=128, intermediate_size=256, head_dim=32)
    assert distance(stored, same)[1].ok
    with pytest.raises(ModelError, match="another model"):
        distance(stored, dense)
    with pytest.raises(ModelError, match="quantised itself"):
        distance(stored, stored)


def test_where_there_is_nothing_to_compare(dense: Path) -> None:
    for model, says in (({}, "not quantised"), ({"quantize": "nf4", "random_weights": True}, "random weights")):
        (found,) = distance(dense, **model)
        assert (found.ok, says in found.note) == (None, True)
