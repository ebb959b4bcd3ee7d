"""What is known about a run, from the files of its output folder. A missing file leaves its part out.

Works while the run is still going: every file is read as far as it is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_longft.config.read import config_of_run
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError
from ds_longft.run_files import (
    DataFile,
    EngineFile,
    EvaluationFile,
    MetricsLine,
    PlanFile,
    StatusFile,
    StoredFile,
    VersionsFile,
)
from ds_longft.stored import Unreadable, read_file, read_lines

BEFORE = "-before"
TITLES = {
    "suite": "Before and after",
    "perplexity": "Loss by position",
    "needle": "Needles",
    "needle-multi": "Several needles at once",
    "needle-hop": "Needles in a chain",
    "ruler": "RULER",
    "short": "Short questions and texts",
    "longbench": "LongBench",
    "longbench-e": "LongBench-E",
    "longproc": "LongProc",
}
SILENT_S = 600  # a run without an exit code whose newest record is older is called silent, not running


@dataclass(frozen=True)
class Evaluation:
    """One result of `ds-longft eval`, after training and, where it was made, before."""

    name: str
    after: dict[str, Any] | None
    before: dict[str, Any] | None

    @property
    def kind(self) -> str:
        """perplexity, needle, needle-multi, needle-hop, ruler, short, longbench, longbench-e."""
        return str((self.after or self.before or {}).get("kind", self.name))

    @property
    def title(self) -> str:
        """Title of its section: the kind, and the name where it was given another."""
        title = TITLES.get(self.kind, self.kind)
        more = self.name.removeprefix(self.kind).strip("-")
        return f"{title}: {more}" if more else title

    @property
    def pair(self) -> list[tuple[str, dict[str, Any]]]:
        """(label, result) of those that are there, before first."""
        return [(label, r) for label, r in (("before", self.before), ("after", self.after)) if r is not None]

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Settings, the weights aside, that before and after were not made with alike: name -> (before, after)."""
        if self.after is None or self.before is None:
            return {}
        before, after = self.before["settings"], self.after["settings"]
        names = [name for name in before | after if name != "weights"]
        return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


@dataclass(frozen=True)
class RunFacts:
    """Everything the page shows."""

    folder: Path
    config: RunConfig
    config_text: str
    steps: list[dict[str, Any]]
    """Records of optimizer steps, see `train/metrics.py`."""
    held_out: list[dict[str, Any]]
    """Records of evaluations during training: step, eval_loss."""
    versions: dict[str, str]
    machine: dict[str, Any]
    engine: dict[str, Any]
    """The DeepSpeed JSON as resolved."""
    plan: dict[str, Any] | None
    """What the planner foresaw, RUN/plan.json: written by the run on a GPU, or `ds-longft plan --json` kept there."""
    status: str
    error: str | None
    ended: str | None
    """When, as its host's clock had it."""
    start_up_s: float
    """Of the last start, up to its first step; 0 where that is not known."""
    checkpoints: list[str]
    data: dict[str, dict[str, Any]]
    """Statistics of the training and the held-out set, see `train/data_facts.py`."""
    sample: dict[str, Any] | None
    total_steps: int | None
    evaluations: list[Evaluation] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """What is garbage among the files, in words."""

    @property
    def running(self) -> bool:
        """Whether the page should be made again soon."""
        return self.status.startswith("running")

    @property
    def steps_s(self) -> float:
        """Time of all optimizer steps."""
        return float(sum(r["step_s"] for r in self.steps if r.get("step_s") is not None))


def gather_facts(folder: Path) -> RunFacts:
    """Read a run's folder.

    Raises:
        ConfigError: it is none (no config.yaml).
    """
    if folder.name in ("", ".."):  # of `ds-longft report .`: the page and its commands name the folder
        folder = folder.resolve()
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(f"RUN {str(folder)!r} holds no config.yaml: expected the output_dir of a run")
    unreadable: list[str] = []

    def read(name: str, schema: type[StoredFile]) -> dict[str, Any]:
        """The file's content, {} where it is not there or garbage; the latter is said on the page."""
        try:
            content = read_file(folder / name, schema) if (folder / name).exists() else None
        except Unreadable as error:
            unreadable.append(f"not shown: {error}")
            content = None
        return {} if content is None else content.model_dump(exclude_unset=True)

    records, bad_lines = read_lines(folder / "metrics.jsonl", MetricsLine)
    if bad_lines:
        unreadable.append(f"not shown: {len(bad_lines)} lines of metrics.jsonl ({bad_lines[0]})")
    facts, data, plan = read("versions.json", VersionsFile), read("data.json", DataFile), read("plan.json", PlanFile)
    told = read("run_status.json", StatusFile)
    status, error = _status(folder, told, records)
    config = config_of_run(folder)
    return RunFacts(
        folder=folder,
        config=config,
        config_text=config_file.read_text(encoding="utf-8"),
        steps=[r for r in records if "loss" in r],
        held_out=[r for r in records if r.get("eval_loss") is not None],
        versions=facts.get("versions", {}),
        machine=facts.get("machine", {}),
        engine=read("ds_config.json", EngineFile),
        plan=plan or None,
        status=status,
        error=error,
        ended=told.get("time") if told.get("exit_code") is not None else None,
        start_up_s=sum((told.get("start_up_s") or {}).values()),
        checkpoints=[p.name for p in sorted(folder.glob("checkpoint-*"), key=_number) if p.is_dir()],
        data=data.get("parts", {}),
        sample=data.get("sample"),
        total_steps=data.get("total_steps") or config.train.max_steps,
        evaluations=_evaluations(folder / "eval", unreadable),
        unreadable=unreadable,
    )


def points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have one."""
    return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def _number(path: Path) -> tuple[int, str]:
    tail = path.name.rpartition("-")[2]
    return (int(tail) if tail.isdigit() else -1, path.name)


def _status(folder: Path, status: dict[str, Any], records: list[dict[str, Any]]) -> tuple[str, str | None]:
    """How the run stands, and the error that ended it."""
    code, error = status.get("exit_code"), status.get("error")
    last = f"step {records[-1]['step']}" if records else "no step yet"
    if code is not None:
        known = {0: "done", 64: "config or data refused", 70: "not finite", 71: "hung", 75: "stopped and saved"}
        return f"{known.get(code, 'failed')} (exit code {code}), {last}", error
    file = folder / "metrics.jsonl"
    age_s = time.time() - file.stat().st_mtime if file.exists() else 0.0
    return f"silent for {age_s / 60:.0f} minutes, {last}" if age_s > SILENT_S else f"running, {last}", error


def _evaluations(folder: Path, unreadable: list[str]) -> list[Evaluation]:
    """Results of RUN/eval, before and after paired by name."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results[path.stem] = read_file(path, EvaluationFile).model_dump()
        except Unreadable as error:
            unreadable.append(f"not shown: eval/{error}")
    names = dict.fromkeys(name.removesuffix(BEFORE) for name in results)
    return [Evaluation(name, results.get(name), results.get(name + BEFORE)) for name in names]
