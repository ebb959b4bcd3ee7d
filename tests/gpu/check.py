"""`make test-gpu`: everything that needs GPUs, in parts of under ten minutes, with one table at the end.

    python -m tests.gpu.check                     all parts that the GPUs of this machine can run
    python -m tests.gpu.check --part steps        one of: kernels, runs, steps
    python -m tests.gpu.check --steps 2           of each timed row, the first is warming up

`kernels`: kernels of attention, loss and states, forward, backward and repeated, the relief of a full GPU; on one GPU,
or shared out to two. `runs`: kills, signals, resumes at another sp, runs repeated to the bit, frozen weights, and
`verify` at sp 2. `steps`: time and peak of the headline rows beside what `ds-longft plan` predicts: within 10 % and
5 %. Exit code 1 when a row falls short.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.length import Case, compare, run
from benchmarks.work import append, end_with_stacks
from ds_longft.ranks.join import visible_gpus
from ds_longft.sequence.kernels.base import import_failure

ROOT = Path(__file__).resolve().parents[2]
K = 1024
MOST_TIME_OFF, MOST_PEAK_OFF = 0.10, 0.05
PART_S = 600  # of one part
CORES = len(os.sched_getaffinity(0))
VISIBLE = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")

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


def ran(name: str, command: Sequence[str], wanted: str, gpu: int | None = None) -> Result:
    """The last line of what a command said that has what is `wanted`; all of it where something failed."""
    begun = time.monotonic()
    of_one = {"CUDA_VISIBLE_DEVICES": VISIBLE[gpu]} if gpu is not None else {}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **of_one}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=PART_S)
    except subprocess.TimeoutExpired:
        end_with_stacks(process.pid)
        text = process.communicate()[0] + f"\nlonger than {PART_S} s"
    if process.returncode:
        print(text[-20000:], flush=True)
    found = [line for line in text.splitlines() if re.search(wanted, line)]
    last = (found or text.splitlines() or [""])[-1].strip("= ")
    return said(Result(name, last[:120], time.monotonic() - begun, process.returncode == 0 and bool(found)))


def suite(name: str, files: Sequence[str], gpu: int | None = None, workers: int = 1) -> Callable[[], Result]:
    """To run files of tests/gpu, on one GPU or on all, by so many workers. Where all is skipped, nothing was tested."""
    options = ["-q", "-m", "gpu", "--timeout", "300", "-p", "no:cacheprovider", "--disable-warnings", "--tb", "short"]
    options += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    command = ["-m", "pytest", *options, *(f"tests/gpu/test_{file}.py" for file in files)]
    return partial(ran, name, command, r"\d+ passed", gpu)


def said(result: Result) -> Result:
    """Printed as soon as it is known: a check that is stopped has told what it had found."""
    print(f"{'ok  ' if result.good else 'FAIL'} {result.name}, {result.seconds:.0f} s: {result.seen}", flush=True)
    return result


def side_by_side(*chains: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each chain found, link by link; the chains run at the same time."""
    with ThreadPoolExecutor(len(chains)) as pool:
        found = pool.map(lambda chain: [link() for link in chain], chains)
        return [result for results in found for result in results]


def kernels(gpus: int) -> list[Result]:
    """On one GPU one behind the other, on two side by side. Workers share the compiling of kernels."""
    workers = max(1, min(8, CORES // (2 * gpus)))
    second = min(1, gpus - 1)
    attention = suite("attention kernels", ("kernels", "cached_attention"), 0, workers)
    alone = suite(
        "a GPU alone: full, shared, quantised, DPO's start", ("relief", "own_memory", "quantized", "dpo_start"), second
    )
    others = suite(
        "loss kernel, states, repeated gradients, dropout, disk",
        ("cross_entropy", "states", "repeatable", "dropout", "disk"), second, workers,
    )  # fmt: skip
    return side_by_side([alone, attention, others]) if gpus == 1 else side_by_side([attention], [alone, others])


def has_fa4() -> bool:
    """Whether flash-attn-4 is installed."""
    return import_failure("flash_attn.cute.interface") is None


def runs(gpus: int) -> list[Result]:
    """Whole runs over all GPUs, at most two. The models are small, and a start takes half a minute: several at a time."""
    frozen = suite("frozen weights brought beside the compute", ("frozen",))  # it looks at times, so nothing beside it
    several = max(1, min(6, CORES // 4))
    whole = suite(
        "kills, signals, not finite, resumes, runs to the bit", ("faults", "repeatable_runs"), workers=several
    )
    names = "flash-attn-4,cudnn" if has_fa4() else "cudnn"
    verify = partial(ran, f"verify, sp {gpus}", ["benchmarks/verify_kernels.py", "--kernels", names], r"^\{")
    return [frozen(), *side_by_side([whole], [verify])]


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
