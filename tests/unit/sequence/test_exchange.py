"""Heads that do not fall into groups of one size: what the kernel reads, and the gradient's way back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_longft.sequence.exchange import HeadShare, deal_heads


class Ops(TorchDispatchMode):
    """Names of the operations that reach the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


UNEVEN = [
    pytest.param(share, q // kv, id=f"{q} by {kv} heads on {sp} ranks, rank {rank}")
    for q, kv, sp in ((9, 3, 2), (14, 2, 4), (40, 10, 3))
    for rank, share in enumerate(deal_heads(q, kv, sp))
    if share.repeat
]


@pytest.mark.parametrize(("share", "group"), UNEVEN)
def test_kernel_reads_each_query_heads_own_key_head(share: HeadShare, group: int):
    keys = torch.arange(share.kv.start, share.kv.stop)[None, :, None].expand(5, -1, 8)  # each head its number
    read = share.repeated(keys)
    readers = len(share.q) // read.shape[1]  # query heads of one head, as kernels count them
    for i, q in enumerate(share.q):
        assert bool((read[:, i // readers] == q // group).all())


@pytest.mark.parametrize(("share", "group"), UNEVEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_of_the_copies_is_their_sum(share: HeadShare, group: int, dtype: torch.dtype):
    torch.manual_seed(0)
    keys = torch.randn(7, len(share.kv), 8, dtype=torch.float64).requires_grad_()
    dread = torch.randn(7, len(share.repeat), 8, dtype=dtype)
    (expected,) = torch.autograd.grad(keys[:, list(share.repeat)], keys, dread.double())
    got = share.summed(dread)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-15, atol=1e-15)  # bf16: rounded once, at the end


@pytest.mark.parametrize(("share", "group"), UNEVEN[:1])
def test_nothing_is_copied_from_the_host(share: HeadShare, group: int):
    keys = torch.randn(5, len(share.kv), 8, dtype=torch.bfloat16)
    with Ops() as ops:
        share.summed(share.repeated(keys))
    assert ops.names
    assert not [name for name in ops.names if name.startswith(("lift_fresh", "_to_copy", "item", "_local_scalar"))]
