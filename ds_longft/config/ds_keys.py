"""Which keys of a DeepSpeed JSON a run may use, of which kind, and why the others are refused.

DeepSpeed ignores a top-level key it does not know, and several it does know change what the gradient is an average of.
So this is a list of what is allowed: the loss of a run must not depend on its JSON.
"""

from __future__ import annotations

NUMBER: tuple[type, ...] = (int, float)

_OF_ZERO: dict[tuple[type, ...], str] = {
    (int,): "stage zero_hpz_partition_size",
    NUMBER: (
        "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance"
    ),
    (bool,): (
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
        "round_robin_gradients memory_efficient_linear ignore_unused_parameters log_trace_cache_warnings "
        "enable_sanity_checks stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params "
        "stage3_allgather_sequential"
    ),
    (dict,): "offload_optimizer offload_param",
}
_OTHERS: dict[tuple[type, ...], str] = {
    (int,): (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps sequence_parallel_size "
        "data_parallel_size"
    ),
    NUMBER: "gradient_clipping steps_per_print",
    (bool,): (
        "bf16.enabled bf16.immediate_grad_update zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "disable_python_gc wall_clock_breakdown memory_breakdown dump_state"
    ),
    (str,): "optimizer.type communication_data_type data_types.grad_accum_dtype",
    (dict,): "optimizer.params aio flops_profiler comms_logger checkpoint",
}
ALLOWED = {key: kinds for kinds, keys in _OTHERS.items() for key in keys.split()} | {
    f"zero_optimization.{key}": kinds for kinds, keys in _OF_ZERO.items() for key in keys.split()
}
"""Dotted key -> types of its value. A dict stands for a section whose inside is DeepSpeed's business."""

# Whole numbers, and the lowest DeepSpeed can work with.
LOWEST = {
    "zero_optimization.reduce_bucket_size": 1,
    "zero_optimization.allgather_bucket_size": 1,
    "zero_optimization.sub_group_size": 1,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_model_persistence_threshold": 0,
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "steps_per_print": 1,
}

# Of an optimizer that the JSON names, beside those that the run config decides.
OPTIMIZER_PARAMS = {
    "adamw": ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"),
    "sgd": ("lr", "weight_decay", "momentum", "dampening", "nesterov"),
}

_SCALE = "the loss is scaled for a plain mean over all ranks; leave the key out"
_LOSSY = "it rounds what ranks send each other, so that the result depends on how many there are; leave the key out"
_DATA = "data and its order are the run config's (section data); leave the key out"

# Key -> (why it is refused, the value that changes nothing; for a section, the value of its `enabled`).
REFUSED: dict[str, tuple[str, object]] = {
    "fp16": ("only bf16 and fp32 are trained exactly; set model.dtype", False),
    "amp": ("only bf16 and fp32 are trained exactly; set model.dtype", False),
    "torch_autocast": ("only bf16 and fp32 are trained exactly; set model.dtype", False),
    "prescale_gradients": (_SCALE, False),
    "gradient_predivide_factor": (_SCALE, 1.0),
    "gradient_allreduce_op": (_SCALE, "mean"),
    "zero_optimization.compute_grad_norm": ("clipping and the log need the norm; leave the key out", True),
    "zero_optimization.zero_quantized_gradients": (_LOSSY, False),
    "zero_optimization.zero_quantized_weights": (_LOSSY, False),
    "zero_optimization.zero_quantized_nontrainable_weights": (_LOSSY, False),
    "zero_optimization.zenflow": ("it updates weights late, so that steps are no longer those of the optimizer", False),
    "zero_optimization.leaf_module": (
        "it takes gradients before those of adapters exist; layers gather what they need themselves",
        {},
    ),
    "zero_optimization.stage3_module_granularity_threshold": (
        "it makes leaf modules of layers, whose gradients are then taken before those of adapters exist",
        0,
    ),
    "zero_optimization.cpu_offload": ("DeepSpeed's old spelling; write zero_optimization.offload_optimizer", False),
    "zero_optimization.cpu_offload_param": ("DeepSpeed's old spelling; write zero_optimization.offload_param", False),
    "bf16.check_grad_overflow": ("a gradient that is not finite must never reach the weights", True),
    "bf16.bf16_master_weights_and_grads": ("master weights stay fp32: bf16 ones lose small updates", False),
    "bf16.bf16_optimizer_states": ("optimizer states stay fp32: bf16 ones lose small updates", False),
    "seq_parallel_communication_data_type": (
        "the engine sees no sequence parallel group; use communication_data_type",
        False,
    ),
    "scheduler": ("the learning rate follows optim.schedule, optim.warmup_ratio and optim.min_lr_ratio", False),
    "activation_checkpointing": ("recomputation is set by train.recompute", False),
    "tensorboard": ("records are set in the section log", False),
    "wandb": ("records are set in the section log (log.trackers)", False),
    "csv_monitor": ("metrics.jsonl in the output folder holds the same", False),
    "dataloader_drop_last": (_DATA, False),
    "data_efficiency": (_DATA, False),
    "curriculum_learning": (_DATA, False),
    "progressive_layer_drop": ("it skips layers at random", False),
    "compression_training": ("it prunes or rounds the weights while they are trained", False),
    "quantize_training": ("it rounds the weights while they are trained", False),
    "weight_quantization": ("it rounds the weights", False),
    "sparse_attention": ("attention is exact here; the kernel is set by model.kernel", False),
    "sparse_gradients": ("gradients are dense here", False),
    "sparse_gradients_enabled": ("gradients are dense here", False),
    "elasticity": ("it changes the batch size with the number of ranks", False),
    "autotuning": ("it changes the batch size", False),
    "hybrid_engine": ("it is for generation inside training", False),
    "tensor_parallel": ("one sample is split along its length (key sp), not along the weights", False),
    "pipeline": ("one sample is split along its length (key sp), not along the layers", False),
    "expert_parallel": ("one sample is split along its length (key sp), not over experts", False),
    "compile": ("compiling the engine is not supported", False),
    "nebula": ("checkpoints are written by this package", False),
    "disable_allgather": ("weights must reach every rank", False),
}
