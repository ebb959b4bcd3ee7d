"""The records of a run: what is worth pointing out, and that a resumed run says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_longft.config.run_config import LogConfig
from ds_longft.train import trackers
from ds_longft.train.metrics import Records, pace, read_metrics, spike_of, step_line, summary_table

CALM = [1.0, 1.1, 0.9] * 20


@pytest.mark.parametrize(
    ("loss", "before", "spike"),
    [
        (1.2, CALM, False),
        (9.0, CALM, True),
        (9.0, CALM[:20], False),  # too little is known
        (0.1, CALM, False),  # a fall is no spike
        (1.001, [1.0] * 50, True),  # a curve without any noise
    ],
)
def test_a_spike_stands_out_of_what_was_before(loss: float, before: list[float], spike: bool) -> None:
    assert (spike_of(loss, before) is not None) == spike


def record(step: int, loss: float) -> dict[str, float | None]:
    zeros = dict.fromkeys(("grad_norm", "mfu", "learning_rate", "tokens_per_s_per_gpu", "peak_gib"), 0.0)
    return {**zeros, "step": step, "loss": loss, "padding_percent": 0.0, "data_wait_percent": 0.0, "step_s": 1.0}


def test_spikes_are_recorded_across_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for first, losses in ((0, CALM), (len(CALM), [9.0])):
        records = Records(tmp_path, LogConfig(), total_steps=99, first_step=first, active=True)
        for i, loss in enumerate(losses):
            records.step(record(first + i + 1, loss))
        records.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in written if "loss_spike" in r] == [len(CALM) + 1]
    assert capfd.readouterr().out.count("loss 9.0000 (spike: 9") == 1


@pytest.mark.parametrize(
    ("key", "environment", "project"),
    [("mine", "theirs", "mine"), (None, "theirs", "theirs"), (None, None, "ds_longft")],
)
def test_a_project_comes_from_the_key_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, environment: str | None, project: str
) -> None:
    started: list[str] = []

    class Tracker:
        def start(self, run: trackers.TrackedRun) -> None:
            started.append(run.project)

        def log(self, record: object) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setattr(trackers, "chosen", lambda log: {"wandb": Tracker()})
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_PROJECT", environment)
    records = Records(tmp_path, LogConfig(project=key), total_steps=9, first_step=0, active=True)
    records.start_trackers(None, {})
    records.close()
    assert started == [project]


def test_an_evaluation_that_is_due_again_is_forgotten(tmp_path: Path) -> None:
    lines = [
        {"step": 3, "loss": 1.0},
        {"step": 3, "eval_loss": 2.0},
        {"step": 4, "loss": 1.0},
        {"step": 4, "eval_loss": 2.0},
    ]
    for due, left in ((False, 4), (True, 3)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Records(tmp_path, LogConfig(), total_steps=9, first_step=4, active=True, eval_due=due)
        assert read_metrics(tmp_path / "metrics.jsonl") == lines[:left]


def test_the_third_step_says_when_it_will_be_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the steps behind the first, which warms up; a run that is over in a minute says nothing."""
    quick = pace(2.0, 20, 9)
    assert quick is None
    record = {
        "loss": 1.0, "grad_norm": 1.0, "tokens_per_s_per_gpu": 9.0, "padding_percent": 0.0, "data_wait_percent": 0.0,
    }  # fmt: skip
    records = Records(tmp_path, LogConfig(), total_steps=1003, first_step=0, active=True, steps_per_epoch=500)
    for step, step_s in ((1, 400.0), (2, 11.0), (3, 13.0), (4, 12.0)):
        records.step({**record, "step": step, "step_s": step_s})
    records.lines.flush()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("at ")]
    assert line.startswith(
        "at 12.0 s per step an epoch of 500 steps takes about 1.7 hours, the 1,000 steps that are left 3.3 hours, until "
    )


def test_a_skipped_step_and_a_loss_that_is_no_number_are_said_and_are_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = Records(tmp_path, LogConfig(), total_steps=9, first_step=0, active=True)
    records.step({**record(1, 1.0), "loss": None, "grad_norm": None, "skipped": "the gradient is not finite"})
    records.evaluation({"step": 1, "eval_loss": float("nan"), "eval_targets": 7, "eval_s": 1.0})
    records.close()
    said = capfd.readouterr().out
    assert " step 1/9  SKIPPED: the gradient is not finite  norm -" in said
    assert "held-out loss at step 1 | nan" in said
    assert (
        max(
            map(
                len,
                step_line(
                    {**record(399, 1.0), "mfu": 0.45, "tokens_per_s_per_gpu": 3706.0, "step_s": 17.7}, 546
                ).splitlines(),
            )
        )
        <= 80
    )
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[1]["eval_loss"] is None
    assert summary_table(read_metrics(tmp_path / "metrics.jsonl"), tmp_path, 1.0).row_count


def test_a_resume_keeps_what_stands_behind_a_bad_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps(record(step, 1.0)).encode() for step in range(1, 6)]
    for bad in (b"\0\0\0", b"", b"null", b"5", b"\xff\xfe", b'{"loss": 1.0}', b'{"step": "3"}'):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*good[:2], bad, *good[2:], b'{"step": 6, "lo']))
        Records(tmp_path, LogConfig(), total_steps=9, first_step=5, active=True)
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        assert (
            "metrics.jsonl: lines that cannot be read: 1, left out (metrics.jsonl: line 3: " in capfd.readouterr().out
        )
