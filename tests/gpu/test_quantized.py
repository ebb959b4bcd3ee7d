"""Dequantisation on a GPU: the CPU's to the bit, near the memory's rate, and no dense weight left behind."""

from __future__ import annotations

import pytest
import torch

from ds_longft.model.packed import FORMATS, Packed, _by_torch, quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPES = {
    "nf4": [(4096, 14336), (3, 320, 192)],
    "mxfp4": [(32, 5760, 2880), (3, 50, 64)],
    "int8": [(14336, 4096), (17, 1500)],
    "fp8": [(7168, 2048), (130, 300), (2, 128, 384)],
}


def packed_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Packed, torch.Tensor]:
    """On the GPU."""
    form, count = FORMATS[name], torch.Size(shape).numel()
    if name == "mxfp4":
        codes = torch.randint(256, (count // 2,), dtype=torch.uint8, device="cuda")
        scales = torch.randint(100, 140, (form.scales_of(shape),), dtype=torch.uint8, device="cuda")
    else:
        codes, scales = quantize(torch.randn(shape, device="cuda"), form)
    return Packed(form, shape, dtype, scales).cuda(), codes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_and_cpu_agree_to_the_bit(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[name]:
        packed, codes = packed_of(name, shape, dtype)
        made = packed(codes).cpu()
        assert torch.equal(made, _by_torch(packed.cpu(), codes.cpu()).view(shape)), shape


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_codes_are_the_cpus(name: str) -> None:
    weight = torch.randn(512, 1024).bfloat16()
    ours, theirs = quantize(weight.cuda(), FORMATS[name]), quantize(weight, FORMATS[name])
    assert (ours[0].cpu() != theirs[0]).float().mean() < 1e-5  # a division may round otherwise
    assert torch.allclose(ours[1].cpu(), theirs[1], rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_rate(name: str) -> None:
    shape = SHAPES[name][0]
    packed, codes = packed_of(name, shape, torch.bfloat16)
    moved = torch.Size(shape).numel() * (packed.form.bytes_per_weight + 2)
    for _ in range(3):
        packed(codes)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        packed(codes)
    end.record()
    torch.cuda.synchronize()
    rate = 20 * moved / (start.elapsed_time(end) * 1e-3) / 1e9
    print(f"{name} {shape}: {rate:,.0f} GB/s read and written")
    assert rate > 500
