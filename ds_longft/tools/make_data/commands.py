"""What `ds-longft data convert|mix` do: from published sets to the rows that are trained on."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig, ModelConfig
from ds_longft.config.yaml_io import dump_yaml
from ds_longft.data.formats import FORMATS
from ds_longft.data.ledger import Tally
from ds_longft.data.preferences import PREFERENCE
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import ConfigError, LongftError
from ds_longft.tools.look.commands import load_tokenizer, show, write_page
from ds_longft.tools.look.cost import equal_cost_tokens
from ds_longft.tools.look.statistics import statistics
from ds_longft.tools.make_data.convert import convert_set
from ds_longft.tools.make_data.mix import Mixed, mix_sources
from ds_longft.tools.make_data.recipe import read_recipe


def convert(
    source: str,
    out: str,
    *,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    name: str | None = None,
    max_bad_fraction: float = 0.01,
    json: bool = False,
) -> None:
    """Turn a published set into rows that every other command takes: messages, plain text, or preference pairs.

    Known by their columns: LongAlign, LongAlpaca and alpaca, RefGPT-Fact (and -8x), anti-haystack, Fusang and ShareGPT,
    messages, prompt and completion, reading comprehension, plain text; orca, ultrafeedback-binarized, truthy-dpo and
    Chinese-dpo-pairs become pairs {prompt, chosen, rejected}. Rows that cannot be used are listed in OUT.ledger.jsonl.

    Args:
        source: a JSON, JSONL or parquet file (.gz too), a folder of them, or a hub id.
        out: JSONL file to write.
        format: row layout, where the first row's columns do not tell.
        split: split of a hub set, or the name of one of its configurations.
        limit: take only the first N rows.
        name: written to each row as its source. Left out: the name of the source.
        max_bad_fraction: fail when more than this share of the rows is unusable.
        json: print one JSON object instead of a line.
    """
    if format not in ("auto", PREFERENCE, *FORMATS):
        raise ConfigError(f"--format is {format!r}: expected auto, {PREFERENCE}, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}: expected 1 or more")
    config = SourceConfig(path=source, split=split, limit=limit).model_copy(update={"format": format})
    done = convert_set(config, out, name=name or _stem(source), max_bad_fraction=max_bad_fraction, progress=not json)
    if json:
        print(json_text.dumps(asdict(done)))
        return
    languages = ", ".join(f"{count:,} {code}" for code, count in sorted(done.languages.items()))
    print(f"{done.path}: {done.tally.usable:,} {done.format} rows ({languages})")
    if done.tally.unusable_rows:
        print(f"{done.ledger}: {reasons(done.tally)}")
    if remark := done.tally.unused_remark():
        print(remark)


def mix(
    recipe: str,
    out: str,
    *,
    root: str | None = None,
    tokenizer: str | None = None,
    max_length_tokens: int | str | None = None,
    total_rows: int | None = None,
    seed: int | None = None,
    json: bool = False,
) -> None:
    """Make a training set out of many sources: shares, languages, lengths, near duplicates, held-out texts.

    Writes OUT/train.jsonl, eval.jsonl, ledger.jsonl and mix.json. With a tokenizer it goes on to the end: the sets are
    tokenized, OUT/run.yaml is a run config for them, and OUT/stats.html shows what a run will see, packs included.

    Args:
        recipe: YAML file; recipes/faro.yaml comes with the package.
        out: folder to write.
        root: where relative paths of the recipe are looked for, and files named like its sources (NAME.jsonl, ...).
        tokenizer: model folder or hub id to count lengths with. Left out: the recipe's; else they are estimated.
        max_length_tokens: longest row instead of the recipe's, e.g. 128K; its last band of lengths ends there.
        total_rows: rows of the mix instead of the recipe's.
        seed: instead of the recipe's.
        json: print one JSON object instead of tables.
    """
    found = read_recipe(
        recipe, tokenizer=tokenizer, seed=seed, max_length_tokens=max_length_tokens, total_rows=total_rows
    )
    if root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"--root is {root}: there is no such folder")
    loaded = load_tokenizer(found.tokenizer) if found.tokenizer else None
    folder = Path(out)
    below = Path(root).expanduser() if root is not None else None
    mixed = mix_sources(found, folder, tokenizer=loaded, root=below, progress=not json)
    if not json:
        _show_mixed(mixed)
    if loaded is not None and found.tokenizer is not None:
        run: dict[str, Any] = {
            "output_dir": f"runs/{folder.resolve().name}",
            "model": {"path": found.tokenizer, **_stretch(found.tokenizer, found.max_length_tokens)},
            "data": {
                "train": [{"path": str(Path(mixed.train).resolve())}],
                "eval": [{"path": str(Path(mixed.eval).resolve())}] if mixed.eval else [],
                "max_length_tokens": found.max_length_tokens,
            },
        }
        (folder / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
        data = DataConfig.model_validate(run["data"])
        rows = tokenize_sources(data.train, loaded, data, progress=not json)
        cost = equal_cost_tokens(ModelConfig(path=found.tokenizer), lora=True)
        numbers = statistics(rows, data, dp=1, sp=1, accumulation=1, seed=0, equal_cost_tokens=cost)
        write_page(numbers, str(folder / "stats.html"), title="Training data", note=f"mixed by {recipe}")
        if not json:
            show(numbers)
            print(f"{folder}/stats.html shows it all; train on it: ds-longft train {folder}/run.yaml")
    if json:
        print(json_text.dumps(asdict(mixed)))


def _stem(source: str) -> str:
    """my/set.jsonl.gz -> set, THUDM/LongAlign-10k -> LongAlign-10k."""
    name = Path(source).name
    for suffix in (".gz", ".jsonl", ".ndjson", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return name


def reasons(tally: Tally) -> str:
    """How many rows were left out, and why, a line a reason."""
    return f"{tally.unusable_rows:,} of {tally.read:,} rows left out{tally.reasons()}"


def _stretch(model: str, max_length_tokens: int) -> dict[str, Any]:
    """What a run config says of a model whose window is shorter than the rows."""
    from ds_longft.model.read_model import read_config
    from ds_longft.model.rope import window_tokens

    try:
        window = window_tokens(read_config(ModelConfig(path=model)))
    except LongftError:  # a tokenizer alone
        return {}
    return {"rope": {"type": "yarn"}} if window and max_length_tokens > window else {}


def _show_mixed(mixed: Mixed) -> None:
    table = Table("of", "is", "there", "wanted", "taken", "share", "held out")
    last = mixed.kinds[0]["of"]
    for kind in mixed.kinds:
        if kind["of"] != last:
            table.add_section()
            last = kind["of"]
        used_up = " (all)" if kind["rows"] == kind["pool"] else ""
        table.add_row(
            kind["of"],
            Text(kind["is"]),
            f"{kind['pool']:,}",
            "" if kind["wanted"] is None else f"{kind['wanted']:.1%}",
            f"{kind['rows']:,}{used_up}",
            f"{kind['share']:.1%}",
            f"{kind['held_out']:,}",
        )
    Console().print(table)
    about = "" if mixed.exact_lengths else " (estimated)"
    print(f"{mixed.train}: {mixed.train_rows:,} rows; held out: {mixed.eval_rows:,}; {mixed.tokens:,} tokens{about}")
    for reason, count in mixed.left_out.items():
        print(f"  left out: {count:,} x {reason}, first {mixed.first_left_out[reason]} ({mixed.ledger})")
