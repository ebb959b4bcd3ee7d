"""What a prediction is made of, beside the model's facts: one way to train it, and the GPU it runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ds_longft.errors import ConfigError
from ds_longft.objectives.objective import Passes, Reference
from ds_longft.sequence.kernels import KERNELS
from ds_longft.sequence.kernels.base import Capability

GIB = 2**30

Base = Literal["engine", "resident", "sharded", "host"]
"""Where the frozen weights of decoder layers lie, as `model.base`."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rates = Annotated[list[Annotated[list[Positive], Field(min_length=2, max_length=2)]], Field(min_length=1)]


@dataclass(frozen=True)
class Setting:
    """One way to train: what is chosen by the run config and the DeepSpeed JSON."""

    lengths: tuple[int, ...]  # document lengths of one pack, tokens; of pairs: chosen, rejected, chosen, ...
    sp: int = 1
    world: int = 1
    lora_r: int | None = 16  # None: every weight is trained
    lora_experts: bool = False  # as lora.experts
    stage: int = 3  # ZeRO
    base: Base = "engine"
    quantize: str = ""  # format of the frozen weights of decoder layers, as `model.packed.FORMATS`; "": dense
    resident: bool = True  # under ZeRO-3: gathered weights are never released
    offload_optimizer: bool = False
    offload_params: bool = False
    recompute: str = "auto"  # as train.recompute
    every: int = 2  # as train.recompute_every
    host_gib: float = 0.0  # host memory of a node for kept tensors
    disk_gib: float = 0.0  # disk of a node, for what these do not hold
    disk_gb_s: float = 0.0  # read and written by all ranks of a node at once; 0: not known, and not waited for
    tile_tokens: int | None = None  # as train.mlp_tile_tokens
    kv_heads: int | None = None  # as train.kv_heads_at_a_time
    local_world: int | None = None  # ranks of a node; None: all
    kernel: str = "flash-attn-4"
    fused: bool = True  # liger's norm, rotary embedding and gated activation
    targets: float = 1.0  # share of the tokens that have a target
    element_bytes: int = 2
    accumulation: int = 1  # packs of a rank in a step
    pairs: bool = False  # of preferences: they are never dealt whole to the ranks
    reference: Reference = "none"  # of pairs: where the reference's log-probabilities come from
    optimizer: str = "adamw"  # as optim.type
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
        sizes = [gpu for gpu in known if gpu.startswith(f"{name.lower()}-")]  # h100: there is one size of it
        alone = sizes[0] if len(sizes) == 1 else name.lower() if name.lower() in known else f"rtx{name.lower()}"  # 4090
        shipped = files(__package__).joinpath("gpus", f"{alone}.json")
        own = path.suffix == ".json" and path.is_file()
        if not own and alone not in known:
            raise ConfigError(
                f"--gpu is {name!r}; expected one of {', '.join(known)}, or the JSON file that "
                f"`ds-longft plan --calibrate FILE` writes on your machine"
            )
        try:
            return _GPU_FILE.validate_json((path if own else shipped).read_bytes())
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


_GPU_FILE = TypeAdapter(Gpu)  # making it takes longer than reading a file


def shipped_gpus() -> list[str]:
    """Names of the GPU types that come with the package."""
    return sorted(
        p.name.removesuffix(".json") for p in files(__package__).joinpath("gpus").iterdir() if p.name.endswith(".json")
    )
