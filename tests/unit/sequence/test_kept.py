"""Kept tensors: what waits where, in which order it is let go and fetched, and what is not computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_longft.sequence.kept import LEAVING, HostStore, Kept, UnusedOutput
from ds_longft.sequence.linear import fuse_linears
from ds_longft.sequence.mlp import tile_mlp
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from tests.unit.sequence.mlp import Mlp

CPU = torch.device("cpu")


def test_device_tensors_are_held_until_two_later_calls() -> None:
    store = HostStore(CPU)
    slots = [store.slot(i, "x") for i in range(4)]
    for i, slot in enumerate(slots):
        slot.put(torch.full((3,), float(i)))
        assert len(store.leaving) == min(i + 1, LEAVING)
    store.prefetch(3)
    assert store.leaving == []
    assert [slot._value is not None for slot in slots] == [False, False, True, True]  # this layer's and the next one's
    for i in reversed(range(4)):
        slots[i].first_pass = False
        value = slots[i].take()
        assert value is not None
        assert value[0].tolist() == [float(i)] * 3
    assert store.waiting == []
    assert slots[0].take() is None


def test_a_pass_without_backward_leaves_nothing_behind() -> None:
    store = HostStore(CPU)
    for _ in range(2):
        slots = [store.slot(i, "x") for i in range(2)]
        for slot in slots:
            slot.put(torch.zeros(2))
    assert store.waiting == slots


def test_an_output_that_nothing_reads_is_not_kept() -> None:
    def after(calls: int, allowed: bool) -> tuple[Tensor, ...] | None:
        slot = UnusedOutput()
        for _ in range(calls):
            slot.put(torch.ones(4, 6), torch.full((4, 2), 3.0))
        slot.first_pass, slot.allowed = False, allowed
        return slot.take()

    taken = after(calls=1, allowed=True)
    assert taken is not None
    assert taken[0].shape == (4, 6)
    assert taken[1].tolist() == [[3.0, 3.0]] * 4
    assert after(calls=1, allowed=False) is None
    assert after(calls=2, allowed=True) is None


@pytest.mark.parametrize("slot", [Kept(), HostStore(CPU).slot(0, "x")], ids=["device", "host"])
def test_of_two_calls_the_first_is_kept_for_the_first(slot: Kept) -> None:
    """The second call of the first pass got the output of the first."""
    for value in (1.0, 2.0):
        assert slot.take() is None
        slot.put(torch.full((3,), value))
    slot.first_pass = False
    taken = slot.take()
    assert taken is not None
    assert taken[0].tolist() == [1.0] * 3
    assert slot.take() is None
    slot.put(torch.zeros(3))
    assert slot.take() is None


class Layer(nn.Module):
    """`after`: something is computed on the MLP's output, as Gemma's norm."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.mlp, self.after = Mlp(), after

    def forward(self, x: Tensor, **_: object) -> Tensor:
        out = self.mlp(x)
        return x + (torch.tanh(out) if self.after else out)


class Products(TorchDispatchMode):
    """How often [rows, 24] x [24, 8] is computed, rows counted: the down projection's product."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].shape[1] == 24 and args[1].stride() == (1, 24):
            self.rows += args[0].shape[0]
        return func(*args, **(kwargs or {}))


def down_rows(tile: int | None, after: bool) -> int:
    torch.manual_seed(0)
    layer = Layer(after)
    for p in layer.parameters():
        p.requires_grad_(False)
    groups = fuse_linears(layer)
    down = next(g for g in groups if g.names == ("down_proj",))
    keep = LayerKeep(0, last=tile_mlp(layer, groups, tile) if tile else down)
    apply_recompute([layer], "full", keep=[keep])
    x = torch.randn(1, 10, 8, requires_grad=True)
    with Products() as seen:
        layer(x).sum().backward()
    return seen.rows


def test_the_down_projection_is_computed_again_only_where_its_output_is_read() -> None:
    assert down_rows(None, after=False) == 10
    assert down_rows(4, after=False) == 10
    assert down_rows(None, after=True) == 20
    assert down_rows(4, after=True) == 20


def test_nothing_is_not_pinned_and_what_grows_is_pinned_again(registered: dict[int, int]) -> None:
    store = HostStore(CPU)
    store.device = torch.device("cuda")
    for rows in (0, 3, 0, 5):  # x A' of a linear without an adapter has no columns
        assert store.buffer("xa", torch.ones(rows, 4)).shape == (rows, 4)
    assert list(registered.values()) == [5 * 4 * 4]
