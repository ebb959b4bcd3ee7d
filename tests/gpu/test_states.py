"""flash-linear-attention's kernels against the torch forms in float32: outputs and gradients, documents of any length.

FLA compiles some ten configurations of each of a dozen kernels to find the fastest, minutes on a machine that has none
of them yet. Here one each: the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_longft.batch import Documents
from ds_longft.sequence.state import recurrence, work_in_pieces
from ds_longft.sequence.state.carried import Carried
from tests.unit.sequence.state.test_gated_norm import HERE, made_norm, output_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not recurrence.has_fla(), reason="flash-linear-attention is not installed"),
]

LENGTHS = (700, 1, 130, 1, 1025, 64, 3)
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 5e-3}  # Triton multiplies float32 as TF32


@pytest.fixture(autouse=True)
def _first_configuration() -> Iterator[None]:
    from triton.runtime.autotuner import Autotuner

    of_all = Autotuner.prune_configs
    with patch.object(Autotuner, "prune_configs", lambda self, kwargs: of_all(self, kwargs)[:1]):
        yield


def documents() -> Documents:
    return Documents(torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32), LENGTHS)


def layer_of(model_type: str, name: str) -> nn.Module:
    """Any module of that class's file: torch forms are looked up beside it."""
    from importlib import import_module

    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    made: nn.Module = getattr(module, name).__new__(getattr(module, name))
    return made


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(sum(LENGTHS), *shape, device="cuda").to(dtype)


def compared(call: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """With kernels in `dtype`, and without them in float32."""
    results = []
    for kernels in (True, False):
        leaves = [t.detach().to(t.dtype if kernels else torch.float32).requires_grad_() for t in inputs]
        with patch.object(recurrence, "has_fla", lambda on=kernels: on):
            out = call(*leaves)
            torch.manual_seed(1)
            grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, device="cuda").to(out.dtype))
        results.append([out.detach(), *grads])
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*results, strict=True)]
    print(f"output, then gradients, {dtype}:", *(f"{error:.1e}" for error in errors), flush=True)
    assert max(errors) <= ALLOWED[dtype], errors


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [(2, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)],
    ids=["", "float32", "no groups"],
)
def test_gated_delta(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer_of("qwen3_next", "Qwen3NextGatedDeltaNet")
    q, k, v = random(groups, 64, dtype=dtype), random(groups, 64, dtype=dtype), random(4, 128, dtype=dtype)
    g, beta = -F.softplus(random(4, dtype=torch.float32)) * 0.2, random(4, dtype=dtype).sigmoid()
    compared(lambda *t: recurrence.delta_rule(layer, *t, documents()), [q, k, v, g, beta], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decayed_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = random(2, 128, dtype=dtype), random(2, 128, dtype=dtype), random(6, 64, dtype=dtype)
    g = -F.softplus(random(6, dtype=torch.float32)) * 0.2
    compared(lambda *t: recurrence.decayed_attention(*t, documents()), [q, k, v, g], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "values", "delta"), [(128, 128, True), (64, 128, True), (128, 64, False)])
def test_our_kernel_of_the_piece_agrees(keys: int, values: int, delta: bool, dtype: torch.dtype) -> None:
    """Where it does not, torch's products run, slower and unseen by the tests above."""
    from ds_longft.sequence.state.chunk_kernel import Shape, agrees

    shape = Shape(keys, values, dtype, dtype if delta else torch.float32, delta)
    assert agrees(shape, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", HERE)
def test_gated_norm(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles, as a long pack has them."""
    torch.manual_seed(0)
    monkeypatch.setattr(work_in_pieces, "TILE_TOKENS", 500)
    norm = made_norm(name).to("cuda", dtype)
    given = [random(768, dtype=dtype) for _ in range(3)]
    ours = output_and_gradients(norm, *given)
    with patch.object(recurrence, "has_fla", lambda: False):
        wanted = output_and_gradients(norm.float(), *(t.float() for t in given))
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, wanted, strict=True)]
    assert max(errors) <= {torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype], errors


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_convolution(activation: str | None) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((96, 4), (96,)))
    x = random(96, dtype=torch.bfloat16)
    whole = documents()
    compared(
        lambda *t: recurrence.causal_conv(*t, activation, whole.positions, whole), [x, weight, bias], torch.bfloat16
    )


def test_kimi_delta() -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    layer = layer_of("kimi_linear", "KimiLinearDeltaAttention")
    q, k, v = (random(3, 64, dtype=dtype) for _ in range(3))
    g, beta = -F.softplus(random(3, 64, dtype=torch.float32)) * 0.2, random(3, dtype=dtype).sigmoid()
    compared(lambda *t: recurrence.delta_rule(layer, *t, documents()), [q, k, v, g, beta], dtype)


@pytest.mark.parametrize("kind", ["gated delta", "kimi", "decayed"])
def test_states_behind_documents(kind: str) -> None:
    """What answers go on from, and the outputs beside it: of the first five of the pack's documents."""
    torch.manual_seed(0)
    dtype, heads, d = torch.bfloat16, 4, 64
    q, k, v = (random(heads, d, dtype=dtype) for _ in range(3))
    of_feature = (d,) if kind == "kimi" else ()
    g, beta = -F.softplus(random(heads, *of_feature, dtype=torch.float32)) * 0.2, random(heads, dtype=dtype).sigmoid()
    gated, kimi = (
        layer_of("qwen3_next", "Qwen3NextGatedDeltaNet"),
        layer_of("kimi_linear", "KimiLinearDeltaAttention"),
    )
    found = []
    for kernels in (True, False):
        carried = Carried(5)
        given = [t if kernels else t.float() for t in (q, k, v, g, beta)]
        with torch.no_grad(), patch.object(recurrence, "has_fla", lambda on=kernels: on):
            if kind == "decayed":
                out = recurrence.decayed_attention(*given[:4], documents(), carried)
            elif kind == "kimi":
                out = recurrence.delta_rule(kimi, *given, documents(), carried)
            else:
                out = recurrence.delta_rule(gated, *given, documents(), carried)
        assert carried.state is not None
        assert carried.state.shape == (5, heads, d, d)
        found.append((carried.state, out.float()))
    for ours, wanted in zip(*found, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) <= ALLOWED[dtype]
