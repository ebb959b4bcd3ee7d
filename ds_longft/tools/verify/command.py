"""What the command line of `verify` means: read it, start the ranks where no launcher did, run, print, exit code."""

from __future__ import annotations

import os

from ds_longft.command_line import RunKeys, as_words
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.config.section import parse_tokens
from ds_longft.errors import ConfigError
from ds_longft.ranks.join import Launch, visible_gpus
from ds_longft.ranks.launch import launch_ranks


def verify(
    config: RunKeys,
    *,
    layers: int | None = None,
    tokens: int | str | None = None,
    ranks: int | None = None,
    checks: str = "1,2,3,4,5,6,7,8",
    json: bool = False,
    original: str | None = None,
) -> int:
    """Prove on your own model, data and config that sp ranks train what one process would.

    It starts the ranks itself, one a GPU, or on the CPU. Under a launcher, also on several nodes:
    `deepspeed --module ds_longft.tools.verify mine.yaml --sp 8`.

    checks:
      1 loss and gradients against one process   2 documents do not see each other   3 label borders   4 RoPE
      5 LoRA dropout   6 save, load, merge   7 attention kernels
      8 a quantised base: how far it lies from the unquantised model

    Exit code: 0 all passed, 1 a check failed, 64 a mistake in the config or the data.

    Args:
        config: run config, with any of its keys behind it: --sp 8, --model.random_weights true.
        layers: verify the first N layers only: for a model too large for one GPU in float32.
        tokens: tokens of each pack, e.g. 16K; longer packs are cut. Left out: 8K on GPUs, 512 on CPUs.
        ranks: processes to start: sp, or a multiple of it.
        checks: numbers of the checks to run, e.g. 1,7.
        json: print one JSON object instead of a table.
        original: for check 8, the unquantised model of a checkpoint that is quantised in its files.
    """
    arguments = dict(locals())
    try:
        numbers = frozenset(int(c) for c in checks.split(","))
        count = None if tokens is None else int(parse_tokens(tokens))
    except ValueError as error:
        raise ConfigError(f"ds-longft verify: --checks takes numbers such as 1,7, --tokens a count: {error}") from None
    if not numbers <= set(range(1, 9)):
        raise ConfigError(f"ds-longft verify: --checks is {checks}, there are checks 1 to 8")
    for flag, value in (("--layers", layers), ("--tokens", count), ("--ranks", ranks)):
        if value is not None and value < 1:
            raise ConfigError(f"ds-longft verify: {flag} is {value}, expected 1 or more")
    run, gpus = load_run_config(config), visible_gpus()
    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        started = _ranks(ranks, run, gpus)
        return launch_ranks("ds_longft.tools.verify", as_words(arguments), ranks=started, gpus=gpus)
    from ds_longft.tools.verify.checks import run_checks

    return run_checks(
        run, Launch.from_environment(), device="cuda" if gpus else "cpu", checks=numbers, layers=layers, tokens=count,
        original=original, as_json=json,
    )  # fmt: skip


def _ranks(asked: int | None, config: RunConfig, gpus: int) -> int:
    """How many to start. Raises ConfigError with what each of them would refuse, before there is any."""
    from ds_longft.config.preflight import preflight
    from ds_longft.tools import quickstart

    sp = config.sp if isinstance(config.sp, int) else None
    ranks = asked or sp or gpus or 2
    if sp and ranks % sp:
        raise ConfigError(f"ds-longft verify: --ranks is {ranks}, sp is {sp}: give {sp} ranks or a multiple of it")
    if gpus and ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks are asked for, this machine has {gpus} GPUs: give a smaller sp, or CUDA_VISIBLE_DEVICES= "
            f"to verify on the CPU, or start it with a launcher on several nodes"
        )
    quickstart.prepare(config)
    preflight(config, world=ranks, local_world=ranks, device="cuda" if gpus else "cpu")
    return ranks
