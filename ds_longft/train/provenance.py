"""What a run is made of: code, versions, environment and configs. Written down, and compared between ranks."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ds_longft.config.read import dump_config
from ds_longft.config.run_config import RunConfig
from ds_longft.layout import ParallelLayout

PACKAGES = (
    "ds-longft",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
)

DECIDING_ENV = ("DS_ACCELERATOR", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that change what is computed."""


def what_ranks_share(config: RunConfig, engine_config: dict[str, Any]) -> dict[str, str]:
    """What decides the outcome and could differ between nodes: config, JSON, code, versions, environment."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    code = Path(__file__).resolve().parent.parent
    sources = "".join(p.read_text(encoding="utf-8") for p in sorted(code.rglob("*.py")))
    facts = {
        "the run config": digest(dump_config(config)),
        "the DeepSpeed JSON": digest(json.dumps(engine_config, sort_keys=True)),
        f"the code in {code.name}": digest(sources),
    }
    facts |= {f"the version of {name}": v for name, v in versions().items()}
    return facts | {f"the environment variable {name}": os.environ.get(name, "(unset)") for name in DECIDING_ENV}


def write_facts(
    folder: Path, config: RunConfig, engine_config: dict[str, Any], layout: ParallelLayout, device: torch.device
) -> None:
    """What the run was made of: re-runnable config, resolved DeepSpeed JSON, versions and machine."""
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "ds_config.json").write_text(json.dumps(engine_config, indent=2) + "\n")
    installed = {"python": platform.python_version(), **versions()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = {"device": gpu, "cores": os.cpu_count(), "world": layout.world, "sp": layout.sp, "dp": layout.dp}
    (folder / "versions.json").write_text(json.dumps({"versions": installed, "machine": machine}, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Installed versions of the packages that make a run."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
