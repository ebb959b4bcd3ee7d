"""Joining the other processes: what keeps a run from starting is said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

JOIN = "from ds_longft.ranks.join import Launch, join; join(Launch.from_environment(), 20)"


def test_a_port_in_use_is_named() -> None:
    """As after a `deepspeed` that was told to stop: its ranks train on and hold the port."""
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = str(held.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-c", JOIN]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert f"PortError: port {port} is in use" in done.stderr
