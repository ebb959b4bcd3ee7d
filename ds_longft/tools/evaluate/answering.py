"""A model that answers on every process of an evaluation, and the rows of its answers on the one that writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ds_longft.tools.evaluate import results
from ds_longft.tools.evaluate.cached_attention import CACHED, register
from ds_longft.tools.evaluate.generate import CHUNK_TOKENS, end_ids, generate
from ds_longft.tools.evaluate.processes import Processes
from ds_longft.tools.evaluate.subject import find_subject, load_subject, subject_tokenizer

Item = TypeVar("Item")


@dataclass(frozen=True)
class Target:
    """What the flags of every evaluation say: which model, and where its results go."""

    model: str
    before: bool
    base: str | None
    out: str | None
    name: str | None


class Answering:
    """The model of a target, loaded."""

    def __init__(self, processes: Processes, target: Target, chunk_tokens: int = CHUNK_TOKENS) -> None:
        register()
        self.processes, self.target, self.chunk_tokens = processes, target, chunk_tokens
        self.subject = find_subject(target.model, before=target.before, base=target.base)
        self.tokenizer = subject_tokenizer(self.subject)
        self.loaded = load_subject(self.subject, processes.device, attention=CACHED)
        self.stops = end_ids(self.loaded, self.tokenizer)
        self._rows: results.Rows | None = None  # on the process that writes

    def replies(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, also_stop: Collection[int] = (), least: int = 0
    ) -> list[str]:
        """Greedy answers to prompts of one length."""
        made = generate(
            self.loaded,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stops | set(also_stop),
            chunk_tokens=self.chunk_tokens,
            min_new_tokens=least,
        )
        return [self.tokenizer.decode(reply, skip_special_tokens=True) for reply in made]

    def open_rows(self, kind: str, settings: dict[str, Any], total: int) -> set[str]:
        """Keys of the rows that are there already."""

        def opened() -> set[str]:
            folder = results.result_folder(self.subject, self.target.out)
            file = results.result_name(self.target.name, kind, self.target.before)
            whole = {"weights": results.weights_identity(self.subject), **settings}
            self._rows = results.Rows(folder, file, whole, total=total)
            return {row["key"] for row in self._rows.rows}

        return self.processes.first(opened)

    def fill(
        self,
        kind: str,
        items: Sequence[Item],
        answer: Callable[[Item], list[dict[str, Any]]],
        summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> tuple[dict[str, Any], Path] | None:
        """Rows of every item, shared over the processes; the result and its file on the one that writes."""
        for made in self.processes.share_out(items, answer):
            assert self._rows is not None
            for row in made:
                self._rows.add(row)
        if self._rows is None:
            return None
        return self._rows.finish(kind, self.subject.shown, summary(self._rows.rows)), self._rows.result_path
