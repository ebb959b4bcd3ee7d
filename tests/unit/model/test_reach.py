"""A hub that does not answer is asked once, and the message names the cures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_longft.errors import ModelError
from ds_longft.model import reach


def test_no_network_is_said_after_one_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def no_network(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(reach, "get_hf_file_metadata", no_network)
    with pytest.raises(ModelError, match=r"`hf download org/none`.*local folder.*HF_HUB_OFFLINE=1"):
        reach.check_reach("org/none")
    assert len(asked) == 1
    reach.check_reach(str(tmp_path))
    monkeypatch.setattr(reach, "try_to_load_from_cache", lambda *_, **__: "config.json")
    reach.check_reach("org/none")
    assert len(asked) == 1, "neither for a folder nor for what is in the cache"
