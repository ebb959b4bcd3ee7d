"""The peer's step on our sample: DeepSpeed ALST (UlyssesSPAttentionHF), HF Llama, Liger, PEFT LoRA, ZeRO-3.

    torchrun --nproc_per_node 2 benchmarks/peer_alst.py --documents 131072 --attn flash_attention_4
    torchrun --nproc_per_node 2 benchmarks/peer_alst.py --documents 8192x8 --sp 1        data parallel, no ALST
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 benchmarks/peer_alst.py --shape tiny --documents 256

Public APIs only, put together as ALST's tutorial does: sequence parallelism registered for the model's attention,
gradient checkpointing, Liger's kernels and fused loss, losses of the ranks weighted by their targets. Documents of a
pack are told apart by positions that restart, which torch's sdpa under ALST does not heed; the flash kernels get the
lengths besides, as transformers' DataCollatorWithFlattening gives them: derived from positions, the longest would be a
tensor where flash-attn-4 wants an int.
The weights, the adapter and the tokens are those of benchmarks/step.py (see work.py). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peer import mean_loss, parser, report
from benchmarks.work import ADAPTER, SEED, SHAPES, fingerprint, lengths_of, sample, save_gradients, shape_of, take_steps


def arguments() -> argparse.Namespace:
    found = parser(__doc__ or "", [k for k, v in SHAPES.items() if v["model_type"] == "llama"], "sdpa")
    found.add_argument("--stage", type=int, default=3, help="of ZeRO; the tutorial's is 3")
    found.add_argument("--tiled_mlp", action="store_true", help="ALST's TiledMLP: less memory")
    found.add_argument("--offload_ckpt", action="store_true", help="layer inputs in host memory: less memory")
    return found.parse_args()


def main() -> None:
    """Build, step, report."""
    args = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the tutorial's advice
    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not cuda:  # not worth compiling for minutes
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    sp = args.sp or world
    if sp not in (1, world):
        raise SystemExit(f"--sp {sp}: 1 or all {world} ranks")
    shape = shape_of(args.shape, args.layers)
    started, start = time.time(), None
    model, group = build_model(args, shape, sp, device)
    if args.fingerprint:
        start = fingerprint(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=engine_config(sp, args.stage, cuda),
        mpu=group,
    )
    build_s = time.time() - started

    def inputs() -> dict[str, Any]:
        """This rank's part of the sample: token ids, positions and labels already shifted, each [1, s]."""
        pack = sample(lengths_of(args.documents), shape["vocab_size"], dp_rank=rank // sp)
        local = pack.tokens // sp
        part = slice(rank % sp * local, (rank % sp + 1) * local)
        arrays = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "shift_labels": pack.labels}
        batch = {name: torch.from_numpy(array[part]).to(device)[None] for name, array in arrays.items()}
        return batch | (documents_of(pack, device) if args.attn.startswith("flash") else {})

    offload: Any = contextlib.nullcontext
    if args.offload_ckpt:
        from deepspeed.runtime.activation_checkpointing.offload_activations import (
            get_checkpoint_hidden_states_offloading_ctx_manager as offload,
        )

    batch = inputs()

    def step(i: int) -> float:
        with offload():
            # The model asks for `labels` to compute a loss at all; what it uses are the shifted ones.
            out = engine(**batch, labels=batch["shift_labels"], num_items_in_batch=None, use_cache=False)
            loss = out.loss
            if group is not None:
                loss = mean_over_shards(loss, batch["shift_labels"], group.get_sequence_parallel_group())
            engine.backward(loss)
        if args.grads and i == 0:
            save_gradients(model, args.grads, rank)
        engine.step()
        return mean_loss(loss)

    steps = take_steps(args, step, device)
    modules = (torch, deepspeed, transformers)
    report(args, "ALST", "peer_alst.py", modules, steps, device, sp=sp, build_s=build_s, start=start)
    dist.barrier()
    dist.destroy_process_group()


def documents_of(pack: Any, device: Any) -> dict[str, Any]:
    """transformers' keywords for flash attention, of the whole pack: `cu_seq_lens_*` int32 [N + 1], lengths int."""
    import torch

    cu_seq_lens = torch.from_numpy(pack.cu_seqlens).to(device, torch.int32)
    longest = int(cu_seq_lens.diff().max())
    return {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seq_lens),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


def build_model(args: argparse.Namespace, shape: dict[str, Any], sp: int, device: Any) -> tuple[Any, Any]:
    """The model with its adapters, ready for the engine, and ALST's groups (None without sequence parallelism)."""
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AutoConfig, AutoModelForCausalLM

    if device.type == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()  # RoPE, norms, SwiGLU and the fused linear cross-entropy
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(SEED)
    with torch.device(device):
        config = AutoConfig.for_model(**shape)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn)
    group = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=args.attn,
        sequence_parallel_size=sp,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not args.full:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        lora = LoraConfig(
            r=ADAPTER["r"],
            lora_alpha=ADAPTER["alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    if args.tiled_mlp:
        tile_mlps(model, shape["hidden_size"])
    return model.train(), group


def tile_mlps(model: Any, hidden_size: int) -> None:
    """TiledMLP over tiles of `hidden_size` tokens, with every parameter below the MLP.

    The tutorial's list, the base weights alone, leaves adapters without a gradient.
    """
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))

    def tiled(self: Any, x: torch.Tensor) -> torch.Tensor:  # [1, s, hidden]
        return TiledMLP.apply(mlp, self, x, max(1, -(-x.shape[1] // hidden_size)), list(self.parameters()))

    for module in model.modules():
        if type(module).__name__ in ("LlamaMLP", "LigerSwiGLUMLP"):
            module.forward = tiled.__get__(module)


def engine_config(sp: int, stage: int, cuda: bool) -> dict[str, Any]:
    """The DeepSpeed JSON: ZeRO, AdamW, clipping."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": cuda},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 1e5,
            "reduce_bucket_size": 5e7,
        },
        "gradient_clipping": 1.0,
        "sequence_parallel_size": sp,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }


def mean_over_shards(loss: Any, labels: Any, group: Any) -> Any:
    """The shards' mean losses weighted by their targets, as the tutorial has it: differentiable, equal on all ranks."""
    from torch.distributed.nn.functional import all_gather

    targets = (labels != -100).sum()
    losses = all_gather(loss[None].float(), group=group)
    counts = all_gather(targets[None], group=group)
    total = sum(each * count for each, count in zip(losses, counts, strict=True))
    return (total / sum(counts)).squeeze()


if __name__ == "__main__":
    main()
