"""New tokens over a KV cache on a GPU: FlashAttention against the definition."""

from __future__ import annotations

import pytest
import torch

from ds_longft.tools.evaluate.cached_attention import _masked, cached_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("n", "m"), [(1, 1000), (128, 1000), (1000, 1000)])
def test_flash_follows_the_definition(n: int, m: int, window: int | None) -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 9, n, 64), (2, 3, m, 64), (2, 3, m, 64))
    q, k, v = (torch.randn(s, generator=rng, device="cuda", dtype=torch.bfloat16) for s in shapes)
    out, _ = cached_attention(torch.nn.Module(), q, k, v, None, scaling=0.125, sliding_window=window)
    wanted = _masked(q.float(), k.float(), v.float(), 0.125, window, None, None).transpose(1, 2)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)
