"""A model that answers on every process of an evaluation, and the rows of its answers on the one that writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ds_longft.decide.held import STREAMED
from ds_longft.errors import ConfigError
from ds_longft.sequence.llama4 import take_over_temperatures
from ds_longft.sequence.state.families import spread_state_layers
from ds_longft.tools.evaluate import results
from ds_longft.tools.evaluate.cached_attention import CACHED, register
from ds_longft.tools.evaluate.evaluation import Question, Result, Row
from ds_longft.tools.evaluate.flags import Flags, tokens_of
from ds_longft.tools.evaluate.generate import Reader, end_ids, generate
from ds_longft.tools.evaluate.position_loss import read_in_windows, token_losses
from ds_longft.tools.evaluate.processes import Processes
from ds_longft.tools.evaluate.room import Asked, Place, Room
from ds_longft.tools.evaluate.served import Server
from ds_longft.tools.evaluate.subject import Loaded, find_subject, load_subject, subject_tokenizer, subject_window

Item = TypeVar("Item")


class Answering:
    """The model of an evaluation. It is loaded when it is first asked, so that mistakes in what is asked come first."""

    def __init__(self, processes: Processes, model: str, flags: Flags) -> None:
        self.processes, self.flags = processes, flags
        self.subject = find_subject(model, before=flags.before, base=flags.base, quantize=flags.quantize)
        self.most = Asked(1)  # that will be asked at a time, as far as it is known
        self._rows: results.Rows | None = None  # on the process that writes

    @cached_property
    def tokenizer(self) -> Any:
        """The one the model was trained with."""
        return subject_tokenizer(self.subject)

    @cached_property
    def window(self) -> int | None:
        """Tokens the model's positions are made for."""
        return subject_window(self.subject)

    @cached_property
    def loaded(self) -> Loaded:
        """The model on this process."""
        register()
        place = self._place()
        if place in STREAMED:
            self.processes.join()
        launch = self.processes.launch
        loaded = load_subject(
            self.subject, self.processes.device, attention=CACHED, weights=place, local_world=launch.local_world
        )
        spread_state_layers(loaded.plain)
        take_over_temperatures(loaded.plain)
        return loaded

    def _place(self) -> Place:
        """Where weights lie. On a CPU where they are told to, else whole."""
        where, device, layout = self.flags.weights, self.processes.device, self.processes.layout
        if where == "sharded" and layout.dp > 1:
            raise ConfigError(f"--weights sharded, and {layout.dp} texts at a time: give --sp {layout.world}")
        if device.type != "cuda":
            return "resident" if where == "auto" else where
        return Room.of(self.subject, self.processes).place(self.most, where)

    def expect(self, tokens: int, texts: int = 1, answer_tokens: int = 0) -> None:
        """Say what will be asked at a time, at most, before the model is loaded for it."""
        more = Asked(tokens, texts, answer_tokens)
        self.most = max(self.most, more, key=lambda asked: asked.tokens + asked.texts * asked.answer_tokens)

    @cached_property
    def reader(self) -> Reader:
        """What reads texts and gives logits."""
        return Reader(self.loaded, self.processes.layout, self.flags.kernel)

    @cached_property
    def _server(self) -> Server:
        assert self.flags.server is not None
        return Server(self.flags.server)

    def losses(
        self, ids: Sequence[int], window_tokens: int | None = None, overlap_tokens: int | None = None
    ) -> NDArray[np.float64]:
        """[tokens] the loss (nats) of each token, 0 of the first, on every rank of the sp group.

        The text is read whole, or in windows (`read_in_windows`).
        """
        self.expect(len(ids))
        layout, whole = self.processes.layout, np.zeros(len(ids))
        text = read_in_windows(ids, window_tokens or len(ids), layout.sp, overlap_tokens)
        at, mine = token_losses(self.loaded, text, layout, self.flags.kernel)
        whole[at] = mine
        return self.processes.summed(whole)

    def replies(self, prompts: Sequence[Sequence[int]], asked: Question) -> list[str]:
        """Greedy answers to prompts of alike questions."""
        if self.flags.server is not None:
            return self._server.replies(prompts, asked.answer_tokens, asked.also_stop, asked.least_tokens)
        made = generate(
            self.loaded,
            prompts,
            max_new_tokens=asked.answer_tokens,
            stop_ids=end_ids(self.loaded, self.tokenizer) | set(asked.also_stop),
            min_new_tokens=asked.least_tokens,
            layout=self.processes.layout,
            kernel=self.flags.kernel,
        )
        return [self.tokenizer.decode(reply, skip_special_tokens=True) for reply in made]

    def ask(
        self,
        kind: str,
        settings: dict[str, Any],
        questions: Mapping[str, Question],
        summary: Callable[[list[Row]], dict[str, Any]],
    ) -> Result:
        """All there is to an evaluation by answers: a row for each question that has none yet, and the result."""
        todo = self.open_rows(kind, settings, list(questions))
        self.add_answers({key: questions[key] for key in todo})
        return self.finish(kind, summary)

    def open_rows(self, kind: str, settings: dict[str, Any], keys: Sequence[str]) -> list[str]:
        """Those of the keys that have no row yet."""

        def opened() -> set[str]:
            folder = results.result_folder(self.subject, self.flags.out)
            file = (self.flags.name or kind) + (results.BEFORE if self.flags.before else "")
            served = {} if self.flags.server is None else {"server": self.flags.server}
            whole = {"weights": results.weights_identity(self.subject), **served, **settings}
            self._rows = results.Rows(folder, file, whole, total=len(keys))
            return {row["key"] for row in self._rows.rows}

        done = self.processes.first(opened)
        return [key for key in keys if key not in done]

    def add(self, items: Sequence[Item], work: Callable[[Item], list[Row]]) -> None:
        """The rows that `work` makes of every item, shared over the processes; an sp group makes them together."""
        for made in self.processes.share_out(items, work):
            assert self._rows is not None
            for row in made:
                self._rows.add(row)

    def add_answers(self, questions: Mapping[str, Question]) -> None:
        """A row of each question, in groups that are asked together; short ones first."""
        ordered = sorted(questions, key=lambda key: questions[key].alike)
        most, groups = tokens_of("--batch_tokens", self.flags.batch_tokens), []
        for _, same in groupby(ordered, lambda key: questions[key].alike):
            keys = list(same)
            # as many as leave some for every process
            count = max(1, min(most // questions[keys[0]].tokens, -(-len(keys) // self.processes.layout.dp)))
            groups += [keys[i : i + count] for i in range(0, len(keys), count)]
            first = questions[keys[0]]
            self.expect(count * first.tokens, count, first.answer_tokens)

        def answer(keys: list[str]) -> list[Row]:
            prompts, rows = zip(*(questions[key].make() for key in keys), strict=True)
            started = time.monotonic()
            texts = self.replies(prompts, questions[keys[0]])
            seconds = round((time.monotonic() - started) / len(keys), 3)
            return [{"key": k, **row(text, seconds)} for k, row, text in zip(keys, rows, texts, strict=True)]

        self.add(groups, answer)

    def finish(self, kind: str, summary: Callable[[list[Row]], dict[str, Any]]) -> Result:
        """The result of all rows."""
        if self._rows is None:
            return None
        made = self._rows.finish(kind, self.subject.shown, summary(self._rows.rows))
        return made, self._rows.result_path
