"""What other processes hold of a GPU is not planned with."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ds_longft.ranks.join import free_port
from ds_longft.train.device_memory import own_memory_gib

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HOLD_GIB = 12
HOLD = f"import torch; x = torch.empty({HOLD_GIB} << 30, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"


def test_memory_of_another_process_is_seen() -> None:
    device = torch.device("cuda", 0)
    total_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    other = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        mine = torch.empty(6 << 30, dtype=torch.uint8, device=device)
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        own, others = own_memory_gib(device)
        assert own is not None
        assert HOLD_GIB - 3 < others < HOLD_GIB + 1
        assert own + others == pytest.approx(total_gib)
        other.communicate("\n")
        assert own_memory_gib(device) == (pytest.approx(total_gib), 0.0)
        del mine
    finally:
        other.kill()
        dist.destroy_process_group()
