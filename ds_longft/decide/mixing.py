"""What of a decoder layer mixes tokens, on a timeline: rotary embedding, attention, a recurrence; as `layer.py`."""

from __future__ import annotations

from ds_longft.decide.tensors import ATTENTION, AWAY, LINEARS, WORK, Sizes
from ds_longft.decide.timeline import Timeline


def rope(t: Timeline, z: Sizes) -> None:
    """transformers' rotary embedding: q cos + rotate_half(q) sin, then the same for k."""
    for name, size in (("q", z.q), ("k", z.k)):
        t.hold(f"{name} cos", size)
        t.hold(f"{name} half", size / 2)
        t.hold(f"{name} turned", size)
        t.drop(f"{name} half")
        t.hold(f"{name} sin", size)
        t.drop(f"{name} turned")
        t.hold(f"{name} rotated", size, at="the rotary embedding")
        t.drop(f"{name} cos", f"{name} sin")
    t.drop("q rotated", "k rotated")  # they take the place of q and k


def attention(t: Timeline, z: Sizes, i: int, place: str) -> None:
    """`attention.SpAttention.forward`, all heads at once or in turns."""
    at, part, turn = "attention, forward", ATTENTION if place else WORK, z.turn
    size = 0.0 if place in AWAY else z.q + z.lse  # what waits elsewhere is in transit
    if z.turns > 1:
        t.hold(f"attention {i}", size, part)
        t.hold("out", z.q + z.lse - size)
    if z.setting.sp > 1:
        t.hold("send", turn * z.send)
        t.hold("heads", turn * (z.qs + 2 * z.kr), at=at)
        if z.turns == 1:
            t.drop("send")
        t.hold("repeated", turn * 2 * z.ks if z.repeated else 0.0)
        t.hold("computed", turn * (z.qs + z.lse if z.turns > 1 else z.qs), at=at)
        if z.turns == 1:
            t.hold("received", z.q)
    elif z.turns > 1:
        t.during(at, turn * (z.q + z.lse))
    if z.turns == 1:
        t.hold(f"attention {i}", size, part, at=at)
    t.drop("send", "heads", "repeated", "computed", "received", "out")


def attention_backward(t: Timeline, z: Sizes, i: int) -> None:
    """`attention.SpAttention.backward`: exchange, kernel, exchange back; all heads at once or in turns."""
    at, turn, many, grads = "attention, backward", z.turn, z.setting.sp > 1, z.qs + 2 * z.ks
    if z.turns > 1:  # written over q, k and v
        t.hold("dq dk dv", 2 * z.k * 4 / z.setting.element_bytes if z.wide else 0.0)
    if many:
        t.hold("send", turn * (z.send + 2 * z.q))
        t.hold("heads", turn * (3 * z.qs + 2 * z.kr), at=at)
        t.drop("send")
        t.hold("repeated", turn * 2 * z.ks if z.repeated else 0.0)
    t.hold("grads", turn * grads, at=at)
    t.during(at, turn * z.kernel_backward())
    if z.turns > 1:
        t.during("join", turn * (z.qs + 2 * z.kr) if many else 0.0)
        t.drop("heads", "repeated", "grads")
    elif many:
        t.drop("heads", "repeated")
        t.hold("join", z.qs + 2 * z.kr)
        t.hold("received", z.send)
        t.drop("join")
        t.hold("dq dk dv", z.q + 2 * z.k, at="the exchange after attention, backward")
        t.drop("grads", "received")
    if z.turns == 1:
        t.drop("q", "k", "v")
    t.drop(f"attention {i}", "dattention")


def state(t: Timeline, z: Sizes, i: int, kept: str, *, saving: bool, first: bool) -> None:
    """`state/mixers.py`: projections, exchange, convolution and recurrence, exchange, gated norm. The recurrence is
    computed again: it takes less time for what it would hold than the projections before it. `kept`: where these wait.
    """
    f = z.state
    if f is None:
        return
    many, at = z.setting.sp > 1, "a layer with a state, forward"
    if first or not kept:
        t.hold("projected", f.projected)
    inside = f.saved + f.forward + f.given * (2 if many else 1)
    if f.turns == 1:
        # convolutions keep copies of what they are given; what is part of a larger tensor stays beside them
        t.hold(f"state {i}", f.saved + (f.given if f.gate else 0.0))
        t.hold("state out", f.out)
        t.during(at, f.forward + (f.given if many else 0.0))
    else:
        t.hold("state out", f.out)
        t.during(at, (inside + f.out) / f.turns)
    t.during("a gated norm", f.tile(z.setting))
    t.hold("normed", f.out)
    if not saving:
        t.drop("projected", f"state {i}", "state out", "normed")
    if first and kept == "device":
        t.hold(f"kept state {i}", f.projected, LINEARS)


def state_backward(t: Timeline, z: Sizes, i: int) -> None:
    """The gradients of what was projected are written over it where heads are worked on in turns."""
    f = z.state
    if f is None:
        return
    many, at = z.setting.sp > 1, "a layer with a state, backward"
    t.hold("dnormed", f.out)
    t.drop("normed")
    t.hold("dgate", f.gate if f.turns > 1 else 0.0)  # else nothing but the gate reads the tensor any more
    t.during("a gated norm, backward", 2 * f.tile(z.setting))
    t.drop("dnormed")
    if f.turns == 1:
        t.during(at, f.backward + (f.out if many else 0.0))
        t.drop("state out", f"state {i}")
    else:
        t.hold("dgiven", f.dgiven)
        inside = f.saved + f.backward + 2 * f.out + f.given * (2 if many else 1)
        t.during(at, inside / f.turns)
        t.drop("state out")
    if f.turns > 1 and not f.gate:
        t.drop("projected")
    t.hold("dprojected", f.projected)
    t.drop("projected", "dgate", "dgiven", f"kept state {i}")
