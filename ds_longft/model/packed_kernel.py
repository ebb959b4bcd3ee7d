"""The dense weight of a packed one in one pass on a GPU: 0.56 bytes read and 2 written a weight (nf4 to bf16).

torch would write and read codes as indices, values and scales in between, some 30 bytes a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_longft.model.packed import Packed

WEIGHTS = 1024
"""Of a program: 8 for each of 128 threads, 16 bytes of bf16."""


def dense(packed: Packed, codes: Tensor) -> Tensor:
    """uint8 codes on a GPU -> the weight in the type it was loaded in, flat."""
    columns, rows, of_block = packed.blocks
    out = torch.empty(packed.lies.numel(), dtype=packed.rounded, device=codes.device)
    programs = -(-columns // WEIGHTS)
    with torch.cuda.device_of(codes):
        _dense[(out.numel() // columns * programs,)](
            codes, packed.scales, packed.table.view(torch.float32), out, columns, programs, -(-columns // of_block),
            BITS=packed.form.bits, HIGH=packed.form.high_first, POWERS=packed.form.powers, ROWS=rows, BLOCK=of_block,
            N=WEIGHTS,
        )  # fmt: skip
    return out


@triton.jit
def _dense(  # type: ignore[no-untyped-def]  # Triton takes an annotation for a global variable and refuses it
    codes, scales, table, out, columns, programs, scales_of_a_row,
    BITS: tl.constexpr, HIGH: tl.constexpr, POWERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """N columns of one row. A block's columns divide N, or are a whole row."""
    program = tl.program_id(0).to(tl.int64)
    row, first = program // programs, (program % programs) * N
    inside = tl.arange(0, N)
    mask = first + inside < columns
    if BITS == 4:
        half = tl.arange(0, N // 2)
        byte = tl.load(codes + (row * columns + first) // 2 + half, mask=first + 2 * half < columns, other=0)
        high, low = byte >> 4, byte & 15
        code = tl.interleave(high, low) if HIGH else tl.interleave(low, high)
    else:
        code = tl.load(codes + row * columns + first + inside, mask=mask, other=0)
    value = tl.load(table + code.to(tl.int32))
    block = (row // ROWS) * scales_of_a_row + first // BLOCK + inside // BLOCK
    scale = tl.load(scales + block, mask=mask, other=0)
    if POWERS:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x400000, exponent << 23)  # 2^-127 is below float32's normal numbers
    else:
        bits = scale
    scaled = value * bits.to(tl.float32, bitcast=True)
    tl.store(out + row * columns + first + inside, scaled.to(out.dtype.element_ty), mask=mask)
