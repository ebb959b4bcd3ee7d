"""The peer's step of a model with states: ringmaster (of Axolotl), FSDP2, Liger, PEFT LoRA, on our sample.

    torchrun --nproc_per_node 2 benchmarks/peer_ringmaster.py --documents 131072
    torchrun --nproc_per_node 1 benchmarks/peer_ringmaster.py --documents 131072                          one GPU
    torchrun --nproc_per_node 2 benchmarks/peer_ringmaster.py --shape tiny --documents 256 --attn sdpa     CPU ranks

Put together as its README does: its attention (Ulysses) and its states handed from rank to rank by
flash-linear-attention's own context parallelism, a batch cut by its context manager, FSDP2 over the same ranks,
gradient checkpointing, Liger's norms, SwiGLU and fused loss. On one rank nothing is split and ringmaster has no part in
it: transformers' own layers run, with the kernels of flash-linear-attention. Where these refuse to run their backward
pass (Hopper with Triton 3.4 to 3.7.0), they get the piece that ours runs there.
The weights, the adapter and the tokens are those of benchmarks/step.py (see work.py). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peer import mean_loss, parser, report
from benchmarks.work import ADAPTER, SEED, compared, fingerprint, lengths_of, sample, shape_of, take_steps

SHAPES = ("hybrid8b", "llama8b", "tiny")


def main() -> None:
    """Build, step, report."""
    args = parser(__doc__ or "", SHAPES, "flash_attention_4").parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import ringmaster
    import torch
    import torch.distributed as dist
    import transformers
    from ringmaster.sp_context import ContextParallelContextManager

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.sp not in (None, world):
        raise SystemExit(f"--sp {args.sp} on {world} ranks: this peer splits a sample over all of them")
    started = time.time()
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))
    model, start = build_model(args, mesh, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    if world > 1:
        ContextParallelContextManager([model], mesh.get_group()).install()
    build_s = time.time() - started

    shape = shape_of(args.shape, args.layers)
    pack = sample(lengths_of(args.documents), shape["vocab_size"], dp_rank=0)
    arrays = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "shift_labels": pack.labels}
    whole = {name: torch.from_numpy(array).to(device)[None] for name, array in arrays.items()}  # each [1, S]
    targets = torch.tensor(float(pack.loss_weights.sum()), device=device)

    def step(i: int) -> float:
        # The context manager cuts the batch, and divides the targets by the ranks, whose gradients FSDP2 averages.
        batch = {name: tensor.clone() for name, tensor in whole.items()}
        loss = model(**batch, labels=batch["shift_labels"], num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        if args.grads and i == 0:
            save_gradients(model, args.grads, rank)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return mean_loss(loss)

    steps = take_steps(args, step, device)
    modules = (torch, transformers, ringmaster)
    report(args, "ringmaster", "peer_ringmaster.py", modules, steps, device, sp=world, build_s=build_s, start=start)
    dist.barrier()
    dist.destroy_process_group()


def build_model(args: argparse.Namespace, mesh: Any, device: Any) -> tuple[Any, str | None]:
    """The sharded model with its adapters, and the fingerprint of the weights before that where it is asked for."""
    import ringmaster
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = shape_of(args.shape, args.layers)
    cuda = device.type == "cuda"
    if cuda:
        import liger_kernel.transformers as liger

        {"llama": liger.apply_liger_kernel_to_llama, "qwen3_5_text": liger.apply_liger_kernel_to_qwen3_5}[
            shape["model_type"]
        ]()
    attention, split = args.attn, mesh.size() > 1
    if split:
        attention = ringmaster.setup(
            ringmaster.RingmasterConfig(size=mesh.size(), backend=ringmaster.Backend.ULYSSES),
            num_kv_heads=shape["num_key_value_heads"],
            device_mesh=mesh,
            device_type=device.type,
            inner_attn=args.attn,
        ).attn_implementation
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype, attn_implementation="sdpa")
    model.set_attn_implementation(attention)
    if "layer_types" in shape:
        from ds_longft.sequence.state.chunk_piece import register_where_needed

        register_where_needed()
    if split:
        ringmaster.wire_recurrent_layers(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = model.model.layers
    if not args.full:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        lora = LoraConfig(
            r=ADAPTER["r"], lora_alpha=ADAPTER["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    start = fingerprint(model) if args.fingerprint else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model.train(), start


def save_gradients(model: Any, path: str, rank: int) -> None:
    """The compared gradients as FSDP2 has reduced them, whole, in float32. Collective."""
    from safetensors.torch import save_file

    grads = {
        name: parameter.grad.full_tensor().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and compared(name)
    }
    if rank == 0:
        save_file(grads, path)


if __name__ == "__main__":
    main()
