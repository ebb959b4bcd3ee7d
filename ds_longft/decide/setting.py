"""What a prediction is made of: the model's sizes, one way to train it, and the GPU it runs on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ds_longft.errors import ConfigError, ModelError
from ds_longft.model.flops import layer_windows
from ds_longft.model.rope import positions_end
from ds_longft.model.supported import decoder_layers
from ds_longft.objectives.objective import Passes, Reference
from ds_longft.sequence.kernels import KERNELS, Capability

GIB = 2**30

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rates = Annotated[list[Annotated[list[Positive], Field(min_length=2, max_length=2)]], Field(min_length=1)]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a dense decoder, as its code has them. All counts are elements."""

    hidden: int  # D
    inter: int  # I, input features of the down projection
    layers: int  # L
    q_heads: int
    kv_heads: int
    head_dim: int  # d
    softcap: float | None  # of attention scores
    vocab: int  # V
    capped_logits: bool  # a softcap after the head (Gemma 2): the loss is not one kernel then
    weights: int  # every weight, embedding and head included; a tied matrix counts once
    linear_io: tuple[tuple[str, int, int], ...]  # (name, in, out) of one layer's linears
    windows: tuple[int | None, ...]  # per layer, tokens; None: full attention
    tied: bool
    norm_after_mlp: bool  # the MLP's output is needed again in the backward pass (Gemma 2 and 3)
    max_positions: int  # documents longer than this need model.rope; 0: none is too long

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's linear weights."""
        return sum(i * o for _, i, o in self.linear_io)

    @property
    def head_weights(self) -> int:
        """Elements of the output head, V * D."""
        return self.vocab * self.hidden

    def lora_weights(self, r: int) -> int:
        """Adapter elements of rank r on every linear of every layer: r * (in + out)."""
        return self.layers * sum(r * (i + o) for _, i, o in self.linear_io)

    @classmethod
    def from_config(cls, hf_config: PretrainedConfig) -> ModelSizes:
        """Read off a model without memory ("meta") built from the config.

        Raises:
            ModelError: a mixture of experts, whose memory this model does not describe.
        """
        experts = getattr(hf_config, "num_local_experts", None) or getattr(hf_config, "num_experts", None)
        if experts:
            raise ModelError(
                f"{hf_config.model_type} is a mixture of experts ({experts} experts); plan knows dense models only. "
                f"Train it with train.recompute: auto, which measures instead"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), attn_implementation="eager")
        layer = decoder_layers(model)[0]
        linears = tuple(
            (name.rsplit(".", 1)[-1], m.in_features, m.out_features)
            for name, m in layer.named_modules()
            if isinstance(m, nn.Linear)
        )
        down = [
            i for name, i, o in linears if o == hf_config.hidden_size and name.startswith(("down", "fc2", "c_proj"))
        ]
        heads = hf_config.num_attention_heads
        return cls(
            hidden=hf_config.hidden_size,
            inter=down[0] if down else int(hf_config.intermediate_size),
            layers=hf_config.num_hidden_layers,
            q_heads=heads,
            kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            softcap=getattr(hf_config, "attn_logit_softcapping", None),
            vocab=hf_config.vocab_size,
            capped_logits=getattr(hf_config, "final_logit_softcapping", None) is not None,
            weights=sum(p.numel() for p in model.parameters()),
            linear_io=linears,
            windows=layer_windows(hf_config),
            tied=bool(hf_config.tie_word_embeddings),
            norm_after_mlp=hasattr(layer, "post_feedforward_layernorm"),
            max_positions=positions_end(hf_config) or 0,
        )


@dataclass(frozen=True)
class Setting:
    """One way to train: what is chosen by the run config and the DeepSpeed JSON."""

    lengths: tuple[int, ...]  # document lengths of one pack, tokens; of pairs: chosen, rejected, chosen, ...
    sp: int = 1
    world: int = 1
    lora_r: int | None = 16  # None: every weight is trained
    stage: int = 3  # ZeRO
    resident: bool = True  # under ZeRO-3: gathered weights are never released
    offload_optimizer: bool = False
    offload_params: bool = False
    recompute: str = "auto"  # as train.recompute
    every: int = 2  # as train.recompute_every
    host_gib: float = 0.0  # host memory of a node for kept tensors
    tile_tokens: int | None = None  # as train.mlp_tile_tokens
    kv_heads: int | None = None  # as train.kv_heads_at_a_time
    local_world: int | None = None  # ranks of a node; None: all
    kernel: str = "flash-attn-4"
    fused: bool = True  # liger's norm, rotary embedding and gated activation
    targets: float = 1.0  # share of the tokens that have a target
    element_bytes: int = 2
    accumulation: int = 1  # packs of a rank in a step
    reference: Reference = "none"  # of pairs: where the reference's log-probabilities come from
    passes: Passes = "one"  # of pairs, as dpo.passes; "auto" is counted as one until `search.savers` settles it

    @property
    def tokens(self) -> int:
        """S, tokens of a pack."""
        return sum(self.lengths)

    @property
    def local_tokens(self) -> int:
        """s = S / sp, rounded up as packs are padded."""
        return -(-self.tokens // self.sp)

    @property
    def of_a_pass(self) -> Setting:
        """What one forward and backward pass works on: the pack, or of pairs in two passes their longer side."""
        if self.passes != "two":
            return self
        return replace(self, lengths=max(self.lengths[::2], self.lengths[1::2], key=sum), passes="one")

    @property
    def dp(self) -> int:
        """Packs trained at the same time."""
        return self.world // self.sp


def _tables(of_kernels: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Raises ValueError for a kernel that there is not, or one with rates of one direction."""
    known = [kernel.name for kernel in KERNELS]
    for name, directions in of_kernels.items():
        if name not in known:
            raise ValueError(f"{name} is no attention kernel; known are {', '.join(known)}")
        if set(directions) != {"forward", "backward"}:
            raise ValueError(f"{name} has {', '.join(directions) or 'nothing'}, expected forward and backward")
    return of_kernels


@dataclass(frozen=True)
class Gpu:
    """A GPU type: memory, and rates that are either measured by `ds-longft plan --calibrate` or from data sheets."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    source: str  # "measured" or "datasheet"
    about: str  # where the numbers come from
    capability: Capability  # CUDA compute capability: some attention kernels run on some only
    memory_gib: Positive  # as torch reports it
    context_gib: NotNegative  # CUDA context and kernels' own memory, beside torch's
    nccl_gib: NotNegative  # what communication adds when there is more than one rank
    gemm_tflops: Positive  # bf16, a large product
    # kernel -> forward | backward -> [[tokens, TFLOP/s]]
    attention_tflops: Annotated[dict[str, dict[str, Rates]], Field(min_length=1), AfterValidator(_tables)]
    memory_gb_s: Positive  # elementwise kernels, read + written
    all_to_all_gb_s: Positive  # sent by each GPU
    all_gather_gb_s: Positive  # received by each GPU
    host_gb_s: Positive  # pinned copies, one direction, all GPUs of the node at once
    sustained: dict[str, Positive]  # share of these rates in a step, where clocks fall: gemm, attention_forward, ...

    @classmethod
    def load(cls, name: str) -> Gpu:
        """A shipped type by name, or a calibration file by path.

        Raises:
            ConfigError: neither, with the known names; or a file that is not as `--calibrate` writes it, with every key
                that is wrong.
        """
        path, known = Path(name).expanduser(), shipped_gpus()
        shipped = files(__package__).joinpath("gpus", f"{name.lower()}.json")
        own = path.suffix == ".json" and path.is_file()
        if not own and name.lower() not in known:
            raise ConfigError(
                f"--gpu is {name!r}; expected one of {', '.join(known)}, or the JSON file that "
                f"`ds-longft plan --calibrate FILE` writes on your machine"
            )
        try:
            return TypeAdapter(cls).validate_json((path if own else shipped).read_bytes())
        except OSError as error:
            wrong = [f"cannot be read, {error.strerror}"]
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            f"--gpu {name} is no file as `ds-longft plan --calibrate {name}` writes it on your machine: "
            + "; ".join(wrong)
        )

    @cached_property
    def kernels(self) -> tuple[str, ...]:
        """Names of the attention kernels it has rates for, the fastest first."""
        return tuple(self.attention_tflops)


def shipped_gpus() -> list[str]:
    """Names of the GPU types that come with the package."""
    return sorted(
        p.name.removesuffix(".json") for p in files(__package__).joinpath("gpus").iterdir() if p.name.endswith(".json")
    )
