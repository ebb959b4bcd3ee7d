"""`ds-longft data ref_logps`: the reference's log-probabilities of every pair, computed once and kept with the data.

A step then needs no pass of the reference at all. The run's own engine computes them (same weights, sequence
parallelism, kernels), on as many ranks as the run. What was written stays: a second start does only what is missing.
"""

from __future__ import annotations

import json as json_text
import os
import time
from functools import partial
from typing import Any

from ds_longft.command_line import RunKeys, as_words, call
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError, NonFiniteError
from ds_longft.ranks.join import Launch, visible_gpus
from ds_longft.ranks.launch import launch_ranks, run_rank

FLUSH_S = 20.0
"""Written to the disk at least this often; what a crash loses is computed again."""


def ref_logps(config: RunKeys, *, ranks: int | None = None, json: bool = False) -> None:
    """Compute the log-probabilities of preference pairs before training, for dpo.reference: precomputed.

    It starts the ranks itself, one a GPU, or on the CPU; --sp 2 --ranks 4 takes two packs at a time. Under a launcher,
    also on several nodes: `deepspeed --module ds_longft.tools.ref_logps mine.yaml`. The files go into data.cache_dir;
    training finds them by the model and the data, and says so where they do not fit.

    Args:
        config: run config.
        ranks: processes to start: sp, or a multiple of it.
        json: print one JSON object instead of lines.
    """
    run, gpus = of_pairs(load_run_config(config)), visible_gpus()
    if ranks is not None and ranks < 1:
        raise ConfigError(f"ds-longft data ref_logps: --ranks is {ranks}, expected 1 or more")
    if "RANK" not in os.environ and "SLURM_STEP_ID" not in os.environ:
        started = ranks or (run.sp if isinstance(run.sp, int) else gpus or 1)
        words = as_words({"config": config, "json": json})
        if code := launch_ranks("ds_longft.tools.ref_logps", words, ranks=started, gpus=gpus):
            raise SystemExit(code)
        return
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    launch = Launch.from_environment()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local_world)))
    _compute(run, launch, gpus, as_json=json)


def of_pairs(config: RunConfig) -> RunConfig:
    """The config as its reference is computed. Raises ConfigError where it has none."""
    if not config.pairs:
        raise ConfigError("ds-longft data ref_logps: objective is sft, which has no reference: set objective to dpo")
    if config.dpo.loss == "simpo":
        raise ConfigError("ds-longft data ref_logps: dpo.loss simpo has no reference: nothing is to be computed")
    # Whatever the run will use; here it keeps a second model from being loaded.
    return config.model_copy(update={"dpo": config.dpo.model_copy(update={"reference": "precomputed"})})


def _compute(config: RunConfig, launch: Launch, gpus: int, *, as_json: bool) -> None:
    """On every rank alike: tokenize, build the run's engine, fill the files of the training and evaluation sets."""
    import torch.distributed as dist

    from ds_longft.config.preflight import preflight
    from ds_longft.data.pairs import PairSet
    from ds_longft.data.tokenize import tokenize_sources
    from ds_longft.layout import ParallelLayout
    from ds_longft.model.read_model import load_tokenizer
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
                json_text.dumps(result)
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
    run_rank(partial(call, ref_logps, "ds-longft data ref_logps"))
