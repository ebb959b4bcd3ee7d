"""What the command line of `verify` means: read it, start the ranks where no launcher did, run, print, exit code."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_longft.errors import ConfigError
from ds_longft.ranks.join import Launch, visible_gpus
from ds_longft.ranks.launch import Flags, launch_ranks

if TYPE_CHECKING:
    from ds_longft.config.run_config import RunConfig

EPILOG = """\
Every key of a run config may be given as well (--model.kernel varlen, --model.random_weights true).

  ds-longft verify --config my.yaml --sp 8                     starts 8 ranks itself: one a GPU, or on the CPU
  ds-longft verify --config my.yaml --sp 2 --ranks 4           sp 2 and 2 samples at a time
  ds-longft verify --config my.yaml --sp 8 --layers 2          a model too large for one GPU in float32
  deepspeed --module ds_longft.tools.verify --config my.yaml --sp 8  under a launcher, also on several nodes

checks: 1 loss and gradients against one process   2 documents do not see each other   3 label borders   4 RoPE
        5 LoRA dropout   6 save, load, merge   7 attention kernels
exit code: 0 all passed, 1 a check failed, 64 a mistake in the config or the data
"""


@dataclass(frozen=True)
class Options:
    """What is asked of `verify` beside the run config."""

    layers: int | None
    tokens: int | None
    ranks: int | None
    checks: frozenset[int]
    json: bool


def verify(*argv: str) -> None:
    """Prove on your own model, data and config that sp ranks train what one process would."""
    code = main(list(argv))
    if code:
        raise SystemExit(code)


def main(argv: list[str]) -> int:
    """Returns 0 where every check passed, 1 where one failed. Raises LongftError for what the user can mend."""
    options, config = read(argv)
    gpus = visible_gpus()
    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        return launch_ranks("ds_longft.tools.verify", argv, ranks=_ranks(options, config, gpus), gpus=gpus)
    from ds_longft.tools.verify.checks import run_checks

    return run_checks(config, options, Launch.from_environment(), device="cuda" if gpus else "cpu")


def read(argv: list[str]) -> tuple[Options, RunConfig]:
    """Take verify's own flags off the command line; the rest is the run config's."""
    parser = Flags(
        prog="ds-longft verify",
        usage="ds-longft verify --config FILE.yaml [--sp N] [options]",
        description=verify.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layers", type=int, help="verify the first so many layers only")
    parser.add_argument(
        "--tokens", help="tokens of each pack, e.g. 16K; longer packs are cut (8K on GPUs, 512 on CPUs)"
    )
    parser.add_argument("--ranks", type=int, help="processes to start: sp, or a multiple of it")
    parser.add_argument("--checks", default="1,2,3,4,5,6,7", help="numbers of the checks to run, e.g. 1,7")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    own, rest = parser.parse_known_args(argv)
    from ds_longft.config.read import load_run_config
    from ds_longft.config.run_config import parse_tokens  # not for the help

    try:
        checks = frozenset(int(c) for c in own.checks.split(","))
        tokens = None if own.tokens is None else int(parse_tokens(own.tokens))
    except ValueError as error:
        raise ConfigError(f"ds-longft verify: --checks takes numbers such as 1,7, --tokens a count: {error}") from None
    if not checks <= set(range(1, 8)):
        raise ConfigError(f"ds-longft verify: --checks is {own.checks}, there are checks 1 to 7")
    for flag, value in (("--layers", own.layers), ("--tokens", tokens), ("--ranks", own.ranks)):
        if value is not None and value < 1:
            raise ConfigError(f"ds-longft verify: {flag} is {value}, expected 1 or more")
    return Options(own.layers, tokens, own.ranks, checks, own.json), load_run_config(rest)


def _ranks(options: Options, config: RunConfig, gpus: int) -> int:
    """How many to start. Raises ConfigError with what each of them would refuse, before there is any."""
    from ds_longft.config.check import preflight
    from ds_longft.tools import quickstart

    sp = config.sp if isinstance(config.sp, int) else None
    ranks = options.ranks or sp or gpus or 2
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
