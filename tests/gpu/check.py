"""`make test-gpu`: everything that needs GPUs, in parts of under ten minutes, with one table at the end.

    python -m tests.gpu.check                     all parts that the GPUs of this machine can run
    python -m tests.gpu.check --part steps        one of: kernels, runs, steps
    python -m tests.gpu.check --steps 2           of each timed row, the first is warming up

`kernels`: attention and loss kernels, forward, backward and repeated, the relief of a full GPU; on one GPU, or halved
over two. `runs`: kills, signals, resumes at another sp, runs repeated to the bit, and `verify` at sp 2. `steps`: time
and peak of the headline rows beside what `ds-longft plan` predicts: within 10 % and 5 %. Exit code 1 when a row falls
short.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.length import Case, compare, run
from benchmarks.work import append
from ds_longft.ranks.join import visible_gpus
from ds_longft.sequence.kernels.base import import_failure

ROOT = Path(__file__).resolve().parents[2]
K = 1024
MOST_TIME_OFF, MOST_PEAK_OFF = 0.10, 0.05
PART_S = 600  # of one part

HEADLINE = (
    Case("128K LoRA sp2", f"{128 * K}", stage=3),
    Case("8 x 16K LoRA sp2", f"{16 * K}x8", stage=3),
    Case("LongAlign draw of 128K LoRA sp2", f"longalign:{128 * K}", stage=3),
    Case("16 x 8K LoRA dp2", f"{8 * K}x8", stage=3, sp=1),
    Case("64K all weights sp2", f"{64 * K}", stage=3, full=True),
    Case("pair 2 x 32K DPO sp2", f"{32 * K}x2", stage=3, reference="adapter_off", passes="auto"),
    Case("32K LoRA, one GPU", f"{32 * K}", stage=3, gpus=1),
)


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    name: str
    seen: str
    seconds: float
    good: bool


def start_tests(name: str, *words: str, gpu: int | None = None) -> tuple[str, subprocess.Popen[str], float]:
    """Start pytest on some files of tests/gpu, on one GPU or on all."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": str(gpu)} if gpu is not None else {})}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--timeout", "300", "-p", "no:cacheprovider", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return name, process, time.monotonic()


def wait(name: str, process: subprocess.Popen[str], begun: float) -> Result:
    """The last line of what pytest said; all of it where something failed."""
    try:
        text, _ = process.communicate(timeout=PART_S - (time.monotonic() - begun))
    except subprocess.TimeoutExpired:
        process.kill()
        text = process.communicate()[0] + f"\nlonger than {PART_S} s"
    if process.returncode:
        print(text[-8000:], flush=True)
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)] or text.splitlines()
    return said(Result(name, lines[-1].strip("= ") if lines else "", time.monotonic() - begun, process.returncode == 0))


def said(result: Result) -> Result:
    """Printed as soon as it is known: a check that is stopped has told what it had found."""
    print(f"{'ok  ' if result.good else 'FAIL'} {result.name}, {result.seconds:.0f} s: {result.seen}", flush=True)
    return result


def kernels(gpus: int) -> list[Result]:
    """On one GPU one behind the other, on two side by side."""
    second = min(1, gpus - 1)
    halves = [
        ("attention kernels", ("tests/gpu/test_kernels.py", "tests/gpu/test_cached_attention.py"), 0),
        (
            "loss kernel, repeated gradients, dropout, full GPUs",
            (
                *("tests/gpu/test_cross_entropy.py", "tests/gpu/test_repeatable.py", "tests/gpu/test_dropout.py"),
                *("tests/gpu/test_relief.py", "tests/gpu/test_own_memory.py", "tests/gpu/test_dpo_start.py"),
                *("-k", "not test_runs_repeat"),
            ),
            second,
        ),
    ]
    if gpus == 1:
        return [wait(*start_tests(name, *words, gpu=gpu)) for name, words, gpu in halves]
    return [wait(*started) for started in [start_tests(name, *words, gpu=gpu) for name, words, gpu in halves]]


def has_fa4() -> bool:
    """Whether flash-attn-4 is installed."""
    return import_failure("flash_attn.cute.interface") is None


def runs(gpus: int) -> list[Result]:
    """Whole runs over all GPUs, at most two."""
    started = [
        start_tests("runs repeated and resumed to the bit", "tests/gpu/test_repeatable.py", "-k", "test_runs_repeat"),
        start_tests("kills, signals, not finite, resume at another sp", "tests/gpu/test_faults.py"),
    ]  # side by side, and beside them what follows: the models are small, and each start waits for imports
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "benchmarks/verify_kernels.py", "--kernels", "flash-attn-4,cudnn" if has_fa4() else "cudnn"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=PART_S,
    )  # fmt: skip
    if done.returncode:
        print((done.stdout + done.stderr)[-8000:], flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    verified = said(Result(f"verify, sp {gpus}", last[:120], time.monotonic() - begun, done.returncode == 0))
    return [verified, *(wait(*each) for each in started)]


def steps(gpus: int, count: int, gpu: str, results: str | None) -> list[Result]:
    """The headline rows beside the plan."""
    found = []
    for case in (c for c in HEADLINE if c.gpus <= gpus):
        begun = time.monotonic()
        line = compare(case, run(case, count, PART_S), gpu, tiny=False)
        if results and "error" not in line:
            append(results, line)
        off = [line.get(key) for key in ("time_error", "peak_error")]
        good = all(
            o is not None and abs(o) <= most for o, most in zip(off, (MOST_TIME_OFF, MOST_PEAK_OFF), strict=True)
        )
        seen = line.get("error") or (
            f"{line['value']:.2f} s, planned {line['predicted_s']:.2f} ({line.get('time_error', 0):+.1%}); "
            f"{line['peak_gib']:.1f} GiB, planned {line['predicted_peak_gib']:.1f} ({line.get('peak_error', 0):+.1%})"
        )
        found.append(said(Result(case.name, seen, time.monotonic() - begun, good)))
    return found


def main() -> None:
    """Run the parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["kernels", "runs", "steps"], help="left out: all of them")
    parser.add_argument("--steps", type=int, default=3, help="of each timed row")
    parser.add_argument("--gpu", default="h200", help="rates of the prediction: a type, or a file of plan --calibrate")
    parser.add_argument("--append", help="append the timed rows to this file")
    args = parser.parse_args()
    gpus = min(2, visible_gpus())
    if not gpus:
        raise SystemExit("no GPU seen: `make test` runs everything that needs none")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    results: list[Result] = []
    for part in [args.part] if args.part else ["kernels", "runs", "steps"]:
        begun = time.monotonic()
        results += {
            "kernels": lambda: kernels(gpus),
            "runs": lambda: runs(gpus),
            "steps": lambda: steps(gpus, args.steps, args.gpu, args.append),
        }[part]()
        print(f"part {part}: {time.monotonic() - begun:.0f} s", flush=True)
    width = max(len(r.name) for r in results)
    print(
        "\n"
        + "\n".join(f"{'ok  ' if r.good else 'FAIL'} {r.name:{width}} {r.seconds:5.0f} s  {r.seen}" for r in results)
    )
    raise SystemExit(not all(r.good for r in results))


if __name__ == "__main__":
    main()
