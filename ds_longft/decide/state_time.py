"""Seconds that convolutions, recurrences and gated norms of layers with a state take, by what they read and write.

Counted apart: what torch's own operations move, at the memory's bandwidth; flash-linear-attention's kernels, at a share
of it; and those of them that go through a document chunk by chunk, which have to wait for each chunk. Counted from the
sources: `state/mixers.py`, and of FLA 0.6.0 `chunk.py` in `ops/gated_delta_rule` and
`ops/simple_gla`.

Letters: S tokens of the pack, h and g heads and groups of this rank, K and V features of a head's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_longft.decide.setting import Gpu, Setting
from ds_longft.model.facts import ModelFacts, StateFacts
from ds_longft.sequence.state.spread import CHUNK_TOKENS, turns_of
from ds_longft.sequence.state.work_in_pieces import TILE_TOKENS

KERNEL_SHARE = 0.45
"""Share of the memory's bandwidth that FLA's kernels reach, where they need not wait for a chunk."""

CHUNK_S = 5e-6
"""One chunk of a kernel that goes through a document chunk by chunk. Both are fitted to two steps of Qwen3.5-like
8B shapes on H200s, one configuration of each kernel: 16 layers on one GPU (32 heads), all on two (16 heads each)."""

BLOCKS_AT_ONCE = 132
"""Multiprocessors of an H100 or H200: so many heads, or halves of their values, are gone through side by side."""

BLOCK_VALUES = 32
"""Features of a head's values that one block of such a kernel works on."""

NORM, NORM_BACKWARD = 10, 20
"""Bytes an element that a gated norm's kernels move, with the copies of tiles (`state/gated_norm.py`)."""

CONVOLVED, SCANNED = (100, 300), (50, 150)
"""Bytes an element, forward and backward, that torch's own forms move: of a short convolution's channels, an estimate;
of Mamba-1's states of all tokens, counted in `state/scan.py`."""


@dataclass(frozen=True)
class Pass:
    """What one layer does in a pass."""

    torch: float = 0.0  # bytes
    kernels: float = 0.0  # bytes
    chunks: float = 0.0  # one after another

    def seconds(self, gpu: Gpu) -> float:
        """On this GPU."""
        bandwidth = gpu.memory_gb_s * 1e9
        return self.torch / bandwidth + self.kernels / (bandwidth * KERNEL_SHARE) + self.chunks * CHUNK_S


def state_seconds(model: ModelFacts, x: Setting, gpu: Gpu, forwards: float, *, backward: bool = True) -> float:
    """Of all layers, forward and backward."""
    seconds = 0.0
    for kind, count in model.kinds.items():
        if kind.state is not None:
            forth, back = passes_of(kind.state, x)
            seconds += count * (forwards * forth.seconds(gpu) + backward * back.seconds(gpu))
    return seconds


def passes_of(f: StateFacts, x: Setting) -> tuple[Pass, Pass]:
    """One forward and one backward pass of a layer, on the rank with the most heads.

    All of it in kernels. With a Triton that breaks one of them, and that ours is not tested with
    (`state/chunk_piece.py`), a backward pass takes longer.
    """
    e, few = x.element_bytes, x.kv_heads is not None
    h, g = (-(-n // x.sp) for n in (f.heads, f.groups))
    keys, values, read = h * f.keys, h * f.values, 2 * g * f.keys  # elements a token
    states, matrix = h * f.keys * f.values / CHUNK_TOKENS, h * CHUNK_TOKENS
    given = read + values
    if f.kind in ("conv", "scan"):
        width, moved = (f.channels / x.sp, CONVOLVED) if f.kind == "conv" else (keys, SCANNED)
        return Pass(x.tokens * width * moved[0]), Pass(x.tokens * width * moved[1])
    mamba = f.kind == "decay" and bool(f.channels)
    norm = float(NORM * values)
    copied: float = 2 * e * given + (22 * values + 2 * e * keys if mamba else 0)  # v x dt, D x; keys of every head
    copied_back: float = NORM_BACKWARD * values + 8 * e * given + (55 * values + 4 * e * keys if mamba else 0)
    if f.kind == "decay":
        forth = 3 * keys + 3 * values + 2 * states + 2 * given * mamba
        back = 4 * keys + 4 * values + 6 * states + 3 * given * mamba
        piece = 4 * keys + 2 * values + 4 * states
    else:
        decays = 4 / e * keys if f.kind == "kimi" else 0.0  # of each feature, in float32
        forth = 2 * given + 2 * read + 6 * keys + 6 * values + matrix + 2 * states + 4 * decays
        back = 3 * given + 3 * read + 12 * keys + 12 * values + 2 * matrix + 2 * states + 8 * decays
        piece = 5 * keys + 3 * values + 2 * states
    turns = turns_of(x.tokens, f.heads, x.sp, f.keys * f.values, few)
    waves = -(-h // turns) * -(-f.values // BLOCK_VALUES) / BLOCKS_AT_ONCE
    chunks = turns * max(*x.lengths, x.tokens * waves) / CHUNK_TOKENS
    again = turns > 1  # forward once more, for its backward pass
    tiles = norm if x.local_tokens > TILE_TOKENS else 0.0
    tokens = x.tokens
    return (
        Pass(tokens * (norm + copied), tokens * e * forth, chunks),
        Pass(
            tokens * (copied_back + tiles + again * copied),
            tokens * e * (back + piece + again * forth),
            (2 + again) * chunks,
        ),
    )
