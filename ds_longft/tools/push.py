"""`ds-longft push RUN REPO`: a run's result, its card and its report on a model hub."""

from __future__ import annotations

import json as json_text
import tempfile
from pathlib import Path

from ds_longft.config.run_config import HubConfig
from ds_longft.errors import ConfigError
from ds_longft.tools.report.run_facts import gather_facts
from ds_longft.train.hub import ready, upload


def push(
    run: str, repo: str, *, merged: bool = False, base: str | None = None, public: bool = False, json: bool = False
) -> None:
    """Upload the adapter or model of a run to a hub, with its card and its report, in one commit.

    The login is huggingface_hub's: `hf auth login`, or HF_TOKEN. The repository is made where it is not there.

    Args:
        run: output folder of a finished run, or a folder that `export` made.
        repo: where to, e.g. me/mine.
        merged: merge the adapter into its base first, and upload an ordinary model.
        base: the base model for this, where it has moved since the run.
        public: make a new repository public. An existing one stays as it is.
        json: print one JSON object with the commit's address.
    """
    from ds_longft.tools.report.command import write_report

    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"RUN {run}: no such folder")
    hub = HubConfig(repo=repo, private=not public)
    ready(hub)
    if (folder / "metrics.jsonl").is_file():
        write_report(gather_facts(folder), folder / "report.html")
    if merged:
        from ds_longft.tools.export import export_model

        with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as work:
            export_model(folder, Path(work) / "model", base)
            address = upload(Path(work) / "model", repo, "merged model", card_of=folder)
    else:
        address = upload(folder, repo, "result of the run")
    print(json_text.dumps({"commit": address}) if json else address)
