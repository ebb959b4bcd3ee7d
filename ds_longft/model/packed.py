"""Weights in fewer bits: what lies in memory is codes and scales, a dense weight exists while a product reads it.

    weight = table[code] * scale of its block          in float32, rounded once to the run's type

| format | codes | table | a block, one scale each | bytes a weight |
|---|---|---|---|---|
| nf4 | 4 bits | quantiles of a normal distribution (QLoRA, arXiv 2305.14314) | 64 weights in a row | 0.5625 |
| mxfp4 | 4 bits | e2m1, scales are powers of two (OCP Microscaling 1.0) | 32 weights in a row | 0.5313 |
| int8 | 8 bits | -128 .. 127 | one output feature | 1 |
| fp8 | 8 bits | e4m3 | 128 x 128 | 1.0002 |

Codes are those of bitsandbytes (nf4, int8), of transformers (fp8) and of gpt-oss' files (mxfp4), to the bit.

A packed weight is torch's own parametrization of the layer that had the weight: `layer.weight` is still there, dense
and made anew whenever it is read, so that PEFT and every forward of transformers run as they are. Codes and scales are
buffers, integers all: DeepSpeed neither divides nor casts them, and no checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Name = Literal["nf4", "mxfp4", "int8", "fp8"]

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_MAX = 448.0
AT_A_TIME = 2**26
"""Weights that are quantised at a time: a step of it takes some 16 bytes each."""


@dataclass(frozen=True)
class Format:
    """How weights lie in memory; a block of `rows` x `columns` weights has one scale."""

    name: Name
    bits: Literal[4, 8]
    columns: int  # 0: all of a row
    rows: int = 1
    high_first: bool = False  # of the two codes in a byte
    powers: bool = False  # scales are exponents of two, a byte each

    @property
    def bytes_per_weight(self) -> float:
        """Codes and scales."""
        scale = (1 if self.powers else 4) / (self.rows * self.columns) if self.columns else 0.0
        return self.bits / 8 + scale

    def table(self) -> Tensor:
        """float32 [16 or 256], on the CPU: the value of each code."""
        if self.name == "fp8":
            return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
        if self.name == "int8":
            return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.int8).float()
        values = _NF4 if self.name == "nf4" else (*_E2M1, *(-v for v in _E2M1))
        return torch.tensor(values, device="cpu")

    def scales_of(self, shape: tuple[int, ...]) -> int:
        """How many scales a weight of that shape has."""
        columns = self.columns or shape[-1]
        if self.rows == 1:
            return prod(shape) // columns
        return -(-prod(shape[:-1]) // self.rows) * -(-shape[-1] // columns)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of that shape is cut into whole blocks, or (fp8) into blocks of its own experts."""
        if self.rows > 1:
            return len(shape) == 2 or shape[-2] % self.rows == 0
        return prod(shape) % (self.columns or 1) == 0


FORMATS: dict[str, Format] = {
    "nf4": Format("nf4", 4, 64, high_first=True),
    "mxfp4": Format("mxfp4", 4, 32, powers=True),
    "int8": Format("int8", 8, 0),
    "fp8": Format("fp8", 8, 128, rows=128),
}


class Packed(nn.Module):
    """Codes -> dense weight, as a parametrization of the layer's weight."""

    scales: Tensor  # exponents uint8, or bits of float32 as int32, [blocks]
    table: Tensor  # bits of float32 as int32

    def __init__(
        self, form: Format, shape: tuple[int, ...], dtype: torch.dtype, scales: Tensor, *, turned: bool = False
    ) -> None:
        """`shape`: as codes lie. `turned`: the layer has the last two dimensions the other way round (gpt-oss)."""
        super().__init__()
        self.form, self.lies, self.rounded, self.turned = form, torch.Size(shape), dtype, turned
        self.dtype = dtype  # that is asked for
        scales = scales.flatten() if form.powers else scales.float().flatten().contiguous().view(torch.int32)
        self.register_buffer("scales", scales)
        self.register_buffer("table", form.table().view(torch.int32).to(scales.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `model.float()`."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, codes: Tensor) -> Tensor:
        """uint8 codes -> `shape`, rounded to the type it was loaded in."""
        with torch.no_grad():
            if codes.is_cuda:
                from ds_longft.model.packed_kernel import dense as by_kernel  # triton: on GPUs only

                dense = by_kernel(self, codes)
            else:
                dense = _by_torch(self, codes)
            dense = dense.to(self.dtype).view(self.lies)
            return dense.transpose(-1, -2) if self.turned else dense

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return torch.Size((*self.lies[:-2], self.lies[-1], self.lies[-2])) if self.turned else self.lies

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Columns of a row as blocks are counted, and rows and columns of a block."""
        columns, form = self.lies[-1], self.form
        in_a_row = form.columns and form.rows == 1
        return (self.lies.numel() if in_a_row else columns), form.rows, form.columns or columns


def _by_torch(packed: Packed, codes: Tensor) -> Tensor:
    columns, rows, of_block = packed.blocks
    codes = codes.flatten()
    if packed.form.bits == 4:
        high, low = codes >> 4, codes & 15
        codes = torch.stack((high, low) if packed.form.high_first else (low, high), dim=-1)
    values = packed.table.view(torch.float32)[codes.flatten().int()]
    scales = packed.scales
    scales = torch.exp2(scales.float() - 127) if packed.form.powers else scales.view(torch.float32)
    if rows == 1:
        return (values.view(-1, of_block) * scales[:, None]).to(packed.rounded)
    values = values.view(-1, columns)
    scales = scales.view(-1, -(-columns // of_block)).repeat_interleave(of_block, 1)[:, :columns]
    return (values * scales.repeat_interleave(rows, 0)[: len(values)]).to(packed.rounded)


def quantize(weight: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """[.., O, I] of any float type -> uint8 codes and float32 scales, as bitsandbytes (nf4, int8) and transformers
    (fp8) make them.
    """
    if form.rows > 1:
        return _quantize_squares(weight, form)
    of_block = form.columns or weight.shape[-1]
    parts = [_quantize_rows(part, form) for part in weight.reshape(-1, of_block).split(max(1, AT_A_TIME // of_block))]
    codes, scales = (torch.cat(list(each)) for each in zip(*parts, strict=True))
    return codes, scales


def _quantize_rows(blocks: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """[n, weights of a block] -> codes [n * weights * bits / 8], scales [n]."""
    values = blocks.float()
    most = values.abs().amax(dim=1)
    if form.name == "int8":
        codes = torch.round(values * (127.0 / most.clamp(min=1e-38))[:, None])
        return codes.to(torch.int8).view(torch.uint8).flatten(), most / 127.0
    table = form.table().to(blocks.device)
    scaled = (values * (1.0 / most.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    nearest = torch.bucketize(scaled.flatten(), (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return (nearest[::2] << 4) | nearest[1::2], most


def _quantize_squares(weight: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    matrix = weight.reshape(-1, weight.shape[-1])
    codes, scales = [], []
    for strip in matrix.split(form.rows):  # [rows, I]
        values = strip.float()
        more = -values.shape[1] % form.columns
        most = nn.functional.pad(values.abs(), (0, more)).view(len(values), -1, form.columns).amax(dim=(0, 2))
        scale = torch.where(most > 0, _E4M3_MAX / most, torch.ones_like(most))
        wide = scale.repeat_interleave(form.columns)[: values.shape[1]]
        codes.append((values * wide).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8))
        scales.append(1.0 / scale)
    return torch.cat(codes).flatten(), torch.stack(scales)


def pack(module: nn.Module, name: str, packed: Packed, codes: Tensor) -> None:
    """Put codes in place of the module's weight of that name."""
    if not parametrize.is_parametrized(module):
        module.order_when_dense = list(module._parameters)  # type: ignore[assignment]
    del module._parameters[name]
    module.register_buffer(name, codes.flatten())
    parametrize.register_parametrization(module, name, packed, unsafe=True)
    module._is_hf_initialized = True  # type: ignore[assignment] # transformers would draw what it misses


def packed_weights(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Every packed weight, under the name that it has in a dense model."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            held: Any = module.parametrizations
            for weight, steps in held.items():
                if isinstance(steps[0], Packed):
                    yield f"{name}.{weight}", steps[0]


Lies = tuple[str, str, tuple[int, ...], bool]
"""Of a packed weight: full name, format, shape as codes lie, whether the layer has it the other way round."""


def how_packed(model: nn.Module) -> list[Lies]:
    """What `pack_empty` makes the same of."""
    return [(name, p.form.name, tuple(p.lies), p.turned) for name, p in packed_weights(model)]


def pack_empty(model: nn.Module, weights: list[Lies], dtype: torch.dtype) -> None:
    """Pack weights of a model without memory."""
    for full, name, lies, turned in weights:
        form, (path, _, weight) = FORMATS[name], full.rpartition(".")
        kind = torch.uint8 if form.powers else torch.float32
        scales = torch.empty(form.scales_of(lies), dtype=kind, device="meta")
        codes = torch.empty(prod(lies) * form.bits // 8, dtype=torch.uint8, device="meta")
        pack(model.get_submodule(path), weight, Packed(form, lies, dtype, scales, turned=turned), codes)


def fill_codes(held: Any, device: torch.device, deviation: float) -> None:
    """Give a packed weight without memory random codes, and scales that make weights of that standard deviation."""
    packed: Packed = held[0]
    form, table = packed.form, packed.form.table()
    used = torch.arange(len(table)) & 0xBF  # of fp8 no NaN
    scale = torch.full(packed.scales.shape, deviation / float(table[used].std()), device=device)
    held.original = torch.randint(256, held.original.shape, dtype=torch.uint8, device=device)
    if form.name == "fp8":
        held.original &= 0xBF
    packed.scales = (scale.log2().round() + 127).byte() if form.powers else scale.view(torch.int32)
    packed.table = table.view(torch.int32).to(device)


def leave_out_of_checkpoints(model: nn.Module) -> None:
    """Codes and scales are in no state_dict from now on. After loading: transformers fills such buffers anew."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for part in module.parametrizations.modules():  # type: ignore[union-attr]
                part._non_persistent_buffers_set.update(part._buffers)


@contextmanager
def seen_dense(model: nn.Module, *, linears: bool = True) -> Iterator[None]:
    """Inside, stands for every packed weight a parameter of its shape without content: PEFT looks at parameters, and
    nests and names adapters of packed stacks otherwise. `linears`: also of linear layers, whose content DoRA reads.
    """
    hidden = []
    for name, packed in list(packed_weights(model)):
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        if linears or not isinstance(module, nn.Linear):
            stand_in = nn.Parameter(
                torch.empty(1, dtype=packed.dtype, device=packed.table.device).expand(packed.shape), requires_grad=False
            )
            hidden.append((module, type(module), module._modules.get("parametrizations"), weight, stand_in))
    for module, kind, _, weight, stand_in in hidden:
        module.__class__ = kind.__base__  # type: ignore[assignment]
        module._modules.pop("parametrizations", None)
        module._parameters[weight] = stand_in
        order: Any = module.order_when_dense
        module._parameters = {key: module._parameters[key] for key in order if key in module._parameters}
    try:
        yield
    finally:
        for module, kind, held, weight, _ in hidden:
            del module._parameters[weight]
            module._modules["parametrizations"] = held
            module.__class__ = kind


def unpack(model: nn.Module) -> None:
    """Make every packed weight an ordinary dense one."""
    for name, _ in list(packed_weights(model)):
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        dense = getattr(module, weight).contiguous()
        parametrize.remove_parametrizations(module, weight, leave_parametrized=False)
        del module._buffers[weight]
        setattr(module, weight, nn.Parameter(dense))
