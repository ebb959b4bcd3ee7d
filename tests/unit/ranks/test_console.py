"""What libraries say in every run is silenced by its words, and nothing else."""

from __future__ import annotations

import warnings

import pytest

from ds_longft.ranks.console import quiet_libraries


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("Argument aux_data (position 17) cannot be converted to a JitArgument for function 'flash_fwd_sm90'.", False),
        ("Argument mask (position 3) cannot be converted to a JitArgument for function 'flash_fwd_sm90'.", True),
        ("barrier(): using the device under current context. You can specify `device_id`", False),
        ("barrier(): no device was set", True),
    ],
)
def test_warnings_that_no_user_can_act_on(text: str, heard: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn(text, UserWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == [text] * heard
