"""Which files of a folder, a pattern or a clone of a hub set are read, and which are left out and named."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from ds_longft.config.data_keys import SourceConfig, is_pattern
from ds_longft.config.endings import EXPECTED, LINES, SUFFIXES, UNREAD, not_read, suffix_of
from ds_longft.errors import DataError

# Written beside data by `datasets`, its hub and LLaMA-Factory, and texts about it.
NO_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|dataset_card)\.json|(readme|licen[cs]e|notice|changelog|citation|requirements)\..*",
    re.IGNORECASE,
)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
SHOWN = 6  # names in a remark


@dataclass(frozen=True)
class Files:
    """The files of a source, and what is said about those beside them."""

    read: tuple[Path, ...]
    remark: str = ""


def is_remote(path: str) -> bool:
    """Whether a path names a place on another machine: s3://, gs://, hf://, https://."""
    return "://" in path


def local_files(config: SourceConfig) -> Files | None:
    """The files of a local path or pattern, None where there is no such path. Raises `DataError`: none can be read."""
    path = Path(config.path).expanduser()
    if is_pattern(config.path) and not path.exists():
        _refuse_hub_keys(config, "a pattern", split=True)
        files = _chosen(path.parent, sorted(map(Path, glob(str(path)))), None)
        if not files.read:
            raise DataError(f"no file fits {config.path!r}: expected {EXPECTED}")
        return files
    if path.is_dir():
        return _of_folder(path, config)
    if path.is_file():
        _refuse_hub_keys(config, "a file", split=True)
        if why := not_read(path):
            raise DataError(f"{path} has an unknown ending: {why}")
        return Files((path,), _unread_members([path]))
    return None


def _of_folder(path: Path, config: SourceConfig) -> Files:
    _refuse_hub_keys(config, "a folder", split=False)
    root = path / config.subset if config.subset else path
    if not root.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")[:SHOWN])
        raise DataError(
            f"data.train[].subset is {config.subset!r}, but {path} has no such folder; it has {inside or 'none'}"
        )
    files = _chosen(root, sorted(p for p in root.rglob("*") if p.is_file()), config.split)
    if not files.read:
        raise DataError(f"the folder {root} holds no data: expected {EXPECTED}")
    return files


def _refuse_hub_keys(config: SourceConfig, what: str, *, split: bool) -> None:
    """A key that would have no effect is refused, not ignored."""
    keys = {"revision": config.revision is not None}
    if split:
        keys |= {"subset": config.subset is not None, "split": config.split != "train"}
    for key, given in keys.items():
        if given:
            raise DataError(f"data.train[].{key} is given, but {config.path} is {what}, which has none: leave it out")


def _chosen(root: Path, found: Iterable[Path], wanted: str | None) -> Files:
    """Files of a known ending and, where the names tell splits apart, of the wanted one.

    Raises `DataError` where data lies among them that cannot be read, or no file is of that split.
    """
    data: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    for file in found:
        inner = file.relative_to(root)
        if any(part[0] in "._" for part in inner.parts):
            left_out.setdefault("hidden", []).append(inner)
        elif {file.suffix.lower(), suffix_of(file)} & UNREAD:
            left_out.setdefault("unread", []).append(inner)
        elif suffix_of(file) not in SUFFIXES or NO_DATA.fullmatch(file.name):
            left_out.setdefault("no data", []).append(inner)
        else:
            data.append(file)
    if unread := left_out.get("unread"):
        raise DataError(
            f"{root} holds data that cannot be read: {_names(unread)}. Expected {EXPECTED}: convert or unpack these, "
            "or move them elsewhere"
        )
    if wanted is not None:
        splits = {file: split_of(file.relative_to(root)) for file in data}
        named = sorted({split for split in splits.values() if split})
        same = next((words for words in SPLITS.values() if wanted in words), (wanted,))  # words for one split
        others = [file for file, split in splits.items() if (split or "train") not in same]
        data = [file for file in data if file not in others]
        if wanted != "train" and not named:
            raise DataError(
                f"data.train[].split is {wanted!r}, but no file of {root} is named after a split: leave it out"
            )
        if others and not data:
            seen = ", ".join(named)
            raise DataError(f"{root} holds no files of split {wanted!r}, only of {seen}: set data.train[].split")
        for file in others:
            left_out.setdefault(f"split {splits[file] or 'train'}", []).append(file.relative_to(root))
    parts = [f"{_names(files)} ({why})" for why, files in left_out.items()]
    remark = f"{root}: not read: {'; '.join(parts)}" if parts else ""
    return Files(tuple(data), "\n".join(filter(None, (remark, _unread_members(data)))))


def _names(files: list[Path]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(str(file) for file in files[:SHOWN]) + more


def split_of(file: Path) -> str | None:
    """The split that a file's path names as hub sets do: data/train-00000-of-00002.parquet, test/a.jsonl, dev.json."""
    shard = _SHARD.match(file.name)
    if shard is not None and shard[1] not in ("data", "part"):
        return shard[1]
    for part in reversed(file.parts):
        for split, words in SPLITS.items():
            if re.search(rf"(?:^|[^a-z])(?:{'|'.join(words)})(?:[^a-z]|$)", part.lower()):
                return split
    return None


def is_member(name: str) -> bool:
    """Whether a file of a tar archive is read."""
    path = Path(name)
    return (
        suffix_of(path) in (*LINES, ".txt")
        and not any(p[0] in "._" for p in path.parts)
        and not NO_DATA.fullmatch(path.name)
    )


def _unread_members(files: Iterable[Path]) -> str:
    """What is said about files of tar archives that are not read."""
    said = []
    for file in files:
        if suffix_of(file) in (".tar", ".tgz"):
            try:
                with tarfile.open(file) as archive:
                    others = [Path(m.name) for m in archive if m.isfile() and not is_member(m.name)]
            except (OSError, EOFError, tarfile.TarError) as error:
                raise DataError(f"{file} cannot be read: {error}; is the file complete?") from error
            if others:
                said.append(f"{file}: not read: {_names(others)}")
    return "\n".join(said)
