"""`verify` passes what is right, and finds planted faults by the right check with a message that names the cause."""

from __future__ import annotations

import functools
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml

from ds_longft.batch import Batch, Documents, Pack
from ds_longft.config.preflight import preflight
from ds_longft.config.run_config import RunConfig
from ds_longft.data.pack import build_pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.sft import SftObjective
from ds_longft.ranks.join import Agreement
from ds_longft.train.step import loss_scale
from tests.distributed.test_exact import LONGROPE
from tests.distributed.user_files import user_config

ALL = frozenset(range(1, 9))


@functools.cache
def agreed() -> Agreement:
    """Of a worker process: every one is a group with threads of its own."""
    return Agreement()


def verified(rank: int, world: int, content: dict[str, Any], checks: frozenset[int], fault: str | None) -> Any:
    """The findings, in a process where `fault` was planted."""
    from ds_longft.tools.verify.checks import verify_model
    from ds_longft.tools.verify.verified_run import VerifiedRun

    config = RunConfig.model_validate(content)
    settings, sp = preflight(config, world=world, local_world=world, device="cpu")
    with ExitStack() as stack:
        if fault is not None:
            FAULTS[fault](stack)
        subject = VerifiedRun.make(config, settings, sp, torch.device("cpu"), agreed(), tokens=160)
        findings, facts, text = verify_model(subject, checks)
    return findings, facts, str(text)


# The faults, each as somebody would make it.


def positions_of_packs_run_on(stack: ExitStack) -> None:
    def faulty(*args: Any, **kwargs: Any) -> Pack:
        pack = build_pack(*args, **kwargs)
        return replace(pack, position_ids=np.arange(pack.tokens))

    stack.enter_context(patch("ds_longft.data.tokenized.build_pack", faulty))


def positions_of_shards_run_on(stack: ExitStack) -> None:
    def faulty(self: SftObjective, batch: Batch) -> Any:
        s = batch.input_ids.shape[1]
        return plain(self, replace(batch, position_ids=torch.arange(s)[None] + s * self.layout.sp_rank))

    plain = SftObjective.forward
    stack.enter_context(patch.object(SftObjective, "forward", faulty))


def gradient_scaled_by_sp(stack: ExitStack) -> None:
    def faulty(total_weight: float, layout: ParallelLayout) -> float:
        return loss_scale(total_weight, layout) * layout.sp

    stack.enter_context(patch("ds_longft.train.step.loss_scale", faulty))


def label_over_the_border(stack: ExitStack) -> None:
    def faulty(*args: Any, **kwargs: Any) -> Pack:
        pack = build_pack(*args, **kwargs)
        last = pack.cu_seqlens[1:-1] - 1
        pack.labels[last], pack.loss_weights[last] = pack.input_ids[last + 1], 1.0
        return pack

    stack.enter_context(patch("ds_longft.data.tokenized.build_pack", faulty))


def mask_dropped(stack: ExitStack) -> None:
    def faulty(self: SftObjective, batch: Batch) -> Any:
        whole = sum(batch.documents.lengths)
        return plain(self, replace(batch, documents=Documents(torch.tensor([0, whole], dtype=torch.int32), (whole,))))

    plain = SftObjective.forward
    stack.enter_context(patch.object(SftObjective, "forward", faulty))


def rows_merged_in_packs(stack: ExitStack) -> None:
    def faulty(*args: Any, **kwargs: Any) -> Pack:
        pack = build_pack(*args, **kwargs)
        return replace(pack, cu_seqlens=np.delete(pack.cu_seqlens, 1))

    stack.enter_context(patch("ds_longft.data.tokenized.build_pack", faulty))


def weights_averaged_per_rank(stack: ExitStack) -> None:
    def faulty(engine: Any, packs: Any, total_weight: float, layout: ParallelLayout, device: torch.device) -> Any:
        from ds_longft.sequence.shard import shard

        total = torch.zeros((), dtype=torch.float64)
        for i, pack in enumerate(packs):
            if i:
                engine.step()
            batch = shard(pack, layout, device)
            share = total_weight / (float(batch.target_weights.sum().clamp_min(1e-30)) * layout.world * len(packs))
            loss = engine(batch) * share
            engine.backward(loss * loss_scale(total_weight, layout), scale_wrt_gas=False)
            total += loss.detach()
        return total

    stack.enter_context(patch("ds_longft.tools.verify.engine_checks.backpropagate", faulty))


def one_seed_for_all_ranks(stack: ExitStack) -> None:
    stack.enter_context(patch("ds_longft.train.engine.seed_dropout", lambda seed, rank: torch.manual_seed(seed)))


def adapter_saved_as_zeros(stack: ExitStack) -> None:
    from ds_longft.model import lora

    def faulty(model: Any) -> Any:
        return {name: torch.zeros_like(t) for name, t in lora.gather_adapter_state(model).items()}

    stack.enter_context(patch("ds_longft.train.weights.gather_adapter_state", faulty))


def frequencies_rounded_to_bf16(stack: ExitStack) -> None:
    from ds_longft.tools.verify import engine_checks

    def faulty(*args: Any, **kwargs: Any) -> Any:
        built = plain(*args, **kwargs)
        for module in built.model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.bfloat16().float()
        return built

    plain = engine_checks.build
    stack.enter_context(patch.object(engine_checks, "build", faulty))


def kernel_without_its_scale(stack: ExitStack) -> None:
    from ds_longft.sequence.kernels import kernel_by_name

    cpu = kernel_by_name("cpu")
    plain = cpu.forward

    def faulty(q: Any, *args: Any) -> Any:
        return plain(q * 1.05, *args)

    stack.enter_context(patch.object(cpu, "forward", faulty))


FAULTS = {
    f.__name__: f
    for f in (
        positions_of_packs_run_on,
        positions_of_shards_run_on,
        gradient_scaled_by_sp,
        label_over_the_border,
        mask_dropped,
        rows_merged_in_packs,
        weights_averaged_per_rank,
        one_seed_for_all_ranks,
        adapter_saved_as_zeros,
        frequencies_rounded_to_bf16,
        kernel_without_its_scale,
    )
}

PLANTED = [
    # fault, number of the check that has to fail, what its message has to say, checks to run
    ("gradient_scaled_by_sp", 1, r"scaled by sp \(multiplied by 2\)", {1}),
    ("weights_averaged_per_rank", 1, "weights are averaged per rank", {1}),
    ("mask_dropped", 2, "attention does not stop at the borders", {1, 2}),
    ("rows_merged_in_packs", 2, "borders between rows are missing", {2}),
    ("label_over_the_border", 3, "labels leak over a document border", {3}),
    ("positions_of_packs_run_on", 4, "position ids do not restart at 0 in each document", {4}),
    ("positions_of_shards_run_on", 4, "position ids have to restart at 0 in each document", {4}),
    ("frequencies_rounded_to_bf16", 4, "the size of bf16 rounding", {4}),
    ("one_seed_for_all_ranks", 5, "their random numbers start from one seed", {5}),
    ("adapter_saved_as_zeros", 6, "is empty or all zeros", {6}),
    ("kernel_without_its_scale", 7, "computes another attention", {7}),
]


@pytest.mark.parametrize(("fault", "number", "message", "checks"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_planted_fault_is_found(pools, tmp_path, fault, number, message, checks):
    content = user_config(tmp_path)
    if number == 5:
        content["lora"]["dropout"] = 0.2
    findings, _, _ = pools(2).run(verified, content, frozenset(checks), fault)[0]
    notes = [f.note for f in findings if f.ok is False and f.check.startswith(str(number))]
    assert notes, [f for f in findings if f.ok is False]
    assert any(re.search(message, note) for note in notes), notes


@pytest.mark.parametrize(
    ("world", "sp", "stage", "lora", "base"),
    [
        (2, 2, 3, True, "auto"), (2, 2, 2, False, "auto"), pytest.param(4, 2, 3, True, "auto", marks=pytest.mark.slow), (2, 1, 1, True, "auto"),
        (2, 2, 3, True, "host"),
    ],
    ids=["zero3", "full", "sp2_dp2", "dp2", "base_on_the_host"],
)  # fmt: skip
def test_what_is_right_passes(pools, tmp_path, world, sp, stage, lora, base):
    content = user_config(tmp_path, stage=stage)
    content["sp"], content["model"]["base"] = sp, base
    content["lora"] = {"r": 4, "dropout": 0.1} if lora else None
    findings, facts, text = pools(world).run(verified, content, ALL, None)[0]
    assert [f for f in findings if f.ok is False] == []
    assert {f.check[0] for f in findings} == set("12345678")
    assert facts["kernel"] == "cpu"
    assert "<|im_end|>" in text


@pytest.mark.parametrize(("form", "base"), [("nf4", "auto"), pytest.param("int8", "host", marks=pytest.mark.slow)])
def test_a_quantised_base_passes_and_says_how_far_it_is(pools, tmp_path, form, base):
    """Its yardstick is the dequantised base."""
    content = user_config(tmp_path)
    content["sp"], content["model"] = 2, content["model"] | {"quantize": form, "base": base}
    findings, _, _ = pools(2).run(verified, content, frozenset({1, 6, 8}), None)[0]
    assert [f for f in findings if f.ok is False] == []
    assert {f.check[0] for f in findings} == set("168")
    assert findings[-1].what == "logits, relative distance"
    assert findings[-1].value > 1e-3


@pytest.mark.parametrize(("rope_type", "stage"), [("dynamic", 2), ("longrope", 3)])
def test_rope_that_goes_by_the_length_passes(pools, tmp_path, rope_type, stage):
    """Rows on both sides of the length from which it turns otherwise."""
    rope = {
        "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
        "longrope": LONGROPE["rope_parameters"] | {"original_max_position_embeddings": 48},
    }[rope_type]
    content = user_config(tmp_path, stage=stage, rope_parameters=rope, max_position_embeddings=48)
    findings, _, _ = pools(2).run(verified, content, frozenset({1, 4, 6}), None)[0]
    assert [f for f in findings if f.ok is False] == []
    assert {f.check[0] for f in findings} == set("146")


def test_gradients_dealt_round_robin_are_verified(pools, tmp_path):
    """DeepSpeed's own reading of gradients raised over sizes."""
    content = user_config(tmp_path, stage=2)
    zero = {"stage": 2, "round_robin_gradients": True}
    Path(content["ds_config"]).write_text(json.dumps({"zero_optimization": zero}))
    findings, _, _ = pools(2).run(verified, content, frozenset({1}), None)[0]
    assert findings
    assert [f for f in findings if f.ok is False] == []


def first_step(rank: int, world: int, content: dict[str, Any], fault: str | None) -> Any:
    """What `train.verify_first` says; None, or its message."""
    from ds_longft.data.loader import StepLoader
    from ds_longft.errors import ModelError
    from ds_longft.exactness.first_step import check_first_step, raise_if_wrong
    from ds_longft.model.read_model import load_tokenizer
    from ds_longft.train.engine import build
    from ds_longft.train.install import known_run
    from ds_longft.train.sets import tokenized
    from ds_longft.train.step import backpropagate

    config = RunConfig.model_validate(content)
    settings, sp = preflight(config, world=world, local_world=world, device="cpu")
    agreement, layout, device = agreed(), ParallelLayout.create(sp), torch.device("cpu")
    with ExitStack() as stack:
        if fault is not None:
            FAULTS[fault](stack)
        train_set, _ = agreement.rank0_first(
            lambda: tokenized(config, load_tokenizer(config.model), 259, progress=False)
        )
        loader = StepLoader(
            train_set, data=config.data, dp=layout.dp, dp_rank=layout.dp_rank, sp=sp, accumulation=2, seed=0, pad_id=0
        )
        steps = loader.steps(0)
        step = next(steps)
        steps.close()
        built = build(known_run(config, settings, layout, device), layout, device)
        findings = check_first_step(
            built.engine, step, layout, device, backpropagate=backpropagate, gather=agreement.gather, vocab_size=259,
            dtype=torch.float32,
        )  # fmt: skip
    said = None
    try:
        raise_if_wrong(findings)
        assert len(findings) >= 11
    except ModelError as error:
        said = f"{error.exit_code}: {error}"
    return said


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gradient_scaled_by_sp", r"scaled by sp"),
        pytest.param("mask_dropped", "attention does not stop at the borders", marks=pytest.mark.slow),
        pytest.param("label_over_the_border", "labels leak over a document border", marks=pytest.mark.slow),
    ],
)
def test_verify_first_stops_a_wrong_run(pools, tmp_path, fault, message):
    says = pools(2).run(first_step, user_config(tmp_path), fault)
    assert all(text.startswith("64: ") and message in text for text in says), says


@pytest.mark.parametrize(("world", "stage"), [(2, 3), (4, 2)])
def test_verify_first_passes_a_right_run(pools, tmp_path, world, stage):
    content = user_config(tmp_path, stage=stage)
    content["sp"] = 2
    assert pools(world).run(first_step, content, None) == [None] * world


def test_command_line_end_to_end(tmp_path, capfd):
    """It starts its own ranks, cuts the model to its first layer, prints one JSON object, and ends with 0."""
    from ds_longft.cli import main

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(user_config(tmp_path)))
    assert main(["verify", str(path), "--sp", "2", "--layers", "1", "--tokens", "96", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert printed["ok"] is True
    assert printed["sp"] == printed["ranks"] == 2
    assert printed["model"].startswith("the first 1 layers of")
    assert {f["check"][0] for f in printed["findings"]} == set("12345678")
