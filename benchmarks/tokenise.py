"""Tokenising and packing against the tokenizer library alone, on the same cores and texts; memory as the data grows.

    python benchmarks/tokenise.py TEXTS --tokenizer MODEL --mb 1000 --append benchmarks/results.jsonl
    python benchmarks/tokenise.py TEXTS --tokenizer MODEL --mb 100 --parts 5 --kind chat

TEXTS is a folder with .txt, .json or .jsonl files (.gz too): all long strings in them are cut at random into documents
of 2,000 to 100,000 characters, again and again until there is enough. Ours is everything from files to packs:
reading and parsing JSONL, tokenising, writing the tokenized set, planning the epoch, building each pack. The library is
`encode_batch_fast` over the documents, read before the clock starts, in batches, with as many threads as we have
processes; what it makes is thrown away. Both take turns, part by part, so that what else runs here slows both; CPU
seconds are compared beside the wall time. Of chats the library gets the rendered texts. At last ours does all parts at
once: its memory is compared with that of one part.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MB = 1_000_000
BATCH_CHARACTERS = 4_000_000  # the library's batches: many documents for each thread
PACK_TOKENS = 262_144
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Make texts, let both take turns, then all of it at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="folder with texts")
    parser.add_argument("--tokenizer", required=True, help="model folder")
    parser.add_argument("--mb", type=int, default=1000, help="text of all parts together, in 10^6 bytes of UTF-8")
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--turns", type=int, help="both take turns over so many parts; default: all")
    parser.add_argument("--kind", default="text", choices=["text", "chat"], help="plain texts, or questions about them")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--append", help="append the results to this file")
    parser.add_argument("--side", choices=["ours", "library"], help=argparse.SUPPRESS)  # one turn, in its own process
    parser.add_argument("--files", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps((ours if args.side == "ours" else library)(args.files.split(","), args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"part-{i}.jsonl") for i in range(args.parts)]
        for i, file in enumerate(files):
            write_part(Path(file), args, seed=i)
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "library": []}
        for file in files[: args.turns]:
            for side, done in turns.items():
                done.append(turn(side, [file], args))
                print(f"{side}: {json.dumps(done[-1])}", flush=True)
        whole = turn("ours", files, args) if args.parts > 1 else turns["ours"][0]
        print(f"all at once: {json.dumps(whole)}", flush=True)
        results = summary(turns, whole, args)
    for result in results:
        print(json.dumps(result), flush=True)
    if args.append:
        from benchmarks.work import append

        append(args.append, *results)


def turn(side: str, files: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One side's figures over these files, in a fresh process on the given cores."""
    cores = set(sorted(os.sched_getaffinity(0))[: args.cores])
    threads = {"library": str(args.cores), "ours": "1"}[side]  # ours: processes
    command = [sys.executable, __file__, args.texts, "--tokenizer", args.tokenizer, "--cores", str(args.cores)]
    done = subprocess.run(
        [*command, "--kind", args.kind, "--side", side, "--files", ",".join(files)],
        env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ours(files: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """From files to packs, as a training run does it."""
    from transformers import AutoTokenizer

    from ds_longft.config.data_keys import SourceConfig
    from ds_longft.config.run_config import DataConfig
    from ds_longft.data.loader import StepLoader
    from ds_longft.data.tokenize import tokenize_sources

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache, Family() as processes:
        data = DataConfig(max_length_tokens=PACK_TOKENS, workers=args.cores, cache_dir=cache)
        start, before_s = time.perf_counter(), processes.cpu_s()
        rows = tokenize_sources([SourceConfig(path=file) for file in files], tokenizer, data)
        tokenised_s = time.perf_counter() - start
        loader = StepLoader(rows, data=data, dp=1, dp_rank=0, sp=1, accumulation=1, seed=0, pad_id=0)
        tokens = sum(pack.tokens for step in loader.steps(0) for pack in step.packs)
        total_s = time.perf_counter() - start
    cpu_s = processes.cpu_s() - before_s
    return {
        **{"s": total_s, "cpu_s": cpu_s, "tokenise_s": tokenised_s},
        **{"tokens": tokens, "rows": len(rows)},
        **processes.peak_mb(),
    }


def library(files: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The Rust tokenizer alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    backend = tokenizer.backend_tokenizer
    rows = [json.loads(line) for file in files for line in Path(file).read_bytes().splitlines()]
    if args.kind == "text":
        texts = [row["text"] for row in rows]
    else:
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    total_s, cpu_s, tokens = 0.0, 0.0, 0
    for batch in batches(texts):
        start, before_s = time.perf_counter(), time.process_time()
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        total_s += time.perf_counter() - start
        cpu_s += time.process_time() - before_s
        tokens += sum(map(len, encodings))
    return {"s": total_s, "cpu_s": cpu_s, "tokens": tokens, "rows": len(rows)}


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Runs of texts of about `BATCH_CHARACTERS`."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Family:
    """This process and all it starts: the highest memory of all together, and the CPU time, looked at every 0.1 s."""

    def __init__(self) -> None:
        self.rss, self.anonymous = 0, 0  # bytes; the first counts pages of files, which the system can drop
        self._cpu_s: dict[int, float] = {}  # of each process, kept when it has ended
        self._pids, self._looks = list[int](), 0  # looking up who belongs to it is the dearest part: every tenth time
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Family:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_s(self) -> float:
        """Seconds of CPU so far."""
        self._look()
        return sum(self._cpu_s.values())

    def peak_mb(self) -> dict[str, float]:
        """In 10^6 bytes."""
        return {"rss_mb": round(self.rss / MB), "anonymous_mb": round(self.anonymous / MB)}

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._look()

    def _look(self) -> None:
        if self._looks % 10 == 0:
            self._pids = family(os.getpid())
        self._looks += 1
        rss = anonymous = 0
        for pid in self._pids:
            try:
                pages = list(map(int, Path(f"/proc/{pid}/statm").read_bytes().split()))
                fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            except OSError:  # it has ended
                continue
            rss, anonymous = rss + pages[1] * PAGE_BYTES, anonymous + (pages[1] - pages[2]) * PAGE_BYTES
            self._cpu_s[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        self.rss, self.anonymous = max(self.rss, rss), max(self.anonymous, anonymous)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(child) for file in children for child in file.read_text().split()]
    except OSError:
        below = []
    return [pid, *(each for child in below for each in family(child))]


def write_part(file: Path, args: argparse.Namespace, seed: int) -> None:
    """One part of the texts as JSONL, --mb / --parts of text."""
    strings, rng = long_strings(Path(args.texts)), random.Random(seed)
    left = args.mb * MB // args.parts
    with file.open("w", encoding="utf-8") as out:
        while left > 0:
            text = rng.choice(strings)
            length = round(2000 * 50 ** rng.random())
            start = rng.randrange(max(1, len(text) - length))
            piece = text[start : start + length]
            left -= len(piece.encode())
            row: dict[str, Any] = {"text": piece}
            if args.kind == "chat":
                answer = text[start + length : start + length + 600] or "There is nothing more."
                turns = [("user", f"{piece}\n\nHow does it go on?"), ("assistant", answer)]
                row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def long_strings(folder: Path) -> list[str]:
    """All strings of 2,000 characters or more, short ones of a file joined."""
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and {".txt", ".json", ".jsonl"} & set(p.suffixes)):
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8", errors="replace") as stream:
            content = stream.read()
        if ".txt" in file.suffixes:
            strings = [content]
        else:
            lines = filter(str.strip, content.split("\n")) if ".jsonl" in file.suffixes else [content]
            strings = [string for line in lines for string in strings_of(json.loads(line))]
        found += [string for string in strings if len(string) >= 2000]
        found += ["\n".join(string for string in strings if len(string) < 2000)]
    found = [string for string in found if len(string) >= 2000]
    if not found:
        raise SystemExit(f"{folder} holds no text: expected .txt, .json or .jsonl, .gz too")
    return found


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings_of(each)


def summary(
    turns: dict[str, list[dict[str, Any]]], whole: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Result lines: the share of the library's speed, and memory of the smallest and the whole input."""
    import tokenizers

    from benchmarks.work import provenance

    part_mb = args.mb / args.parts
    speeds = {side: median(part_mb / each["s"] for each in done) for side, done in turns.items()}
    pairs = list(zip(turns["ours"], turns["library"], strict=True))
    ratio = median(library["s"] / ours["s"] for ours, library in pairs)
    same = {
        **provenance(1, tokenizers),
        "machine": f"{args.cores} CPU cores, {platform.machine()}, load {os.getloadavg()[2]:.1f} from others and this",
    }
    return [
        {
            **same,
            "what": f"tokenise and pack, share of the library alone, {args.kind}",
            "value": round(ratio, 3),
            "unit": "share",
            "mb_per_s": round(speeds["ours"], 2),
            "library_mb_per_s": round(speeds["library"], 2),
            "cpu_share": round(median(library["cpu_s"] / ours["cpu_s"] for ours, library in pairs), 3),
            "turns": len(pairs),
            "mb_of_a_turn": round(part_mb),
            "tokens": sum(each["tokens"] for each in turns["ours"]),
        },
        {
            **same,
            "what": f"tokenise and pack, memory of {args.mb} MB over that of {part_mb:.0f} MB, {args.kind}",
            "value": round(whole["anonymous_mb"] / turns["ours"][0]["anonymous_mb"], 3),
            "unit": "ratio",
            **{f"{key}_of_{part_mb:.0f}_mb": turns["ours"][0][key] for key in ("rss_mb", "anonymous_mb")},
            **{f"{key}_of_{args.mb}_mb": whole[key] for key in ("rss_mb", "anonymous_mb")},
            "s": round(whole["s"], 1),
            "cpu_s": round(whole["cpu_s"], 1),
            "tokens": whole["tokens"],
        },
    ]


if __name__ == "__main__":
    main()
