"""Layers that carry a state, split over ranks, against plain transformers with each document alone: to 1e-10 in float64.

Delta rules, norms and scans of transformers compute in float32 whatever they are given. Here `torch.float32` is
float64 while they run, in the reference as in ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_longft.sequence.state import spread, work_in_pieces
from tests.distributed import test_engine
from tests.distributed.models import reference_sum
from tests.distributed.test_engine import baseline_step, one_step
from tests.distributed.test_exact import PACKS, assert_equal, in_float64, wide_gradients, wide_reference

MOE = {
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4,
}  # fmt: skip
ODD = {**DELTA, "linear_num_key_heads": 3, "linear_num_value_heads": 9}
MAMBA2 = {
    "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 5, "conv_kernel": 4, "chunk_size": 16,
    "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_d_conv": 4, "mamba_chunk_size": 16,
    "hidden_size": 24, "head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 3, "attention_head_dim": 8,
}  # fmt: skip
NEMOTRON = {
    **MAMBA2,
    **MOE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layers_block_type": ["mamba", "mlp", "attention", "mamba"],
    "num_hidden_layers": 4,
}
GRANITE = {
    **MAMBA2,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_hidden_layers": 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 32,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next": ("qwen3_next", {**DELTA, "num_experts": 0}),
    "Qwen3-Next, 9 value and 3 key heads": ("qwen3_next", {**ODD, "num_experts": 0}),
    "Qwen3.5": ("qwen3_5_text", DELTA),
    "Qwen3.5, 9 value and 3 key heads": ("qwen3_5_text", ODD),
    "OLMo-Hybrid": ("olmo_hybrid", {**ODD, "linear_num_key_heads": 9}),
    "Kimi-Linear": ("kimi_linear", {
        **MOE, "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "dense"], "linear_num_heads": 5, "linear_head_dim": 8,
        "kv_lora_rank": 12, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
    }),
    "Nemotron-H": ("nemotron_h", NEMOTRON),
    "Granite-4-H": ("granitemoehybrid", GRANITE),
    "Bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 48, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "mamba_rms_norm": True}),
    "Falcon-H1 without norm": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 48, "mamba_rms_norm": False}),
    "Jamba": ("jamba", {**MOE, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 5, "mamba_dt_rank": 4}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "MiniMax": ("minimax", {**MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8, "num_attention_heads": 5, "num_key_value_heads": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_on_two_ranks(pools, name):
    family, changes = FAMILIES[name]
    ours = pools(2).run(wide_gradients, family, changes, False, "full", False, 2, PACKS)[0]
    assert_equal(ours, wide_reference(family, changes, False, False, PACKS))


ONES = ([1] * 7 + [30, 1, 1], [1], [2, 1, 3, 1])
SHORT = ([5], [2, 1, 1], [4, 3])  # ranks with one to three tokens: fewer than a convolution looks back
WHOLE = {"whole": True}
CASES: dict[str, tuple[str, bool, str, int, int, Any, dict[str, Any]]] = {
    # name: family, LoRA, recompute policy, world, sp, packs, ways to save memory
    "delta, one process": ("Qwen3-Next", False, "none", 2, 1, PACKS, {}),
    "delta, 9 heads on 4 ranks, one-token documents": ("Qwen3-Next, 9 value and 3 key heads", False, "full", 4, 4, ONES, {}),
    "delta, 9 heads on 2 ranks, twice": ("Qwen3.5, 9 value and 3 key heads", True, "sqrt", 4, 2, PACKS, {}),
    "delta, few tokens": ("Qwen3.5", False, "every_k", 4, 4, SHORT, {}),
    "delta, whole documents": ("Qwen3-Next", True, "keep_attention", 2, 2, PACKS, WHOLE),
    "delta, tiles and inputs on the host": ("Qwen3.5", True, "full", 2, 2, PACKS, {"tile": 7, "host": ("input",)}),
    "delta, 9 heads of keys": ("OLMo-Hybrid", True, "keep_attention", 3, 3, ONES, {}),
    "kimi, 5 heads on 4 ranks": ("Kimi-Linear", True, "full", 4, 4, SHORT, {}),
    "kimi, whole documents": ("Kimi-Linear", False, "none", 2, 2, PACKS, WHOLE),
    "mamba-2, 6 heads in 2 groups on 4 ranks": ("Nemotron-H", False, "sqrt", 4, 4, ONES, {}),
    "mamba-2, 6 heads on 3 ranks": ("Granite-4-H", True, "full", 3, 3, SHORT, {}),
    "mamba-2, whole documents": ("Bamba", False, "keep_attention", 2, 2, PACKS, WHOLE),
    "mamba-2 beside attention": ("Falcon-H1", True, "keep_attention", 3, 3, ONES, {}),
    "mamba-2, MLP without a gate in tiles": ("Nemotron-H", True, "keep_attention", 2, 2, PACKS, {"tile": 7, "linears": True}),
    "mamba-2, the same, all weights": ("Nemotron-H", False, "full", 2, 2, PACKS, {"tile": 7, "host": ("input",)}),
    "mamba-1, few tokens": ("Jamba", True, "full", 4, 4, SHORT, {}),
    "mamba-1, one-token documents": ("Jamba", False, "none", 3, 3, ONES, {}),
    "mamba-1, whole documents": ("Jamba", False, "every_k", 2, 2, ONES, WHOLE),
    "convolution, few tokens": ("LFM2", False, "sqrt", 4, 4, SHORT, {}),
    "convolution, one-token documents": ("LFM2", True, "keep_attention", 4, 2, ONES, {}),
    "lightning, 5 heads on 4 ranks": ("MiniMax", False, "full", 4, 4, ONES, {}),
    "lightning, whole documents": ("MiniMax", True, "none", 2, 2, PACKS, WHOLE),
}  # fmt: skip
QUICK = (
    "delta, 9 heads on 4 ranks, one-token documents",
    "mamba-1, few tokens",
    "convolution, few tokens",
    "delta, whole documents",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_splits_and_ways_to_save_memory(pools, name):
    of, lora, policy, world, sp, packs, saving = CASES[name]
    family, changes = FAMILIES[of]
    ours = pools(world).run(wide_gradients, family, changes, lora, policy, False, sp, packs, saving)[0]
    assert_equal(ours, wide_reference(family, changes, lora, False, packs))


def gradients_in_pieces(rank: int, world: int, state_bytes: int, *args: Any) -> Any:
    """`wide_gradients`, in pieces."""
    with pieces(state_bytes):
        return wide_gradients(rank, world, *args)


PIECES: dict[str, tuple[str, bool, str, int, int, dict[str, Any]]] = {
    # name: family, LoRA, recompute policy, sp, bytes of states, ways to save memory
    "delta": ("Qwen3.5, 9 value and 3 key heads", False, "none", 1, 700, {}),
    "delta, keys on two ranks": ("Qwen3.5, 9 value and 3 key heads", True, "full", 2, 700, {}),
    "delta, a head at a time": ("Qwen3-Next", False, "full", 2, 1, {}),
    "delta, whole documents": ("Qwen3-Next", True, "keep_attention", 2, 400, WHOLE),
    "delta, tiles and inputs on the host": ("Qwen3.5", True, "full", 2, 400, {"tile": 7, "host": ("input",)}),
    "delta, keys of their own": ("OLMo-Hybrid", False, "full", 2, 700, {}),
    "kimi": ("Kimi-Linear", False, "sqrt", 2, 700, {}),
    "mamba-2": ("Nemotron-H", False, "full", 2, 300, {}),
    "mamba-2, one group on a rank": ("Granite-4-H", True, "keep_attention", 2, 1, {}),
    "mamba-2 beside attention": ("Falcon-H1", False, "none", 1, 300, {}),
    "mamba-2 without norm": ("Falcon-H1 without norm", False, "full", 2, 300, {}),
    "mamba-1": ("Jamba", False, "full", 2, 30000, {}),
    "convolution": ("LFM2", False, "full", 2, 1, {}),
    "lightning": ("MiniMax", False, "full", 2, 700, {}),
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("delta, keys on two ranks", "mamba-2") else pytest.param(n, marks=pytest.mark.slow) for n in PIECES],
)
def test_heads_in_turns_and_norms_in_tiles(pools, name):
    of, lora, policy, sp, state_bytes, saving = PIECES[name]
    family, changes = FAMILIES[of]
    args = (family, changes, lora, policy, False, sp, PACKS, saving)
    ours = pools(sp).run(gradients_in_pieces, state_bytes, *args)[0]
    assert_equal(ours, wide_reference(family, changes, lora, False, PACKS))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_lengths(pools, world):
    @settings(
        max_examples=12, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(
        st.sampled_from(["Qwen3.5, 9 value and 3 key heads", "Nemotron-H", "Jamba", "LFM2", "MiniMax"]),
        st.lists(st.integers(1, 12), min_size=1, max_size=7).filter(lambda lengths: max(lengths) > 1),
        st.booleans(),
    )
    def check(of: str, lengths: list[int], whole: bool) -> None:
        family, changes = FAMILIES[of]
        packs, saving = (lengths, [20]), WHOLE if whole else {}
        ours = pools(world).run(wide_gradients, family, changes, False, "full", False, world, packs, saving)[0]
        assert_equal(ours, wide_reference(family, changes, False, False, packs))

    check()


ENGINE: list[Any] = [
    # family, sp, dp, ZeRO stage, accumulation, LoRA, recompute policy, whole documents
    ("Qwen3-Next", 2, 1, 3, 1, False, "keep_attention", False),
    ("Qwen3.5, 9 value and 3 key heads", 4, 1, 0, 3, False, "full", False),
    ("Qwen3.5", 2, 2, 2, 1, True, "auto", False),
    ("Qwen3-Next", 2, 1, 3, 3, True, "fused", True),
    ("OLMo-Hybrid", 3, 1, 2, 1, False, "sqrt", False),
    ("Kimi-Linear", 2, 1, 3, 1, True, "none", False),
    ("Nemotron-H", 2, 2, 3, 1, False, "full", False),
    ("Granite-4-H", 3, 1, 0, 1, True, "every_k", False),
    ("Bamba", 1, 2, 2, 3, False, "none", False),
    ("Falcon-H1", 2, 1, 3, 1, True, "keep_attention", True),
    ("Jamba", 4, 1, 3, 1, False, "full", False),
    ("Jamba", 2, 1, 2, 1, True, "keep_attention", False),
    ("LFM2", 4, 1, 3, 1, True, "sqrt", False),
    ("MiniMax", 2, 2, 3, 1, False, "full", False),
]
QUICK_ENGINE = (0, 6)


IN_PIECES = [
    # the same, and bytes of the states that a turn may have
    ("Qwen3.5, 9 value and 3 key heads", 2, 1, 3, 1, False, "full", False, 700),
    ("OLMo-Hybrid", 2, 1, 0, 1, False, "none", False, 700),
    ("Kimi-Linear", 2, 1, 3, 1, True, "full", False, 700),
    ("Nemotron-H", 2, 2, 3, 1, False, "full", False, 300),
    ("Granite-4-H", 2, 1, 2, 3, False, "sqrt", False, 1),
    ("Jamba", 2, 1, 3, 1, False, "full", False, 30000),
    ("MiniMax", 2, 1, 3, 1, False, "full", False, 700),
]


@contextmanager
def pieces(state_bytes: int) -> Iterator[None]:
    """Inside, heads are worked on in turns of so many bytes of states, and norms on seven tokens at a time."""
    counts: list[int] = []
    plain = spread.turns_of
    with (
        patch.object(spread, "STATE_BYTES", state_bytes),
        patch.object(work_in_pieces, "TILE_TOKENS", 7),
        patch.object(spread, "turns_of", lambda *args: counts.append(plain(*args)) or counts[-1]),
    ):
        yield
    assert not counts or max(counts) > 1, counts


def engine_step(
    rank: int, world: int, family: str, changes: dict[str, Any], sp: int, stage: int, accumulation: int, lora: bool,
    policy: str, whole: bool, state_bytes: int | None = None,
) -> Any:  # fmt: skip
    """`one_step` in float32, of another family."""
    with nullcontext() if state_bytes is None else pieces(state_bytes):
        return one_step(
            rank, world, sp, stage, accumulation, lora, policy, {**changes, "model_type": family}, False, False, whole
        )


@pytest.mark.parametrize(
    "row",
    [
        row if i in QUICK_ENGINE else pytest.param(row, marks=pytest.mark.slow)
        for i, row in enumerate(ENGINE + IN_PIECES)
    ],
    ids=lambda row: "-".join(map(str, row)),
)
def test_step_through_the_engine(pools, row):
    of, sp, dp, stage, accumulation, lora, policy, *more = row
    family, changes = FAMILIES[of]
    loss, _, grads = pools(sp * dp).run(engine_step, family, changes, sp, stage, accumulation, lora, policy, *more)[0]
    changed = {**changes, "model_type": family}
    with patch.object(test_engine, "reference_sum", in_float64()(reference_sum)):  # not around what draws the weights
        ref_loss, ref = baseline_step(accumulation, dp, lora, changed, False, sp, False)
    assert loss == pytest.approx(ref_loss, rel=1e-6)
    ref = {n: g for n, g in ref.items() if g is not None}
    whole_norm = torch.cat([g.flatten().double() for g in ref.values()]).norm()
    assert {n: f"{e:.1e}" for n in ref if (e := float((grads[n].double() - ref[n]).norm() / whole_norm)) > 1e-6} == {}
