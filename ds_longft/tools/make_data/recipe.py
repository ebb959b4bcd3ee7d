"""`Recipe`: what a data mix is made of, read from YAML; every key documented where it is declared."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.messages import dotted
from ds_longft.config.other_trainers import nearest
from ds_longft.config.read import read_config_file
from ds_longft.config.run_config import Section
from ds_longft.config.section import Tokens, parse_tokens
from ds_longft.errors import ConfigError
from ds_longft.tools.make_data.synth.negatives import PART_TOKENS, PARTS
from ds_longft.tools.make_data.synth.row_plan import size_parts
from ds_longft.tools.make_data.where import Where

Synth = Literal["none", "refgpt8x", "needle", "code", "agents", "lists", "stretches", "negatives"]
OF_NO_SET: tuple[Synth, ...] = ("code", "agents", "lists")
# Keys that say something about some kinds of samples alone.
OF_KINDS: dict[str, tuple[Synth, ...]] = {
    "questions": ("needle", "code", "lists"),
    "sizes": ("lists", "stretches"),
    "languages": ("stretches",),
    "part_tokens": ("negatives",),
    "separator": ("stretches", "negatives"),
    "context_tokens": ("needle", "code", "agents", "lists", "stretches", "negatives"),
    "where": ("none", "refgpt8x", "needle", "stretches", "negatives"),
    "exclude": ("none", "refgpt8x", "needle", "stretches", "negatives"),
    "least": ("none",),
}


def _names(given: Any) -> Any:
    """YAML reads the size 1 as a number."""
    return {str(key): value for key, value in given.items()} if isinstance(given, dict) else given


class MixSource(SourceConfig):
    """One source of a mix: a set as it is, or samples made of one."""

    path: str = ""
    """As in a run config; relative ones are looked for below `--root` first. `synth: code|agents|lists` has none."""

    name: str
    """Written to each row as `source`."""

    where: dict[str, str] = Field(default={})
    """Take only rows with these values in these columns, e.g. {lang: en}."""

    exclude: dict[str, str] = Field(default={})
    """Leave out rows with any of these values, e.g. a collection that is kept for the evaluation."""

    least: dict[str, float] = Field(default={})
    """Leave out rows with a smaller number in a column, or none, e.g. {context_gain: 0.02} (`ds-longft data score`)."""

    synth: Synth = "none"
    """Make long samples of this set instead of taking its rows: true references hidden among near ones, questions about
    its texts, stretches of its texts as they are, or parts of a text with near ones of others between them
    (`negatives`). Of no set: questions about the Python standard library, trajectories of an agent, and lists."""

    rows: int | None = Field(default=None, gt=0)
    """At most N rows; with `synth`, how many are made. Left out there: `share` of the recipe's `total_rows`."""

    share: float | None = Field(default=None, gt=0, le=1)
    """Share of the mix."""

    context_tokens: Tokens | None = None
    """Longest row made. Left out: the recipe's `max_length_tokens`."""

    questions: int | None = Field(default=None, ge=1)
    """`synth: needle|code|lists`: questions about one context. Left out: 3."""

    sizes: Annotated[dict[str, float] | None, BeforeValidator(_names)] = None
    """`synth: lists|stretches`: part of the longest row -> share of the rows, e.g. {1/4: 3, 1/2: 2, 1: 2}. Left out:
    halves of halves down to 1/32."""

    languages: dict[str, float] | None = None
    """`synth: stretches`: share of the rows made, by language code. Left out: the recipe's `languages`; more
    where other sources have too little of one."""

    part_tokens: Tokens | None = None
    """`synth: negatives`: of a part; four of them fit a row. Left out: 2K."""

    separator: str | None = None
    """`synth: stretches|negatives`: what stands between two documents of a row, or two parts, e.g. the tokenizer's own
    end of text, "<|endoftext|>"; attention reaches over it. Left out: an empty line."""

    @model_validator(mode="after")
    def _fits(self) -> MixSource:
        problems = []
        if self.synth not in OF_NO_SET and not self.path:
            problems.append("path is missing: a file, a folder, a pattern or a hub id")
        if self.synth != "none" and self.rows is None and self.share is None:
            problems.append(f"rows is missing: how many samples to make with synth: {self.synth}")
        for key, kinds in OF_KINDS.items():
            if getattr(self, key) not in (None, {}) and self.synth not in kinds:
                problems.append(f"{key} has no effect with synth: {self.synth}, only with {', '.join(kinds)}")
        if (total := sum((self.languages or {}).values())) > 1.000001:
            problems.append(f"languages: the shares add up to {total:.3f}, expected 1 at most")
        if self.sizes is not None:
            try:
                size_parts(self.sizes)
            except ConfigError as error:
                problems += str(error).splitlines()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def filter(self) -> Where:
        """Which of its rows are taken."""
        return Where(self.where, self.exclude, self.least)


class Band(Section):
    """Rows of a range of lengths: longer than the band before, up to this."""

    up_to_tokens: Tokens
    """Longest row of the band."""

    share: float | None = Field(default=None, ge=0, le=1)
    """Share of the mix. Left out: bands without one share what the others leave, as the rows come."""


class Recipe(Section):
    """A data mix."""

    sources: list[MixSource] = Field(min_length=1)
    """Where rows come from."""

    max_length_tokens: Tokens
    """Longer rows are left out."""

    total_rows: int | None = Field(default=None, gt=0)
    """Rows of the mix, held-out ones included. Left out: as many as the shares allow."""

    languages: dict[str, float] = Field(default={})
    """Share of the rows by language code, e.g. {zh: 0.1}; a row's own `language`, or the detected one, counts."""

    lengths: list[Band] = Field(default=[])
    """Short and long in balance: bands of rising `up_to_tokens`."""

    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Share of word 5-grams in common from which on two rows are the same, and only the first is kept; null keeps
    all. What counts is answers and the ends of questions: several questions about one document are several rows."""

    held_out: float = Field(default=0.01, ge=0, lt=1)
    """Share of the rows written to eval.jsonl; no passage of theirs is in train.jsonl."""

    tokenizer: str | None = None
    """Model folder or hub id whose tokenizer counts lengths. Left out: lengths are estimated from characters."""

    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of a source's rows is unusable."""

    choose: Literal["evenly", "context_gain"] = "evenly"
    """Which rows of a source, language and band are taken: drawn evenly, or those on which long context gains the most
    (`ds-longft data score`). Rows without that score come last, made ones too."""

    seed: int = 0
    """The same seed and sources give the same mix."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = [
            f"sources: {source.name} has a share and no rows: give it rows, or the recipe total_rows, to say how many "
            "samples to make"
            for source in self.sources
            if source.synth != "none" and source.rows is None and self.total_rows is None
        ]
        problems += [
            f"sources: {source.name} has room for less than {PARTS} parts in a row: lower its part_tokens"
            for source in self.sources
            if source.synth == "negatives"
            and PARTS * (source.part_tokens or PART_TOKENS) > (source.context_tokens or self.max_length_tokens)
        ]
        names = [source.name for source in self.sources]
        problems += [f"sources: the name {name} stands twice" for name in sorted(set(names)) if names.count(name) > 1]
        for key, shares in (
            ("sources[].share", [source.share or 0 for source in self.sources]),
            ("languages", list(self.languages.values())),
            ("lengths[].share", [band.share or 0 for band in self.lengths]),
        ):
            if sum(shares) > 1.000001:
                problems.append(f"{key}: the shares add up to {sum(shares):.3f}, expected 1 at most")
        bounds = [band.up_to_tokens for band in self.lengths]
        if bounds != sorted(set(bounds)):
            problems.append(f"lengths: up_to_tokens is {bounds}, expected rising values")
        if bounds and bounds[-1] != self.max_length_tokens:
            problems.append(
                f"lengths: the last band ends at {bounds[-1]} tokens, max_length_tokens is {self.max_length_tokens}: "
                "make them equal"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def up_to(self, longest_tokens: int) -> dict[str, Any]:
        """Its keys for rows of at most `longest_tokens`: the last band ends there, and no longer sample is made."""
        content = self.model_dump(exclude_unset=True) | {"max_length_tokens": longest_tokens}
        below = sum(band.up_to_tokens < longest_tokens for band in self.lengths[:-1])
        content["lengths"] = [dict(band) for band in self.lengths[: below + 1]]
        for band in content["lengths"][below:]:
            band["up_to_tokens"] = longest_tokens
        for source in content["sources"]:
            if source.get("context_tokens") is not None:
                source["context_tokens"] = min(source["context_tokens"], longest_tokens)
        return content

    def made_rows(self, source: MixSource) -> int:
        """How many samples to make of a source with `synth`: its rows, or its share of the mix, rounded up."""
        assert source.rows or (source.share and self.total_rows), "the validators saw to it"
        return source.rows or ceil((source.share or 0) * (self.total_rows or 0))


def read_recipe(path: str, **given: Any) -> Recipe:
    """The recipe in a YAML file, `given` keys laid over it; shipped ones (recipes/faro.yaml) are found from anywhere.

    Raises ConfigError with every problem.
    """
    given = {key: value for key, value in given.items() if value is not None}
    content = read_config_file(Path(path))
    try:
        if isinstance(longest := parse_tokens(given.get("max_length_tokens")), int) and longest > 0:
            content = Recipe.model_validate(content).up_to(longest)
        return Recipe.model_validate(content | given)
    except ValidationError as error:
        raise ConfigError([f"{path}: {text}" for e in error.errors() for text in _problems(dict(e))]) from None


def _problems(error: dict[str, Any]) -> list[str]:
    key = dotted(error["loc"]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        section: type[Section] = {"sources": MixSource, "lengths": Band}.get(str(error["loc"][0]), Recipe)  # type: ignore[assignment]
        known = section.model_fields
        return [f"unknown key {key}{nearest(str(error['loc'][-1]), known) or f', known are {chr(44).join(known)}'}"]
    if error["type"] == "value_error":
        return [f"{key}: {line}" if key else line for line in str(error["ctx"]["error"]).splitlines()]
    if error["type"] == "missing":
        return [f"{key} is missing"]
    return [f"{key}: seen {error['input']!r}; {error['msg']}"]
