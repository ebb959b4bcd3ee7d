"""What every evaluation of a model takes and shows on the command line, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ds_longft.command_line import tokens_of
from ds_longft.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Ranks:
    """On how many GPUs.

    Args:
        gpus: how many GPUs of this machine share the work; on a CPU, processes. Left out: as many as --sp.
        sp: how many of them share one text; each holds the model. A launcher's ranks take the place of --gpus
            (`deepspeed --no_local_rank --module ds_longft.cli eval needle ... --sp 8`).
        kernel: attention kernel by name, or auto.
        weights: where the weights of decoder layers lie, as `model.base` of a run: resident (whole on each GPU),
            sharded (a share on each GPU of --sp, gathered a layer ahead), host (in host memory, streamed a layer
            ahead). auto: the first of them that what is asked fits beside.
        quantize: the weights in fewer bits, as `model.quantize` of a run: nf4, int8, fp8; none makes them dense. auto:
            as the run trained on them, or as the files hold them.
    """

    gpus: int | None = None
    sp: int = 1
    kernel: str = "auto"
    weights: Literal["auto", "resident", "sharded", "host"] = "auto"
    quantize: Literal["auto", "none", "nf4", "int8", "fp8"] = "auto"

    @property
    def ranks(self) -> int:
        """Processes to start."""
        return self.sp if self.gpus is None else self.gpus

    def check(self) -> None:
        """Raises ConfigError: counts that are not positive, GPUs that sp does not divide or that share no weights."""
        positive(sp=self.sp, gpus=self.ranks)
        if self.ranks % self.sp:
            raise ConfigError(f"--sp is {self.sp}, which does not divide --gpus {self.ranks}")
        if self.weights == "sharded" and not self.ranks == self.sp > 1:
            raise ConfigError(
                f"--weights sharded, --sp {self.sp}, {self.ranks} GPUs: shares of a layer are gathered by GPUs that "
                "work on one text. Give --sp alone, 2 or more, or take --weights host"
            )


@dataclass(frozen=True)
class Flags(Ranks):
    """How a model is asked, and where its results go. The model is the first word of each of these commands.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        batch_tokens: prompts of one length are read together, at most this many tokens at once.
        server: address of an OpenAI-compatible server of this model, e.g. http://localhost:8000/v1 of `vllm serve
            runs/mine-merged`, which is asked instead of a GPU here. MODEL is then the served folder.
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the result, NAME.json, and its rows, with which a command goes on that was stopped and is started
            again with the same settings. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: that of the evaluation, e.g. needle. With --before it ends in -before.
        json: print one JSON object instead of tables.
    """

    batch_tokens: int | str = "128K"
    server: str | None = None
    before: bool = False
    base: str | None = None
    out: str | None = None
    name: str | None = None
    json: bool = False

    def check(self) -> None:
        """Raises ConfigError also: a batch without tokens, GPUs or weights beside a server."""
        super().check()
        tokens_of("--batch_tokens", self.batch_tokens)
        if self.server is not None and self.ranks > 1:
            raise ConfigError("--server answers by itself: leave out --gpus and --sp")
        if self.server is not None and (self.weights != "auto" or self.quantize != "auto"):
            raise ConfigError("--server has the weights that it was started with: leave out --weights and --quantize")


RANKS = Ranks()
FLAGS = Flags()


def token_list(flag: str, value: str) -> list[int]:
    """`8K,32K` -> [8192, 32768], in ascending order."""
    return sorted({tokens_of(flag, part) for part in value.strip("()[]").split(",") if part.strip()})


def listed(value: str) -> list[str]:
    """`a,b` -> ["a", "b"]."""
    return [part.strip() for part in value.strip("()[]").split(",") if part.strip()]


def default_lengths(window: int | None) -> list[int]:
    """The window and four halvings of it, not below 1K: where --lengths is left out."""
    return sorted({max(1024, (window or 8192) >> i) for i in range(5)})


def positive(**counts: int | None) -> None:
    """Raises ConfigError for flags that are given and not 1 or more."""
    wrong = {flag: count for flag, count in counts.items() if count is not None and count < 1}
    if wrong:
        raise ConfigError([f"--{flag} is {count}: expected 1 or more" for flag, count in wrong.items()])


def print_tables(line: object, *tables: Table) -> None:
    """Tables, and a line below them that stays in one piece: where the result lies."""
    from rich.console import Console  # a help does not wait for it

    console = Console()
    for table in tables:
        console.print(table)
    console.print(str(line), soft_wrap=True, highlight=False)
