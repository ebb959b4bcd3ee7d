"""Where results go, and how an evaluation that was stopped goes on: rows are appended as they are finished.

`<folder>/<name>.rows.jsonl` begins with the settings it was made with; a run with the same settings skips what is
there, one with others begins anew. `<folder>/<name>.json` is the finished result. For the output folder of a run the
folder is RUN/eval, and a name that ends in `-before` is the model the run started from: `ds-longft report` pairs them.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ds_longft.data.progress import Progress, duration
from ds_longft.errors import DataError
from ds_longft.model.lora import BASE_CONFIG_FOLDER
from ds_longft.run_files import EvaluationRow
from ds_longft.stored import read_lines
from ds_longft.tools.evaluate.subject import Subject
from ds_longft.tools.make_data.convert import written_whole

BEFORE = "-before"
MODEL_FILES = (
    "*.safetensors", "config.json", "adapter_config.json", f"{BASE_CONFIG_FOLDER}/config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip


def result_folder(subject: Subject, out: str | None) -> Path:
    """`out`, else RUN/eval, else eval/<name of the model> in the current folder."""
    if out is not None:
        return Path(out).expanduser()
    if subject.run is not None:
        return subject.run / "eval"
    return Path("eval") / (subject.adapter or Path(subject.base.path)).name


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Complete or as before."""
    with written_whole(path) as file:
        file.write(json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def weights_identity(subject: Subject) -> list[Any]:
    """What tells this model from others without reading its weights: size and time of each file that it is made of."""
    folder = subject.adapter or Path(subject.base.path).expanduser()
    files = sorted(f for pattern in MODEL_FILES for f in folder.glob(pattern)) if folder.is_dir() else []
    stats = [(str(f.relative_to(folder)), f.stat()) for f in files]
    in_fewer_bits = [] if subject.base.quantize == "auto" else [subject.base.quantize]
    return [subject.shown, *in_fewer_bits, [[name, stat.st_size, int(stat.st_mtime)] for name, stat in stats]]


MARK_EVERY_S = 1.0
"""Rows that come within it are of one handful."""


class Rows:
    """The rows of one evaluation, with a progress bar over them. One process writes."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], *, total: int, show: bool = True) -> None:
        """Raises DataError where the folder cannot be written."""
        self.path = folder / f"{name}.rows.jsonl"
        self.result_path = folder / f"{name}.json"
        self.settings, self.total = settings, total
        self._open = ExitStack()
        try:
            self.rows = self._earlier()
            with written_whole(self.path) as file:  # without a line that a crash cut
                for line in ({"settings": settings}, *self.rows):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - `close` closes it
            self._open.enter_context(self.file)
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error}; give another folder with --out") from error
        self.started = self._last_s = self._marked_s = time.monotonic()
        self.earlier = len(self.rows)
        self._marks = [(self.started, self.earlier)]  # rows then: start, first mark, last mark
        if show and self.earlier:
            print(f"{name}: {self.earlier} of {total} rows are there already", file=sys.stderr, flush=True)
        self._bar = self._open.enter_context(Progress(name, total, show=show))

    def add(self, row: dict[str, Any]) -> None:
        """Append a finished row; `key` names it."""
        now, before = time.monotonic(), len(self.rows)
        if before == self.earlier:
            self._marked_s = now
        elif now - self._marked_s > MARK_EVERY_S:
            self._marks, self._marked_s = [*self._marks[:2], (self._last_s, before)], now
        self._last_s = now
        self.rows.append(row)
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        done = len(self.rows)
        left = f", about {duration(self._row_s() * (self.total - done))} left" if self._marks[1:] else ""
        self._bar.update(done, f"{done} of {self.total}{left}")

    def _row_s(self) -> float:
        """Seconds a row. They come in handfuls, asked side by side, so what counts is how many there were when the next
        handful began to come. The first is counted only while there is no other: it holds the building of kernels.
        """
        (begin_s, begin), (end_s, end) = self._marks[-2:]
        return (end_s - begin_s) / (end - begin)

    def finish(self, kind: str, model: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result beside the rows; returns it with model, settings, date and seconds."""
        self.close()
        whole = {
            "kind": kind,
            "model": model,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "seconds": round(time.monotonic() - self.started, 1),
            "rows_made_now": len(self.rows) - self.earlier,
            "settings": self.settings,
            **result,
        }
        write_result(self.result_path, whole)
        return whole

    def close(self) -> None:
        """Stop the bar, close the file."""
        self._open.close()

    def _earlier(self) -> list[dict[str, Any]]:
        """Rows made with the same settings; none where the settings differ. A line that is garbage is made again."""
        lines, _ = read_lines(self.path, EvaluationRow)
        if not lines or lines[0].get("settings") != json.loads(json.dumps(self.settings)):
            return []
        return [line for line in lines if "key" in line]
