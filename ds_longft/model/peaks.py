"""What GPUs can do at most, for MFU."""

from __future__ import annotations

import re

# Dense bf16 matrix products, TFLOP/s, from the makers' data sheets; the first pattern found in the name counts.
PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bH200\b", 989.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH[18]00\b", 989.0),
    (r"\bA[18]00\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bRTX 4090\b", 165.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of one GPU in TFLOP/s by `torch.cuda.get_device_name`; None for devices not in the table."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_name)), None)
