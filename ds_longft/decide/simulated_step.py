"""One step on the fullest rank, played on a timeline: every tensor is held and dropped in the order the code does it.

docs/plan.md has the same as formulas. Letters and sizes: `tensors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_longft.decide.layer import Layer
from ds_longft.decide.tensors import AWAY, BEFORE_STATE, GROUPS, HEAD, TRANSIT, Keep, Sizes, by_layer
from ds_longft.decide.timeline import Timeline
from ds_longft.sequence.kept import LEAVING
from ds_longft.sequence.loss import CHUNK_BYTES


def bytes_away(z: Sizes, keep: Keep, where: tuple[str, ...] = AWAY) -> list[float]:
    """Bytes of what waits on the host or the disk of a layer."""
    places = (keep.qkv, keep.o, keep.gate_up, keep.state, keep.attention, keep.input)
    sizes = (*(z.group(names) for names in (*GROUPS[:3], BEFORE_STATE)), z.q + z.lse, z.u)
    return [size for place, size in zip(places, sizes, strict=True) if place in where]


@dataclass
class SimulatedStep:
    """Holds and drops on a timeline what one step holds and drops."""

    t: Timeline
    z: Sizes
    keep: tuple[Keep, ...]
    layers: list[Layer] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [Layer(self.t, z, self.keep) for z in by_layer(self.z.model, self.z.setting)]

    def run(self) -> None:
        """Embedding, layers, head, and back."""
        t, z, x = self.t, self.z, self.z.setting
        layers = z.model.layers
        t.hold("cos sin", 2 * x.local_tokens * z.model.head_dim * x.element_bytes)  # arguments of every layer
        t.hold("leaving", max(sum(sorted(sizes)[-LEAVING:]) for sizes in self._away()), TRANSIT)
        self.layers[0].input(0)
        if x.recompute in ("every_k", "sqrt"):
            self._segments(x.every if x.recompute == "every_k" else max(1, round(layers**0.5)))
            return
        for i in range(layers):
            self.layers[i].forward(i, saving=x.recompute == "none", first=True)
        self._head()
        for i in reversed(range(layers)):
            if x.recompute != "none":
                self.layers[i].forward(i, saving=True, first=False)
            self.layers[i].backward(i)

    def _away(self) -> list[list[float]]:
        """Bytes of what waits elsewhere of each layer, and of another one (`kept.HostStore`)."""
        return [2 * bytes_away(layer.z, keep) for layer, keep in zip(self.layers, self.keep, strict=True)]

    def _segments(self, size: int) -> None:
        """`recompute._Segment`: inputs of segments, then of one segment's layers (nested checkpoints)."""
        t, layers = self.t, self.z.model.layers
        starts = list(range(0, layers, size))
        for start in starts:
            for i in range(start, min(start + size, layers)):
                self.layers[i].forward(i, saving=False, first=True)
                if i > start:
                    t.drop(f"x{i}")
        self._head()
        if self.keep[0].input in AWAY:  # torch holds the one before until the next segment is recomputed
            t.hold("input of the segment before", self.z.u, TRANSIT)
        for start in reversed(starts):
            last = min(start + size, layers) - 1
            for i in range(start, last):  # the segment again; its last layer keeps its tensors at once
                t.drop(f"x{i + 1}")
                self.layers[i].forward(i, saving=False, first=True)
            for i in range(last, start - 1, -1):
                self.layers[i].forward(i, saving=True, first=False)
                self.layers[i].backward(i)

    def _head(self) -> None:
        """`loss.ChunkedHead`: final norm, labelled rows, chunks of logits; leaves the gradient "g"."""
        t, z, x, m = self.t, self.z, self.z.setting, self.z.model
        rows = x.targets * z.u  # hidden states of labelled rows
        self.layers[0].norm("final norm", True)
        t.hold("labelled rows", rows, HEAD)
        chunk = min(CHUNK_BYTES, 4 * x.targets * x.local_tokens * m.vocab)
        logits, of_head = chunk * x.element_bytes / 4, m.head_weights * x.element_bytes
        if x.lora_r is not None:  # in one kernel the gradient takes the logits' place
            t.hold("dhidden", rows, HEAD)
            t.during("logits", 3.5 * chunk if m.capped_logits else logits, HEAD)
        else:  # the head's gradient, summed over the chunks in float32; beside it a chunk's, or the rounded sum
            t.during("logits", 2.5 * chunk if m.capped_logits else logits, HEAD)
            t.drop("final norm")
            t.hold("dhidden", rows, HEAD)
            of_chunk = max(3 * chunk, logits + of_head) if m.capped_logits else logits + of_head
            t.during("logits", 4 * m.head_weights + of_chunk, HEAD)
        t.drop("labelled rows")
        t.drop("leaving")
        t.hold("coming", max(map(sum, self._away())), TRANSIT)  # a layer's, and the next one's
        t.hold("g", z.u)
        t.drop("dhidden", "final norm")
        self.layers[0].norm_backward("final norm")
        t.drop(f"x{m.layers}")
