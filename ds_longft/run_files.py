"""The shape of each file that a run leaves: what its writers write, and its readers may count on (see `stored`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[str, Field(pattern="^[0-9]+$")]
"""A number of tokens as a key of JSON."""


class StoredFile(BaseModel):
    """Known keys have their types; others are let through: another version may write them."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class FileSeal(BaseModel):
    """Size and hash of one file."""

    bytes: int = Field(ge=0)
    sha256: str


class Manifest(BaseModel):
    """manifest.json of a checkpoint: every file in it."""

    step: int
    files: dict[str, FileSeal]


class StateOfAnyVersion(StoredFile):
    """state.json of a checkpoint, as far as it says which version wrote it (see `train.resume_rules.TrainState`)."""

    step: int
    trained: str
    fingerprint: str | None = None  # of format 1
    rows: str | None = None
    format: int | None = None
    written_by: str | None = None


class StatusFile(StoredFile):
    """run_status.json."""

    exit_code: int | None = None
    error: str | None = None
    first_step: int | None = None
    start: str | None = None
    host: str | None = None
    rank: int | None = None
    time: str | None = None
    start_up_s: dict[str, float] | None = None


class LockHolder(StoredFile):
    """.lock-holder.json."""

    host: str | None = None
    pid: int | None = None
    job: str | None = None
    since: str | None = None


class RequeueHistory(StoredFile):
    """.requeue.json."""

    job: str | None = None
    crashes: int = 0
    idle: int = 0
    step: int = -1


class MetricsLine(StoredFile):
    """A line of metrics.jsonl: a step, or an evaluation."""

    model_config = ConfigDict(allow_inf_nan=True)  # earlier versions wrote NaN, which JSON does not have

    __pydantic_extra__: dict[str, float | int | str | None] = Field(init=False)

    step: int = Field(ge=0)
    epoch: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_s_per_gpu: float | None = None
    peak_gib: float | None = None
    padding_percent: float | None = None
    data_wait_percent: float | None = None
    step_s: float | None = None
    tokens_seen: int | None = None
    loss_spike: float | None = None


class MachineFacts(StoredFile):
    """The machine in versions.json."""

    device: str | None = None
    world: int | None = None
    sp: int | None = None
    dp: int | None = None


class VersionsFile(StoredFile):
    """versions.json."""

    versions: dict[str, str] = {}
    machine: MachineFacts = MachineFacts()


class PartFacts(StoredFile):
    """Statistics of one set in data.json."""

    rows: int
    tokens: int
    targets: int
    target_share: float
    median_tokens: int
    longest_tokens: int
    rows_up_to_tokens: dict[Count, int] = {}
    sources: dict[str, int] = {}
    languages: dict[str, int] = {}
    fingerprint: str = ""
    bad_rows: int | None = None  # these three: of all rows read, where a part was held out of them too
    overlong_rows_dropped: int | None = None
    truncated_rows: int | None = None


class SampleFacts(StoredFile):
    """A training row in data.json."""

    origin: str
    tokens: int
    before: str
    trained: str


class DataFile(StoredFile):
    """data.json."""

    total_steps: int | None = None
    parts: dict[str, PartFacts] = {}
    sample: SampleFacts | None = None


class PlanFile(StoredFile):
    """plan.json."""

    peak_gib: float | None = None


class EngineFile(StoredFile):
    """ds_config.json."""

    zero_optimization: dict[str, Any] = {}


class AnswerFacts(StoredFile):
    """A question of an evaluation, with what was answered."""

    question: str
    reply: str
    answer: str | None = None
    answers: list[str] | None = None
    length_tokens: int | None = None
    stands_at: list[float] = []
    hidden: list[str] = []

    @model_validator(mode="after")
    def _is_answered(self) -> AnswerFacts:
        if self.answer is None and self.answers is None:
            raise ValueError("neither answer nor answers")
        return self


Ends = Annotated[list[float], Field(min_length=3, max_length=3)]


class Measure(StoredFile):
    """A figure of a suite: [mean, low, high] of each."""

    name: str
    rows: int
    before: Ends
    after: Ends
    difference: Ends


Preset = Literal["quick", "paper"]
OF_A_KIND = {
    "perplexity": ("length_tokens", "loss", "loss_by_eighth", "edges_tokens", "loss_by_bucket"),
    "needle": ("exact_percent", "grid", "lengths", "depths"),
    "needle-multi": ("exact_percent", "found_percent"),
    "needle-hop": ("exact_percent", "found_percent"),
    "short": ("length_tokens", "loss", "right_percent"),
    "ruler": ("averages", "by_length"),
    "suite": ("measures",),
    "longbench": ("averages", "scores"),
    "longbench-e": ("averages", "scores"),
    "longproc": ("averages", "scores"),
}
OF_NEEDLES = ("lengths", "trials", "languages", "seed", "form", "haystacks")


class EvaluationFile(StoredFile):
    """RUN/eval/NAME.json."""

    kind: str
    model: str
    date: str = ""
    settings: dict[str, Any]
    samples: list[AnswerFacts] = []
    length_tokens: int | None = None
    loss: float | None = None
    right_percent: float | None = None
    loss_by_eighth: list[float | None] | None = None
    longppl: float | None = None
    key_tokens: int | None = None
    edges_tokens: list[int] | None = None
    loss_by_bucket: list[float | None] | None = None
    exact_percent: dict[str, dict[Count, float | None]] | None = None  # of needles: language, length
    found_percent: dict[str, dict[Count, float | None]] | None = None
    grid: dict[str, list[list[float | None]]] | None = None
    lengths: list[int] | None = None
    depths: list[float] | None = None
    averages: dict[str, float | None] | None = None
    scores: dict[str, float | None] | None = None
    by_length: dict[str, dict[str, float | None]] = {}
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    measures: list[Measure] | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_has(self) -> EvaluationFile:
        missing = [key for key in OF_A_KIND.get(self.kind, ()) if getattr(self, key) is None]
        if self.kind.startswith("needle"):
            missing += [f"settings.{key}" for key in OF_NEEDLES if key not in self.settings]
            if not isinstance(self.settings.get("haystacks"), dict):
                missing.append("settings.haystacks")
            depths = self.settings.get("depths")
            single = self.settings.get("form") == "single"
            if single and not (isinstance(depths, list) and all(isinstance(d, int | float) for d in depths)):
                missing.append("settings.depths")
            if not single and "facts" not in self.settings:
                missing.append("settings.facts")
        if self.kind == "ruler":
            sizes = [*(self.averages or ["none"]), *self.intervals, *(n for of in self.by_length.values() for n in of)]
            missing += [f"lengths as numbers ({size})" for size in sizes if not size.isdecimal()]
        if self.edges_tokens is not None and len(self.edges_tokens) != len(self.loss_by_bucket or []) + 1:
            missing.append("as many edges_tokens as buckets, and one more")
        if self.loss_by_eighth == []:
            missing.append("loss_by_eighth")
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        return self


class EvaluationRow(StoredFile):
    """A line of RUN/eval/NAME.rows.jsonl: the settings first, then a row each."""

    settings: dict[str, Any] | None = None
    key: str | None = None
