"""Section of the run config: the data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ds_longft.config.section import Applied, ByContent, Free, Refused, Section, Tokens


def is_pattern(path: str) -> bool:
    """Whether a path may stand for several files, as texts_*.jsonl does; a file really called so comes first."""
    return any(mark in path for mark in "*?[")


class SourceConfig(Section):
    """One set of rows. A bare path stands for `{path: ...}`, so that `--data.train a.jsonl,b.jsonl` works, and in YAML
    `train: a.jsonl`.
    """

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    path: ByContent[str] = Field(min_length=1)
    """A file of JSON, JSONL, parquet, Arrow, CSV or text (packed too: .gz, .bz2, .lz4, .zst, .tar), a folder of them, a
    pattern (texts_*.jsonl), a remote path (s3://, gs://, hf://), or a hub id."""

    format: ByContent[
        Literal[
            "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "longalign", "grounded", "preference"
        ]
    ] = "auto"
    """Row layout; `auto` recognises it by the first row's columns. `grounded`: a reference text and a dialogue about
    it."""

    columns: ByContent[dict[str, str]] = Field(default={})
    """Their column: the one of a row layout that it stands for, e.g. {frage: question, antwort: answer}."""

    split: ByContent[str] = "train"
    """Split of a hub set or of a folder whose files are named after splits, as a clone of a hub set has them."""

    subset: ByContent[str | None] = None
    """Configuration (subset) of a hub set, or the subfolder of a clone that holds it."""

    revision: ByContent[str | None] = None
    """Branch, tag or commit of a hub set."""

    limit: ByContent[int | None] = Field(default=None, gt=0)
    """Take only the first N rows."""


class DataConfig(Section):
    """What is trained on, and how it is laid into packs."""

    train: ByContent[list[SourceConfig]] = Field(default=[])
    """Training sets, concatenated."""

    eval: Applied[list[SourceConfig]] = Field(default=[])
    """Held-out sets for the evaluation loss. Mutually exclusive with `eval_fraction`."""

    eval_fraction: Refused[float] = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows held out for the evaluation loss, chosen by `seed`."""

    max_length_tokens: Refused[Tokens] = 131072
    """Longest row, or with `objective: dpo` longest prompt with one answer. Longer ones are treated by `overlong`."""

    pack_tokens: Refused[Tokens | None] = None
    """Token budget of one pack. Left out: `max_length_tokens`, with `objective: dpo` twice that (a pair lies in one
    pack). Less makes more and smaller steps of short rows; a row longer than it takes a pack alone."""

    packing: Refused[Literal["best_fit", "sorted", "none"]] = "best_fit"
    """Documents lie head to tail in a pack, isolated from each other. `best_fit`: as few packs as possible. `sorted`:
    rows of like length share packs and steps (LongAlign's sorted batching). `none`: one row per pack."""

    overlong: ByContent[Literal["drop", "truncate", "cut_turns", "error"]] = "drop"
    """`truncate` cuts the middle of the longest untrained turn (the document), never an answer. `cut_turns` keeps the
    turns from the first on that fit, up to a whole answer: for trajectories of agents."""

    thinking: ByContent[Literal["all", "last", "none"]] = "all"
    """Which thoughts of answers are kept and trained (`<think>`, `reasoning_content`, `thinking`). `all`: rows are
    refused whose template leaves one out. `last`: those behind the last question, and of these what the template
    writes. `none`: none."""

    train_turns: ByContent[Literal["all", "last"]] = "all"
    """Which answers of a row are trained."""

    weighting: Refused[Literal["token", "sample", "gain"]] = "token"
    """`token`: each target counts 1. `sample`: each of a row's N targets counts 1/N (LongAlign). `gain`: a target on
    which far context gains g nats counts e^g, up to 5 (LongCE, with weights fixed beforehand): column `token_gains`,
    which `ds-longft data score --tokens` writes. Targets of `eval` sets count 1."""

    chat_template: ByContent[str | None] = None
    """Path of a Jinja chat template, or a shipped one's name (docs/data.md). Left out: the tokenizer's own. It is saved
    with the trained model only where the tokenizer has none."""

    workers: Free[int | None] = Field(default=None, gt=0)
    """Processes that tokenise. Left out: one per core."""

    cache_dir: Free[str] = "~/.cache/ds_longft"
    """Where tokenized sets are kept, by fingerprint."""

    max_bad_fraction: Free[float] = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of the rows is unusable (each is listed in the ledger)."""

    stream_window_mib: Refused[int | None] = Field(default=None, gt=0)
    """Read the training set as a stream: tokenise N MiB of its rows at a time, the next ones while these are
    trained, and keep no more on disk. Rows share packs and steps inside such a window only, and windows follow each
    other in the order of the files; behind the end the set begins again, up to `train.max_steps`. Left out: all of it
    is tokenised before step 1."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value else value

    def budget_tokens(self, documents_per_row: int) -> int:
        """Tokens of a full pack of several rows; a pair is a row of two documents."""
        return self.pack_tokens or documents_per_row * self.max_length_tokens
