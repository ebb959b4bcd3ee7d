"""The package's own step under fake tensors, at any size: every storage is counted while it is alive.

Nothing is computed and no memory is taken, but the code that runs is the code that trains: model, LoRA, fused linears,
recomputation, exchange, chunked loss. Three things stand in for GPU code that cannot run here: an attention kernel with
flash-attention's tensors, liger's norm, rotary embedding and gated activation with liger's, and the loss kernel.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from ds_longft.batch import IGNORE_INDEX, Batch, Documents, Pack, Pairs
from ds_longft.config.run_config import DpoConfig, LoraConfig
from ds_longft.decide.setting import Setting
from ds_longft.decide.tensors import Keep
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import add_lora
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.objectives.passes import backpropagate_pairs
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.exchange import deal_heads
from ds_longft.sequence.head import HeadRule
from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.kernels import Saved
from ds_longft.sequence.loss import WeightedCrossEntropy
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.train.install import fuse_and_tile
from tests.distributed.test_dpo_exact import PlainEngine

LOSS_KERNEL = "ds_longft.sequence.kernels.cross_entropy"


@dataclass(frozen=True)
class Tracked:
    """What a step took."""

    peak: float  # bytes of activations above what the model holds
    held: float  # bytes of the model itself
    at: str  # the op at the peak
    operations: int  # of matrix products


class Tracker(TorchDispatchMode):
    """Bytes of all storages made while it is active, now and at the peak; operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self.at = ""
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._count(t, str(func))
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:  # torch counts addmm alone
            self.operations += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif packet is torch.ops.aten._grouped_mm:  # each row with one matrix
            self.operations += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        self.now += size
        if self.now > self.peak:
            self.peak, self.at = self.now, f"{name} {tuple(tensor.shape)}"
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class UncountedStore(HostStore):
    """Its buffers are host memory, which is not counted."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(torch.device("cpu"))
        self.tracker = tracker

    def buffer(self, key: Any, like: Tensor) -> Tensor:
        peak, at = self.tracker.peak, self.tracker.at
        memory = super().buffer(key, like)
        storage = memory.untyped_storage()
        self.tracker.now -= self.tracker.seen[storage]
        self.tracker.peak, self.tracker.at = peak, at
        return memory


class FlashLike:
    """Flash-attention 4's tensors: out and lse; in the backward pass float32 sums of dq, and of dk, dv if grouped."""

    name = "flash-attn-4"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Any, spec: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    def backward(self, dout: Tensor, saved: Saved, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = saved
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        sums = [x.new_empty(x.shape, dtype=torch.float32) for x in ((q, k, v) if k.shape[1] < q.shape[1] else (q,))]
        rows = q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)
        del sums, rows
        return grads  # type: ignore[return-value]


class Norm(torch.autograd.Function):
    """Liger's RMSNorm: saves its input and one float a token; the gradient is written over the incoming one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        _, w, _ = ctx.saved_tensors
        return dy, torch.empty_like(w) if ctx.needs_input_grad[1] else None


class SiluMul(torch.autograd.Function):
    """Liger's silu(a) * b: gradients are written over a and b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.empty_like(a)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        return ctx.saved_tensors


class Rope(torch.autograd.Function):
    """Liger's rotary embedding: in place, both ways."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Any:
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        return dq, dk


def like_liger(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: Norm.apply(x, m.weight)
        if type(module).__name__.endswith("MLP") and hasattr(module, "gate_proj"):
            module.forward = lambda x, m=module: m.down_proj(SiluMul.apply(m.gate_proj(x), m.up_proj(x)))


def without_values(stack: ExitStack) -> None:
    """Fake tensors, and stand-ins for what looks at their values."""
    stack.enter_context(FakeTensorMode())
    stack.enter_context(patch("ds_longft.sequence.mlp._is_plain", lambda *_: True))
    stack.enter_context(patch("ds_longft.sequence.loss.head_rule", lambda *_: HeadRule()))
    stack.enter_context(patch("ds_longft.sequence.attention.choose_kernel", lambda *a, **k: (FlashLike(), "")))
    stack.enter_context(patch.dict(AttentionMaskInterface._global_mapping, {ULYSSES: lambda **_: None}))
    stack.enter_context(patch.object(WeightedCrossEntropy, "_in_one_kernel", lambda *_: True))
    kernel = SimpleNamespace(cross_entropy_=lambda x, *_, **__: x.new_empty(len(x), dtype=torch.float32))
    sys.modules[LOSS_KERNEL] = kernel  # type: ignore[assignment]
    stack.callback(sys.modules.pop, LOSS_KERNEL)


def tracked_step(shape: dict[str, Any], setting: Setting, keep: Sequence[Keep] | None = None) -> Tracked:
    """One step of a model of that shape at real sizes, under fake tensors."""
    register()
    heads = [shape.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    shares = deal_heads(heads[0], heads[1] or heads[0], setting.sp)
    fullest = max(range(setting.sp), key=lambda rank: len(shares[rank].q))
    dist.init_process_group("fake", store=FakeStore(), rank=fullest, world_size=setting.world)
    try:
        with ExitStack() as stack:
            without_values(stack)
            if setting.fused:
                family = shape["model_type"].removesuffix("_text")
                module = f"transformers.models.{family}.modeling_{family}"
                stack.enter_context(patch(f"{module}.apply_rotary_pos_emb", lambda q, k, *a, **b: Rope.apply(q, k)))
            return _step(shape, setting, keep)
    finally:
        dist.destroy_process_group()


def _step(shape: dict[str, Any], setting: Setting, keep: Sequence[Keep] | None) -> Tracked:
    config = AutoConfig.for_model(**shape)
    config.use_cache = False
    tracker = Tracker()
    with tracker:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ULYSSES)
    base: Any = model
    if setting.fused:
        like_liger(model)
    if setting.lora_r is not None:
        # fake weights cannot be moved: adapters are made in their final type
        torch.set_default_dtype(torch.bfloat16)
        with tracker, patch.object(nn.Module, "to", lambda module, *a, **k: module):
            model = add_lora(base, LoraConfig(r=setting.lora_r, experts=setting.lora_experts), seed=0)
        torch.set_default_dtype(torch.float32)
    layout = ParallelLayout.create(setting.sp)
    pairs = setting.reference != "none" or setting.passes == "two"
    objective: Any
    if pairs:
        with tracker:
            second = _frozen(config, setting) if setting.reference == "model" else None
        dpo = DpoConfig(passes=setting.passes, reference=setting.reference)
        heads = setting.kv_heads
        objective = DpoObjective(model, layout, dpo, reference_model=second, kv_heads_at_a_time=heads)
    else:
        objective = SftObjective(model, layout, kv_heads_at_a_time=setting.kv_heads)
    layers = list(base.get_decoder().layers)
    fused = [fuse_and_tile(layer, 2, setting.tile_tokens) for layer in layers]
    store = UncountedStore(tracker)
    keeps = [LayerKeep(i, store=store) for i in range(len(layers))]
    for kept, of_layer, wanted in zip(keeps, fused, keep or [Keep()] * len(layers), strict=True):
        for group in of_layer.groups:
            where = {"q_proj": wanted.qkv, "o_proj": wanted.o, "gate_proj": wanted.gate_up}.get(group.names[0])
            if where:
                (kept.on_device if where == "device" else kept.on_host).append(group)
        kept.attention = wanted.attention or "nowhere"  # type: ignore[assignment]
        kept.input = wanted.input
        kept.last = of_layer.last
        if setting.fused and of_layer.tiled is not None and len(of_layer.tiled.gate_up.modules) == 2:
            of_layer.tiled.combine = SiluMul.apply
    apply_recompute(layers, setting.recompute, every=setting.every, keep=keeps)
    model.train()
    for p in model.parameters():
        if p.requires_grad:  # the engine takes a gradient into its bucket as soon as it is there
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    held = tracker.now
    if pairs:
        with tracker, patch("torch.from_numpy", _like):
            tracker.peak = held
            backpropagate_pairs(PlainEngine(objective), _pack(setting), 0.5, layout, torch.device("cpu"))
        return Tracked(tracker.peak - held, held, tracker.at, tracker.operations)
    s = setting.local_tokens
    with tracker:
        rows = torch.arange(int(s * setting.targets))
        batch = Batch(
            input_ids=torch.zeros(1, s, dtype=torch.int64),
            position_ids=torch.zeros(1, s, dtype=torch.int64),
            target_rows=rows,
            targets=torch.zeros(len(rows), dtype=torch.int64),
            target_weights=torch.ones(len(rows)),
            documents=Documents(torch.zeros(len(setting.lengths) + 1, dtype=torch.int32), setting.lengths),
            document_tokens=(),  # for RoPE types that go by the length alone
        )
        inputs = tracker.now
        tracker.peak = tracker.now
        loss = objective(batch)
        (loss * 0.5).backward()
    return Tracked(tracker.peak - inputs, held, tracker.at, tracker.operations)


def _frozen(config: Any, setting: Setting) -> nn.Module:
    """The reference model beside the trained one, as `engine.build` makes it."""
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ULYSSES)
    if setting.fused:
        like_liger(model)
    for layer in model.get_decoder().layers:
        tiled = fuse_and_tile(layer, 2, setting.tile_tokens).tiled
        if setting.fused and tiled is not None:
            tiled.combine = SiluMul.apply
    return model.requires_grad_(False)


def _like(array: np.ndarray) -> Tensor:
    """A fake tensor of the array's shape and type."""
    return torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))


def _pack(setting: Setting) -> Pack:
    """Pairs of these lengths, the last tokens of each document trained."""
    tokens, zeros = setting.tokens, np.zeros(setting.tokens, dtype=np.int64)
    labels = np.full(tokens, IGNORE_INDEX)
    cu = np.cumsum([0, *setting.lengths]).astype(np.int32)
    for end, length in zip(cu[1:], setting.lengths, strict=True):
        labels[end - int(setting.targets * length) : end] = 0
    count = len(setting.lengths) // 2
    known = np.zeros((count, 2)) if setting.reference == "precomputed" else None
    return Pack(
        input_ids=zeros,
        position_ids=zeros,
        labels=labels,
        loss_weights=(labels != IGNORE_INDEX).astype(np.float32),
        cu_seqlens=cu,
        padding_tokens=-tokens % setting.sp,
        pairs=Pairs(np.ones(count, dtype=np.float32), known),
    )
