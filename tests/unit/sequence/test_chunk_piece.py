"""The piece of a backward pass that Triton breaks on Hopper: our kernel is what torch computes, and runs only then."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ds_longft.sequence.state import chunk_backward, chunk_piece
from ds_longft.sequence.state.chunk_backward import Handed


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the kernel's module, which needs Triton: the kernel agrees for keys of 128 features."""
    tried: list[Any] = []
    made: Any = ModuleType("chunk_kernel")
    made.Shape = lambda *fields: SimpleNamespace(keys=fields[0], fields=fields)
    made.agrees = lambda shape, device: (tried.append(shape.fields), shape.keys == 128)[1]
    made.chunk_backward = lambda handed: "kernel"
    monkeypatch.setitem(sys.modules, "ds_longft.sequence.state.chunk_kernel", made)
    monkeypatch.setattr("ds_longft.sequence.state.chunk_kernel", made, raising=False)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9.9"))
    monkeypatch.setattr(chunk_piece, "TESTED_WITH", {"9.9"})
    return tried


@pytest.mark.parametrize("keys", [128, 64])
def test_the_kernel_runs_where_it_agrees(tried: list[Any], keys: int) -> None:
    half = torch.bfloat16
    q, v = torch.randn(1, 3, 2, keys).to(half), torch.randn(1, 3, 4, 8).to(half)
    h = torch.randn(1, 1, 4, keys, 8)
    named: dict[str, Any] = {"g": -torch.rand(1, 3, 4), "cu_seqlens": torch.tensor([0, 3]), "chunk_size": 16}
    found: Any = chunk_piece.backward_piece(q, q, v, v, h, h, **named)
    assert tried == [(keys, 8, half, torch.float32, False, 16)]
    if keys == 128:
        assert found == "kernel"
    else:
        chunks = chunk_backward.chunks_of(named["cu_seqlens"], 16)
        handed = Handed(q, q, v, v, h, h, None, None, named["g"], 1.0, named["cu_seqlens"], 16, chunks)
        for ours, wanted in zip(found, chunk_backward.chunk_backward(handed), strict=True):
            assert ours is wanted is None or torch.equal(ours, wanted)


@pytest.mark.usefixtures("tried")
def test_a_row_without_borders_is_one_document() -> None:
    torch.manual_seed(0)
    q, h, g = torch.randn(1, 20, 2, 8), torch.randn(1, 2, 2, 8, 8), -torch.rand(1, 20, 2)
    found = [
        chunk_piece.backward_piece(q, q, q, q, h, h, g=g, chunk_size=16, **borders)
        for borders in ({}, {"cu_seqlens": torch.tensor([0, 20])})
    ]
    for one, other in zip(*found, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_float32_is_left_to_torch(tried: list[Any]) -> None:
    one, h, g = torch.randn(1, 3, 2, 128), torch.randn(1, 1, 2, 128, 128), -torch.rand(1, 3, 2)
    assert chunk_piece.backward_piece(one, one, one, one, h, h, g=g, chunk_size=16)[0].dtype == torch.float32
    assert "in torch" in chunk_piece.piece_in_words([("delta", 128, 128)], torch.float32, torch.device("cpu"))
    assert not tried


def test_it_does_not_run_with_a_triton_it_was_not_tested_with(
    tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_piece, "TESTED_WITH", {"9.8"})
    one = torch.randn(1, 3, 2, 128).bfloat16()
    named: dict[str, Any] = {"g": -torch.rand(1, 3, 2), "cu_seqlens": torch.tensor([0, 3]), "chunk_size": 16}
    h = torch.randn(1, 1, 2, 128, 128)
    assert chunk_piece.backward_piece(one, one, one, one, h, h, **named)[0].shape == one.shape
    assert "in torch" in chunk_piece.piece_in_words([("delta", 128, 128)], torch.bfloat16, torch.device("cpu"))
    assert not tried


def test_what_runs_is_said(tried: list[Any]) -> None:
    say = chunk_piece.piece_in_words
    device = torch.device("cpu")
    assert "in a kernel of ours" in say([("delta", 128, 128), ("decay", 128, 64)], torch.bfloat16, device)
    assert [fields[2:] for fields in tried] == [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
    ]
    assert "in torch, slower" in say([("delta", 128, 128), ("decay", 64, 64)], torch.bfloat16, device)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for GPUs")
def test_the_kernel_in_tritons_interpreter() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.sequence.interpreted_piece"], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    print(errors)
    half = errors.pop("half precision, states in float32")
    assert half < 1e-3
    assert all(error < 1e-6 for error in errors.values())
