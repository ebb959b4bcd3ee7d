"""What the commands of `ds-longft data synth` share on the command line, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_longft.command_line import tokens_of
from ds_longft.errors import ConfigError

if TYPE_CHECKING:  # a help should not wait for these
    from ds_longft.tools.make_data.synth.row_plan import Wanted
    from ds_longft.tools.make_data.where import Where


@dataclass(frozen=True)
class Named:
    """What rows are called, and the file that each of these commands writes.

    Args:
        out: JSONL file to write.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """

    name: str
    seed: int = 0
    json: bool = False


@dataclass(frozen=True)
class Made(Named):
    """How many rows, and how long.

    Args:
        rows: how many.
        context_tokens: longest row, e.g. 128K.
        tokenizer: folder or hub id of a model, to count lengths exactly. Left out: lengths are estimated.
    """

    rows: int = 1000
    context_tokens: int | str = "32K"
    tokenizer: str | None = None

    @property
    def longest_tokens(self) -> int:
        """`context_tokens` as a number."""
        return tokens_of("--context_tokens", self.context_tokens)

    def wanted(self, chars_per_token: float | None = None) -> Wanted:
        """What is asked of a maker of rows. Lengths are estimated by `chars_per_token`, where another than usual.

        Raises:
            ConfigError: no row, or no count of tokens.
        """
        from ds_longft.tools.look.commands import load_tokenizer
        from ds_longft.tools.make_data.lengths import CHARS_PER_TOKEN, Lengths
        from ds_longft.tools.make_data.synth.row_plan import Wanted

        if self.rows < 1:
            raise ConfigError(f"--rows is {self.rows}: expected 1 or more")
        longest = self.longest_tokens
        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        lengths = Lengths(tokenizer, chars_per_token or CHARS_PER_TOKEN)
        return Wanted(self.rows, longest, self.seed, self.name, lengths)


@dataclass(frozen=True)
class MadeOfTexts(Made):
    """Which texts rows are made of.

    Args:
        source: set of plain texts, or of references; a file, a folder, or a pattern in quotes.
        where: column=value, rows of the source to take.
        exclude: column=value, rows of the source to leave out.
    """

    where: str | None = None
    exclude: str | None = None

    @property
    def taken(self) -> Where:
        """Rows of the source. Raises ConfigError."""
        from ds_longft.tools.make_data.where import Where, parse_where

        return Where(parse_where("--where", self.where), parse_where("--exclude", self.exclude))
