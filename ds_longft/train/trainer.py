"""The loop. Reads top to bottom: run -> step -> evaluate -> save.

One loss rule: L = sum(w * ce) / sum(w), both sums over every pack of the optimizer step, every accumulation micro-step, every
sp and dp rank. The divisor W is known from the data plan before the first backward pass, so each rank backpropagates
local_sum * world / W, the engine averages over the world, and no differentiable collective is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ds_longft.batch import Pack, Step
from ds_longft.config import RunConfig
from ds_longft.data.loader import StepLoader
from ds_longft.errors import NonFiniteError
from ds_longft.layout import ParallelLayout
from ds_longft.model.flops import step_flops
from ds_longft.sequence.shard import shard
from ds_longft.train.checkpoint import Checkpoints, TrainState
from ds_longft.train.engine import Built
from ds_longft.train.metrics import Records, peak_gib
from ds_longft.train.schedule import learning_rate


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
    peak_tflops: float | None = None  # bf16 dense peak of one GPU, for MFU
    _waited_s: float = 0.0  # the loader's wait, as of the previous step

    def run(self) -> TrainState:
        """Train from `state` to the end; returns the final state, which is saved."""
        if self.state.step == 0:
            self._evaluate()
        train = self.config.train
        while self.state.step < self.state.total_steps:
            steps = self.train_loader.steps(self.state.epoch, self.state.step_in_epoch)
            for step in steps:
                self._train_step(step)
                done = self.state.step == self.state.total_steps
                if done or (train.eval_every_steps and self.state.step % train.eval_every_steps == 0):
                    self._evaluate()
                if done or (train.save_every_steps and self.state.step % train.save_every_steps == 0):
                    self.checkpoints.save(self.built.engine, self.state, self.write_model)
                if done:
                    break
            steps.close()
            if self.state.step < self.state.total_steps:
                self.state = replace(self.state, epoch=self.state.epoch + 1, step_in_epoch=0)
        return self.state

    def _train_step(self, step: Step) -> None:
        started = time.monotonic()
        engine = self.built.engine
        wait_s, self._waited_s = self.train_loader.wait_s - self._waited_s, self.train_loader.wait_s
        lr = learning_rate(self.state.step, self.state.total_steps, self.config.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        # A step without any target (W = 0) backpropagates zeros.
        scale = self.layout.world / step.total_weight if step.total_weight else 0.0
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # weighted loss, FLOPs
        for i, pack in enumerate(step.packs):
            if i:
                engine.step()  # counts the micro-step; weights change only at the last one
            batch = shard(pack, self.layout, self.device)
            loss_sum = engine(batch)
            sums[0] += loss_sum.detach()
            sums[1] += self._flops(pack)
            engine.backward(loss_sum * scale, scale_wrt_gas=False)
        dist.all_reduce(sums)
        loss_total, flops = sums.tolist()
        if not math.isfinite(loss_total):
            raise NonFiniteError(self._stopped("the loss is not finite", step))
        grad_norm = _unwrapped_grad_norm(engine)
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise NonFiniteError(self._stopped("the gradient is not finite", step))
        engine.step()
        if not engine.was_step_applied():  # DeepSpeed found the gradient not finite and left the weights alone
            raise NonFiniteError(self._stopped("the gradient is not finite", step))
        norm = engine.get_global_grad_norm() if grad_norm is None else grad_norm
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            step_in_epoch=self.state.step_in_epoch + 1,
            tokens_seen=self.state.tokens_seen + step.tokens,
        )
        step_s = time.monotonic() - started + wait_s
        slowest = torch.tensor([peak_gib(self.device), wait_s], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        peak, wait_s = slowest.tolist()
        achieved_tflops = flops / step_s / self.layout.world / 1e12
        self.records.step(
            {
                "step": self.state.step,
                "epoch": self.state.epoch,
                "loss": loss_total / step.total_weight if step.total_weight else None,
                "grad_norm": None if norm is None else float(norm),
                "learning_rate": lr,
                "tokens_per_s_per_gpu": step.tokens / step_s / self.layout.world,
                "mfu": achieved_tflops / self.peak_tflops if self.peak_tflops else None,
                "peak_gib": peak,
                "padding_percent": 100 * step.padding_tokens / max(1, step.tokens + step.padding_tokens),
                "data_wait_percent": 100 * min(1.0, wait_s / step_s),
                "step_s": step_s,
                "tokens_seen": self.state.tokens_seen,
                "targets_weight": step.total_weight,
            }
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Loss over the held-out set, under the same sequence parallelism and by the same rule."""
        if self.eval_loader is None:
            return
        started = time.monotonic()
        engine = self.built.engine
        engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # weighted loss, targets
        weight = 0.0
        for step in self.eval_loader.steps(0):
            weight += step.total_weight
            for pack in step.packs:
                batch = shard(pack, self.layout, self.device)
                sums[0] += engine(batch)
                sums[1] += len(batch.targets)
        engine.train()
        dist.all_reduce(sums)
        loss_total, targets = sums.tolist()
        self.records.evaluation(
            {
                "step": self.state.step,
                "eval_loss": loss_total / weight,
                "eval_targets": int(targets),
                "eval_s": time.monotonic() - started,
            }
        )

    def _flops(self, pack: Pack) -> float:
        """This rank's share of a pack's useful FLOPs; padding does no useful work."""
        lengths = np.diff(pack.cu_seqlens).tolist()
        useful = lengths[:-1] if pack.padding_tokens else lengths
        targets = int((pack.loss_weights != 0).sum())
        return step_flops(self.built.shape, useful, lora=self.config.lora is not None, targets=targets) / self.layout.sp

    def _stopped(self, what: str, step: Step) -> str:
        rows = [list(pack.rows) for pack in step.packs]
        return (
            f"{what} at step {self.state.step + 1}; the weights were not changed. Rows of dp rank {self.layout.dp_rank}: "
            f"{rows}. Look at them with `ds-longft data inspect`, or lower optim.learning_rate."
        )


def _unwrapped_grad_norm(engine: Any) -> float | None:
    """Global gradient norm where no ZeRO wrapper computes one (stage 0 in fp32): each rank holds all gradients."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
