"""Can the config of a hub id be had at all? One attempt, before transformers makes six for each of its files."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ds_longft.errors import ModelError

PATIENCE_S = 5.0


def check_reach(path: str, revision: str | None = None) -> None:
    """Raises ModelError: a hub id whose config is not in the cache, and no hub answers. Retries took 60 s to say so."""
    if not path or Path(path).expanduser().exists() or path.startswith((".", "/", "~")):
        return
    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision), timeout=PATIENCE_S)
    except (HfHubHTTPError, HFValidationError):
        return  # an answer, or no id: transformers says what of it is wrong
    except Exception as error:  # of the HTTP library, which changes with the hub's version
        raise ModelError(
            f"model.path: {path} is no local folder, its config is not in the hub's cache, and the hub does not answer "
            f"({type(error).__name__}: {error}): run `hf download {path}` where there is a network, or give a local "
            "folder; with HF_HUB_OFFLINE=1 the cache alone is used"
        ) from None
