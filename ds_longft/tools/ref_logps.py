"""`ds-longft data ref_logps`: the reference's log-probabilities of every pair, computed once and kept with the data.

A step then needs no pass of the reference at all. The run's own engine computes them (same weights, sequence
parallelism, kernels), on as many ranks as the run. What was written stays: a second start does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Any

from ds_longft.errors import ConfigError, NonFiniteError
from ds_longft.ranks.join import Launch, visible_gpus
from ds_longft.ranks.launch import Flags, launch_ranks, run_rank

if TYPE_CHECKING:
    from ds_longft.config.run_config import RunConfig

EPILOG = """\
Every key of a run config may be given as well. The files go into data.cache_dir; training finds
them by the model and the data, and says so where they do not fit.

  ds-longft data ref_logps --config mine.yaml                        starts the ranks itself: one a GPU, or on the CPU
  ds-longft data ref_logps --config mine.yaml --sp 2 --ranks 4       sp 2 and 2 packs at a time
  deepspeed --module ds_longft.tools.ref_logps --config mine.yaml    under a launcher, also on several nodes
  deepspeed launch/train.py --config mine.yaml --dpo.reference precomputed
"""
FLUSH_S = 20.0
"""Written to the disk at least this often; what a crash loses is computed again."""


def ref_logps(*argv: str) -> None:
    """Compute the log-probabilities of preference pairs before training, for dpo.reference: precomputed."""
    code = main(list(argv))
    if code:
        raise SystemExit(code)


def read(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """The command's own flags, and the run config of the rest."""
    parser = Flags(
        prog="ds-longft data ref_logps",
        usage="ds-longft data ref_logps --config FILE.yaml [--ranks N] [--json]",
        description=ref_logps.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, help="processes to start: sp, or a multiple of it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    own, rest = parser.parse_known_args(argv)
    from ds_longft.config.read import load_run_config  # not for the help

    config = load_run_config(rest)
    if config.objective != "dpo":
        raise ConfigError("ds-longft data ref_logps: objective is sft, which has no reference: set objective to dpo")
    if config.dpo.loss == "simpo":
        raise ConfigError("ds-longft data ref_logps: dpo.loss simpo has no reference: nothing is to be computed")
    if own.ranks is not None and own.ranks < 1:
        raise ConfigError(f"ds-longft data ref_logps: --ranks is {own.ranks}, expected 1 or more")
    # Whatever the run will use; here it keeps a second model from being loaded.
    dpo = config.dpo.model_copy(update={"reference": "precomputed"})
    return own, config.model_copy(update={"dpo": dpo})


def main(argv: list[str]) -> int:
    """Returns 0. Raises LongftError for what the user can mend."""
    own, config = read(argv)
    gpus = visible_gpus()
    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        ranks = own.ranks or (config.sp if isinstance(config.sp, int) else gpus or 1)
        return launch_ranks("ds_longft.tools.ref_logps", argv, ranks=ranks, gpus=gpus)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    launch = Launch.from_environment()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local_world)))
    _compute(config, launch, gpus, as_json=own.json)
    return 0


def _compute(config: RunConfig, launch: Launch, gpus: int, *, as_json: bool) -> None:
    """On every rank alike: tokenize, build the run's engine, fill the files of the training and evaluation sets."""
    import torch.distributed as dist

    from ds_longft.config.check import preflight
    from ds_longft.data.pairs import PairSet
    from ds_longft.data.tokenize import tokenize_sources
    from ds_longft.layout import ParallelLayout
    from ds_longft.model.load import load_tokenizer
    from ds_longft.ranks.join import join
    from ds_longft.tools import quickstart
    from ds_longft.train.device_memory import own_memory_gib
    from ds_longft.train.engine import build
    from ds_longft.train.install import known_run

    quickstart.prepare(config)
    settings, sp = preflight(
        config, world=launch.world, local_world=launch.local_world, device="cuda" if gpus else "cpu"
    )
    device, agreement = join(launch)
    layout = ParallelLayout.create(sp)
    tokenizer = load_tokenizer(config.model)

    def sets() -> list[PairSet]:
        made = []
        for sources in (config.data.train, config.data.eval):
            if sources:
                pairs = tokenize_sources(sources, tokenizer, config.data, progress=launch.rank == 0, pairs=True)
                assert isinstance(pairs, PairSet)
                made.append(pairs)
        return made

    parts = agreement.rank0_first(sets)
    memory_gib, _ = own_memory_gib(device)
    built = build(known_run(config, settings, layout, device, memory_gib=memory_gib), layout, device)
    built.engine.eval()
    results = [fill(built.engine, config, part, layout, device, agreement) for part in parts]
    if launch.rank == 0:
        for result in results:
            print(
                json.dumps(result)
                if as_json
                else f"{result['file']}: {result['computed']:,} of {result['pairs']:,} pairs computed now, "
                f"{result['tokens']:,} tokens in {result['s']:.1f} s"
            )
    agreement.gather(None)
    dist.destroy_process_group()


def fill(engine: Any, config: RunConfig, pairs: Any, layout: Any, device: Any, agreement: Any) -> dict[str, Any]:
    """Compute what the file of `pairs` lacks; packs are shared out over the dp ranks. Collective."""
    import numpy as np

    from ds_longft.data.pack import filler_pack
    from ds_longft.data.pack_plan import plan_epoch
    from ds_longft.data.progress import Progress
    from ds_longft.objectives.passes import reference_logps
    from ds_longft.objectives.reference_cache import open_reference, reference_file

    file = reference_file(config, pairs)
    store = agreement.on_rank0(lambda: np.array(open_reference(config, pairs)))
    missing = np.flatnonzero(np.isnan(store).any(1))
    plan = plan_epoch(
        pairs.lengths[missing], budget_tokens=config.budget_tokens, dp=layout.dp, accumulation=1, seed=0, epoch=0,
        packing="best_fit", shuffle=False,
    )  # fmt: skip
    out = open_reference(config, pairs) if layout.rank == 0 else None
    started = flushed = time.monotonic()
    tokens = done = 0
    with Progress("log-probabilities", int(pairs.lengths[missing].sum()), show=layout.rank == 0) as bar:
        for index in range(len(plan)):
            number = plan.step(index)[layout.dp_rank][0]
            if number is None:
                rows: list[int] = []
                pack = filler_pack(layout.sp)
            else:
                rows = missing[plan.packs[number]].tolist()
                pack = pairs.pack(rows, pad_to_multiple=layout.sp, pad_id=0)
            logps = reference_logps(engine, pack, layout, device).cpu().numpy()
            for theirs, values in agreement.gather((rows, logps) if layout.sp_rank == 0 else ([], None)):
                if theirs and not np.isfinite(values).all():  # every rank sees it; in the file NaN means "still to do"
                    number = theirs[int(np.flatnonzero(~np.isfinite(values).all(1))[0])]
                    raise NonFiniteError(
                        f"the log-probabilities of pair {number} (from 0, as tokenised) are not finite: "
                        f"{config.model.path} cannot be a reference in this type (model.dtype)"
                    )
                tokens += int(pairs.lengths[theirs].sum()) if theirs else 0
                done += len(theirs)
                if out is not None and theirs:
                    out[theirs] = values
            bar.update(tokens, f"{done:,} pairs")
            if out is not None and time.monotonic() - flushed > FLUSH_S:
                out.flush()
                flushed = time.monotonic()
    if out is not None:
        out.flush()
    agreement.gather(None)  # nobody reads the file before it is whole
    return {
        "file": str(file), "pairs": len(pairs), "computed": done, "tokens": tokens, "s": time.monotonic() - started,
    }  # fmt: skip


if __name__ == "__main__":
    run_rank(main)
