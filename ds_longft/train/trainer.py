"""The loop. Reads top to bottom: run -> step -> evaluate -> save.

Rank-local wishes (a signal came, the time is up) become decisions of all ranks at fixed places: with the sums of a
step, between the packs of a step or an evaluation, and after a save. The loss rule is in `step.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ds_longft.batch import Pack, Step
from ds_longft.config.run_config import RunConfig
from ds_longft.data.loader import StepLoader
from ds_longft.decide.plan_json import note_in_plan
from ds_longft.decide.setting import GIB
from ds_longft.errors import CheckpointError, NonFiniteError
from ds_longft.exactness.first_step import check_first_step, raise_if_wrong
from ds_longft.layout import ParallelLayout
from ds_longft.model.peaks import peak_tflops
from ds_longft.ranks.interrupt import StopRequest
from ds_longft.ranks.join import Agreement
from ds_longft.train.checkpoint import Checkpoints, rng_state, set_rng_state
from ds_longft.train.engine import Built
from ds_longft.train.health import Watchdog, describe_packs, write_nonfinite
from ds_longft.train.hub import Pusher
from ds_longft.train.make_optimizer import averaged_weights, set_learning_rate
from ds_longft.train.metrics import Records, peak_gib
from ds_longft.train.resume_rules import TrainState
from ds_longft.train.schedule import learning_rate
from ds_longft.train.step import apply_step, backpropagate, backpropagate_pack, evaluate_pack, loss_scale

FAILED_SAVES_IN_A_ROW = 2


@dataclass
class Trainer:
    """Everything the loop needs, built outside of it; `state` is where the run stands."""

    config: RunConfig
    layout: ParallelLayout
    device: torch.device
    built: Built
    train_loader: StepLoader
    eval_loader: StepLoader | None
    records: Records
    checkpoints: Checkpoints
    write_model: Callable[[Path], None]
    state: TrainState
    agreement: Agreement
    stop: StopRequest
    watchdog: Watchdog
    pusher: Pusher | None = None  # on rank 0, where checkpoints are uploaded

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.peak_tflops = peak_tflops(torch.cuda.get_device_name(self.device)) if on_gpu else None  # bf16, for MFU
        self.relief = self.built.recompute.relief(self.device)  # where something could be given back by a full GPU
        self.stopping = False  # agreed on: the same on every rank
        self.saved_step = self.state.step  # of the newest checkpoint
        self._waited_s = 0.0  # the loader's wait, as of the previous step
        self._failed_saves = 0  # in a row
        self._skipped = 0  # steps in a row

    def run(self) -> bool:
        """Train from `state` to the end; False when asked to stop before it. The last whole step is saved either
        way.
        """
        train = self.config.train
        self.watchdog.enter("the start")
        self._agree_on_stopping()
        if self.state.step == 0 and train.verify_first and self.state.total_steps:
            self._verify_first()
        if self.state.step == 0 or self.state.eval_due:
            self._evaluate()
        while self.state.step < self.state.total_steps and not self.stopping:
            steps = self.train_loader.steps(self.state.epoch, self.state.step_in_epoch)
            for step in steps:
                if not self._train_step(step):
                    break
                done = self.state.step == self.state.total_steps
                if done or (train.eval_every_steps and self.state.step % train.eval_every_steps == 0):
                    self._evaluate()
                if done or (train.save_every_steps and self.state.step % train.save_every_steps == 0):
                    self._save()
                if done or self.stopping:
                    break
            steps.close()
            if self.state.step < self.state.total_steps and not self.stopping:
                epoch = self.state.epoch + 1
                self.state = replace(self.state, epoch=epoch, step_in_epoch=0, rows=self.train_loader.rows_name(epoch))
        if self.stopping:
            self._save()
        return not self.stopping

    def _verify_first(self) -> None:
        """Checks on the first step before it is trained; raises ModelError (exit 64) where one fails."""
        steps = self.train_loader.steps(0)
        step = next(steps)
        steps.close()
        findings = check_first_step(
            self.built.engine, step, self.layout, self.device, backpropagate=backpropagate,
            gather=self.agreement.gather, vocab_size=self.built.run.facts.vocab,
            dtype=torch.bfloat16 if self.built.engine.bfloat16_enabled() else torch.float32,
        )  # fmt: skip
        raise_if_wrong(findings)
        for finding in findings:
            self.records.say(f"verified: {finding.what} {finding.measured} (allowed {finding.tolerance})")

    def _train_step(self, step: Step) -> bool:
        """One optimizer step. False: all ranks agreed to stop between its packs; weights and random state are as
        before.
        """
        started = time.monotonic()
        engine = self.built.engine
        wait_s, self._waited_s = self.train_loader.wait_s - self._waited_s, self.train_loader.wait_s
        lr = learning_rate(self.state.step, self.state.total_steps, self.config.optim)
        set_learning_rate(engine, lr)
        packs = self._backpropagate(step)
        if packs is None:
            return False
        flops, of_packs = zip(*packs, strict=True)
        # FLOPs, ranks that want to stop, weighted loss, metrics
        mine = torch.tensor([sum(flops), float(self.stop.asked())], dtype=torch.float64, device=self.device)
        sums = torch.cat([mine, torch.stack(of_packs).sum(0)])
        self.watchdog.enter(f"step {self.state.step + 1}, sums and update")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the sums are read below anyway
        arrived = time.time()  # hosts' clocks, which NTP keeps within milliseconds
        dist.all_reduce(sums)
        all_flops, stop, loss_total, *metrics = sums.tolist()
        self.stopping = self.stopping or stop > 0
        with self.relief or nullcontext():
            nonfinite, norm = apply_step(engine, loss_total, skip=self.config.train.on_nonfinite == "skip")
        if nonfinite:
            self._report_nonfinite(nonfinite, step, [of_pack[0] for of_pack in of_packs])
        self._skipped = self._skipped + 1 if nonfinite else 0
        at = self.state
        seen_tokens = at.tokens_seen + step.tokens
        self.state = replace(at, step=at.step + 1, step_in_epoch=at.step_in_epoch + 1, tokens_seen=seen_tokens)
        step_s = time.monotonic() - started + wait_s
        given_gib = self.relief.take_note() / GIB if self.relief is not None else 0.0
        own = torch.tensor([peak_gib(self.device), wait_s, arrived, given_gib], dtype=torch.float64, device=self.device)
        ranks = own.new_empty(self.layout.world, len(own))
        dist.all_gather_into_tensor(ranks.view(-1), own)
        peak, wait_s, _, given_gib = ranks.amax(0).tolist()
        if given_gib:
            self._say_given(given_gib, int(ranks[:, 3].argmax()))
        behind = ranks[:, 2] - ranks[:, 2].amin()
        achieved_tflops = all_flops / step_s / self.layout.world / 1e12
        self.records.step(
            {
                "step": self.state.step,
                "epoch": self.state.epoch,
                "loss": loss_total / step.total_weight if step.total_weight and not nonfinite else None,
                "grad_norm": norm,
                "learning_rate": lr,
                "tokens_per_s_per_gpu": step.tokens / step_s / self.layout.world,
                "mfu": achieved_tflops / self.peak_tflops if self.peak_tflops else None,
                "peak_gib": peak,
                "padding_percent": 100 * step.padding_tokens / max(1, step.tokens + step.padding_tokens),
                "data_wait_percent": 100 * min(1.0, wait_s / step_s),
                "step_s": step_s,
                "rank_spread_s": float(behind.max()),
                "last_rank": int(behind.argmax()),
                "tokens_seen": self.state.tokens_seen,
                "targets_weight": step.total_weight,
                **self._means(metrics, step.total_weight),
                **({"skipped": nonfinite} if nonfinite else {}),
                **({"given_back_gib": given_gib} if given_gib else {}),
            }
        )
        return True

    def _backpropagate(self, step: Step) -> list[tuple[float, torch.Tensor]] | None:
        """FLOPs and sums of each pack of a step, its gradients in the engine. None: all ranks agreed to stop between
        two.
        """
        engine, scale = self.built.engine, loss_scale(step.total_weight, self.layout)
        packs: list[tuple[float, torch.Tensor]] = []
        random_state = rng_state()
        with self.relief or nullcontext():
            engine.module.before_step(engine, step.packs, self.layout, self.device)
        for i, pack in enumerate(step.packs):
            if i:
                if self._agree_on_stopping():
                    set_rng_state(random_state)
                    return None
                engine.step()  # counts the micro-step; weights change only at the last one
            self.watchdog.enter(f"step {self.state.step + 1}, pack {i + 1} of {len(step.packs)}")
            with self.relief or nullcontext():
                of_pack = backpropagate_pack(engine, pack, scale, self.layout, self.device).double()
            packs.append((self._flops(pack), of_pack))
        return packs

    def _say_given(self, given_gib: float, rank: int) -> None:
        """A GPU was full in the step that is just over."""
        still = sum(len(keep.on_device) for keep in self.built.recompute.keep)
        self.records.say(
            f"the GPU of rank {rank} was full in step {self.state.step}: {given_gib:.1f} GiB that were kept to save "
            f"time are computed again from now on, with the same losses. Rank 0 keeps {still} groups of linears."
        )
        if self.layout.rank == 0:
            note_in_plan(self.checkpoints.folder, {"step": self.state.step, "rank": rank, "gib": round(given_gib, 2)})

    def _report_nonfinite(self, what: str, step: Step, losses: list[torch.Tensor]) -> None:
        """Write down which rows were trained on; raises NonFiniteError unless the step may be skipped."""
        mine = describe_packs(step, self.layout, [float(x) for x in losses], self.train_loader.origin)
        ranks = self.agreement.gather(mine)
        number = self.state.step + 1
        path = self.agreement.on_rank0(lambda: write_nonfinite(self.checkpoints.folder, number, what, ranks))
        text = f"{what} at step {number}; the weights were not changed. The step's rows are listed in {path}."
        train = self.config.train
        if train.on_nonfinite == "skip" and self._skipped < train.max_skipped_in_a_row:
            self.records.say(text)
            return
        before = f" ({self._skipped} steps before it were skipped: train.max_skipped_in_a_row)" if self._skipped else ""
        skip = "" if train.on_nonfinite == "skip" else ", or set train.on_nonfinite to skip"
        raise NonFiniteError(
            f"{text}{before} Look at them with `ds-longft data inspect`, lower optim.learning_rate{skip}."
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Loss over the held-out set, under the same sequence parallelism and by the same rule."""
        if self.eval_loader is None:
            return
        with averaged_weights(self.built.engine):
            self._evaluate_weights(self.eval_loader)

    def _evaluate_weights(self, eval_loader: StepLoader) -> None:
        self.state = replace(self.state, eval_due=True)
        started = time.monotonic()
        engine = self.built.engine
        engine.eval()
        # targets, weighted loss, metrics
        sums = torch.zeros(2 + len(self.built.objective.metrics), dtype=torch.float64, device=self.device)
        weight = 0.0
        steps = eval_loader.steps(0)
        for step in steps:
            weight += step.total_weight
            for pack in step.packs:
                if self._agree_on_stopping():
                    break
                self.watchdog.enter(f"evaluation after step {self.state.step}")
                of_pack, targets = evaluate_pack(engine, pack, self.layout, self.device)
                sums[0] += targets
                sums[1:] += of_pack
            if self.stopping:
                break
        steps.close()
        engine.train()
        if self.stopping:
            return  # eval_due is saved with the state: it is made up for after the resume
        self.state = replace(self.state, eval_due=False)
        dist.all_reduce(sums)
        all_targets, loss_total, *metrics = sums.tolist()
        self.records.evaluation(
            {
                "step": self.state.step,
                "eval_loss": loss_total / weight,
                "eval_targets": round(all_targets),
                "eval_s": time.monotonic() - started,
                **self._means(metrics, weight, "eval_"),
            }
        )

    def _save(self) -> None:
        """Save, unless it is saved already. One failed save is survived, a second one in a row is not.

        The last save of a process is tried twice: nothing comes after it.
        """
        if self.state.step == self.saved_step:
            return
        last = self.stopping or self.state.step == self.state.total_steps
        while True:
            self.watchdog.enter(f"save after step {self.state.step}")
            started = time.monotonic()
            try:
                saved = self.checkpoints.save(self.built.engine, self.state, self.write_model)
            except CheckpointError as e:
                self._failed_saves += 1
                self.records.say(
                    f"SAVE FAILED ({self._failed_saves} in a row; {FAILED_SAVES_IN_A_ROW} end the run): {e}"
                )
                if self._failed_saves >= FAILED_SAVES_IN_A_ROW:
                    raise
                if last:
                    continue
            else:
                self._failed_saves = 0
                self.saved_step = self.state.step
                if self.pusher is not None:
                    self.pusher.after_save(saved)
                self.stop.saved(time.monotonic() - started)
            break
        self._agree_on_stopping()

    def _agree_on_stopping(self) -> bool:
        """Whether the run stops here; asks all ranks, over the host's network and without the device."""
        self.stopping = self.agreement.any(self.stopping or self.stop.asked())
        return self.stopping

    def _flops(self, pack: Pack) -> float:
        """This rank's share of a pack's useful FLOPs; padding does no useful work."""
        lengths = np.diff(pack.cu_seqlens).tolist()
        useful = lengths[:-1] if pack.padding_tokens else lengths
        targets = int((pack.loss_weights != 0).sum())
        facts = self.built.run.facts
        flops = facts.step_flops(useful, lora=self.config.lora is not None, targets=targets)
        if self.built.objective.live_reference:
            flops += facts.forward_flops(useful, targets=targets)
        return flops / self.layout.sp

    def _means(self, sums: list[float], weight: float, prefix: str = "") -> dict[str, float]:
        """Metrics of a step: weighted means. None of a step without weight, or with one that is no number."""
        if not weight or not all(map(math.isfinite, sums)):
            return {}
        return {prefix + name: s / weight for name, s in zip(self.built.objective.metrics, sums, strict=True)}
