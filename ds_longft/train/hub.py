"""Uploads a run's result to a model hub through huggingface_hub.

The token is huggingface_hub's business (HF_TOKEN, or its login): it is never read here, and a file that holds it, or
any other secret of the environment, is not uploaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_longft.config.run_config import HubConfig
from ds_longft.errors import ConfigError
from ds_longft.train.secrets import redact

OF_MODEL = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|base_config/.*\.json|config\.json|generation_config\.json|"
    r"model.*\.(safetensors|safetensors\.index\.json)|(tokenizer|special_tokens|added_tokens|vocab|merges).*|"
    r"chat_template\.(jinja|json)|(|pre|video_pre)processor_config\.json"
)
_OF_RUN = re.compile(r"README\.md|report\.(html|md)|loss\.png|metrics\.jsonl")
_TEXT = {".json", ".jsonl", ".md", ".html", ".jinja", ".txt"}


def files_of(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of what a run or an exported model has to show; no checkpoint, no config.yaml."""
    inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and len(p.relative_to(folder).parts) <= 2]
    named = {p.relative_to(folder).as_posix(): p for p in inside}
    return {name: p for name, p in named.items() if OF_MODEL.fullmatch(name) or _OF_RUN.fullmatch(name)}


def hub_id(base: str) -> str | None:
    """`Qwen/Qwen3-8B` of that id, or of its folder in the hub's cache; None of any other folder."""
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", base)
    return "/".join(cached.groups()) if cached else None if Path(base).is_absolute() else base


def named_elsewhere(base: str) -> str:
    """A base model as readers on other machines may know it: nobody else has the folders of this one."""
    return hub_id(base) or Path(base).name


def for_others(text: str, base: str) -> str:
    """A text without this machine's folders: the base by the name that others know, the home folder as `~`."""
    return text.replace(base or "\0", named_elsewhere(base)).replace(f"{Path.home()}/", "~/")


def card_for(text: str, folder: Path, repo: str) -> str:
    """The model card, told from the repository and not from this machine."""
    base_config = f"{str(folder / 'base_config')!r}"
    text = text.replace(base_config, f"{repo!r}, subfolder='base_config'").replace(repr(str(folder)), repr(repo))
    return text.replace(f"ds-longft export {folder} {folder}-merged", f"ds-longft export {repo} merged")


def ready(hub: HubConfig) -> None:
    """Make the repository where it is not there. Raises ConfigError: no token, or no right to write there."""
    _asked(hub.repo, lambda api: api.create_repo(hub.repo, private=hub.private, exist_ok=True))


def upload(folder: Path, repo: str, message: str, *, card_of: Path | None = None) -> str:
    """One commit with the result in `folder`; returns its address.

    `card_of`: the run whose card and report go with it, where they are not in the folder.

    Raises:
        ConfigError: nothing to upload, a secret in a file, no right to write there, or no connection.
    """
    from huggingface_hub import CommitOperationAdd

    files = files_of(folder)
    if not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(f"{folder} holds no adapter and no model: give the output_dir of a finished run")
    if card_of is not None:
        files = {name: path for name, path in files_of(card_of).items() if _OF_RUN.fullmatch(name)} | files
    adapter = (card_of or folder) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else ""
    operations = []
    for name, path in files.items():
        content = path.read_bytes()
        if path.suffix in _TEXT:
            text = content.decode("utf-8", "replace")
            if redact(text) != text:
                raise ConfigError(f"{path} holds a login or a secret of the environment: take it out, it stays here")
            if name == "README.md":
                text = card_for(text, path.parent, repo)
            if name == "adapter_config.json" or _OF_RUN.fullmatch(name):
                content = for_others(text, base).encode()
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    done = _asked(repo, lambda api: api.create_commit(repo, operations, commit_message=message))
    return str(done.commit_url)


def _asked(repo: str | None, work: Callable[[Any], Any]) -> Any:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return work(HfApi())
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        first = next(iter(redact(str(error)).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"hub.repo {repo}: {first}. Expected a repository that you may write to: log in with `hf auth login`, or "
            "set HF_TOKEN in the environment"
        ) from None  # what is behind it may show the token


class Pusher:
    """Uploads in the background: training never waits for the hub, and a failed upload never ends it."""

    def __init__(self, hub: HubConfig, say: Callable[[str], None]) -> None:
        self.hub, self.say = hub, say
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hub")
        self._last: Future[None] | None = None

    def after_save(self, checkpoint: Path) -> None:
        """Upload the adapter of a checkpoint, unless the one before is still on its way."""
        if self._last is None or self._last.done():
            self._last = self._worker.submit(self._upload, checkpoint, checkpoint.name)

    def finish(self, folder: Path) -> None:
        """Upload the result, and wait for it."""
        self._worker.submit(self._upload, folder, "result of the run").result()
        self._worker.shutdown()

    def _upload(self, folder: Path, message: str) -> None:
        assert self.hub.repo is not None
        try:
            self.say(f"uploaded {folder.name}: {upload(folder, self.hub.repo, message)}")
        except ConfigError as error:
            self.say(f"NOT UPLOADED: {'; '.join(error.problems)}")
        except Exception as error:
            self.say(f"NOT UPLOADED: {redact(f'{type(error).__name__}: {error}')}")
