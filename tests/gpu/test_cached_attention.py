"""New tokens over their prompts' keys on a GPU: FlashAttention against the definition."""

from __future__ import annotations

import pytest
import torch

from ds_longft.tools.evaluate.cached_attention import OnThisRank, cached_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 300])
def test_flash_follows_the_definition(window: int | None, sinks: bool) -> None:
    """Prompts of 1,000, 1 and 200 tokens and 23 of padding, four new tokens of each; the definition in float32."""
    rng = torch.Generator("cuda").manual_seed(0)
    here = OnThisRank((range(1000), range(1000, 1001), range(1001, 1201)), (0, 0, 0), (1000, 1, 200), 1224, None)
    shapes = ((1, 9, 3, 64), (1, 3, 1224 + 12, 64), (1, 3, 1224 + 12, 64))
    q, k, v = (torch.randn(s, generator=rng, device="cuda", dtype=torch.bfloat16) for s in shapes)
    s_aux = torch.randn(9, generator=rng, device="cuda") if sinks else None
    given = {"scaling": 0.125, "sliding_window": window, "s_aux": s_aux, "on_this_rank": here}
    out, _ = cached_attention(torch.nn.Module(), q, k, v, None, **given)
    wanted, _ = cached_attention(torch.nn.Module(), q.float(), k.float(), v.float(), None, **given)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)
