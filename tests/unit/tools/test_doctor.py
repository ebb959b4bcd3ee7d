"""What `ds-longft doctor` finds, on made-up machines and on this one."""

import json
from pathlib import Path

import pytest

from ds_longft.tools import doctor as module


def test_stale_build_lock_is_found_with_the_cure(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cu130" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (found,) = module.build_locks(tmp_path)
    assert found.level == "wrong"
    assert found.seen == str(lock)
    assert f"rm {lock}" in found.mend
    lock.unlink()
    assert [next(module.build_locks(folder)).level for folder in (tmp_path, tmp_path / "missing")] == ["ok", "ok"]


def test_memory_of_a_machine(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n")
    found = module.memory(meminfo, tmp_path / "no-shm")
    assert [f.seen for f in found] == ["32 of 64 GiB free"]


def test_small_shared_memory_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type(real)(64 << 20, 0, 64 << 20))
    (found,) = module.memory(tmp_path / "none", tmp_path)
    assert found.level == "wrong"
    assert "--shm-size" in found.mend


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_no_folder_can_be_made_in_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    found = next(module.disk(tmp_path / "file" / below))
    assert (found.level, found.seen) == ("wrong", f"cannot be written: {tmp_path / 'file'} is a file")


def test_this_machine(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    module.doctor(str(tmp_path), json=True)
    found = {f["what"]: f for f in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found["torch"]["level"] == "ok"
    assert found["attention kernels"]["level"] == "ok"
    assert found["disk of the runs"]["seen"].endswith(str(tmp_path))
    assert all(f["mend"] for f in found.values() if f["level"] == "wrong")
