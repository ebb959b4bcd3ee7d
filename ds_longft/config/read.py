"""Where a run config comes from: defaults < YAML file (`mine.yaml`) < command line (`--a.b value`).

pydantic-settings reads the command line and yields only what was given; that is laid over the YAML, and the whole is
validated once, so that one failed start names every mistake. Nothing here touches torch, a model or the network.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, CliUnknownArgs, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from ds_longft.config.messages import all_keys, dotted, expectation, keys_beside, validation_problems
from ds_longft.config.other_trainers import meant_key, trainer_of, unknown_key
from ds_longft.config.rules import contradictions
from ds_longft.config.run_config import EACH_KEY_ALONE, RunConfig
from ds_longft.config.shipped import find_file
from ds_longft.config.yaml_io import dump_yaml, load_yaml
from ds_longft.errors import ConfigError

EPILOG = """\
example:
  deepspeed launch/train.py recipes/sft_lora_128k.yaml \\
      --model.path Qwen/Qwen3-8B --data.train my.jsonl --data.max_length_tokens 128K --sp 8

Values: 128K and 1M count tokens (1024-based), null switches off (--lora null), lists are comma separated.
Of a key given twice the last counts.
Every key may also stand in the YAML file, nested: `data: {max_length_tokens: 128K}`.
"""


Problems = dict[str, str | None]
"""Text of each problem -> the key whose value it leaves unknown (EVERY_KEY: of all keys, None: of no key).

A problem found later that reads such a key is not reported: it would be about the default in the key's place.
"""
EVERY_KEY = ""


class CommandLine(BaseSettings, RunConfig):
    """Train one run."""

    model_config = SettingsConfigDict(cli_parse_none_str="null")

    config: str | None = None
    """YAML run config, as `mine.yaml` alone. Keys given on the command line win over it."""

    local_rank: int | None = Field(default=None, validation_alias=AliasChoices("local_rank", "local-rank"))
    """Added by the deepspeed launcher; the environment variable LOCAL_RANK is what counts."""

    unrecognised: CliUnknownArgs


def load_run_config(
    keys: str | Sequence[str] = (), preflight: Callable[[RunConfig], object] | None = None
) -> RunConfig:
    """The run config of a file, or of a command line such as `["mine.yaml", "--train.max_steps", "5"]`.

    `--help` prints every key and ends the process with 0. Raises ConfigError (exit 64) with every problem found:
    unreadable file, unknown keys with the nearest known one, values of the wrong type or range, keys that contradict.
    Where there are any, `preflight` is called too, with the keys that are right: the problems it raises stand beside
    them. A config without a problem is returned without calling it. Of another trainer's file only that is said.
    """
    given, problems = _read_command_line([keys] if isinstance(keys, str) else list(keys))
    path = given.pop("config", None)
    given.pop("local_rank", None)
    from_file: dict[str, Any] = {}
    if path is not None:
        try:
            content = read_config_file(Path(path))
            if no_words := _keys_that_are_no_words(content):
                raise ConfigError([f"{path}: {text}, expected a word" for text in no_words])
            from_file = content
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems, EVERY_KEY)
    try:
        return _validate(_deep_merge(from_file, given), problems, preflight)
    except ConfigError as error:
        whose, marks = trainer_of(from_file)
        if marks < 2 or isinstance(from_file.get("model"), dict):
            raise
        raise ConfigError(
            f"this looks like a config of {whose}: ds-longft migrate {path} --out mine.yaml carries it over "
            f"(as it is: {len(error.problems)} problems)"
        ) from None


def config_of_run(folder: Path) -> RunConfig:
    """What a run wrote about itself. It ran: rules across keys that came later do not count. Raises ConfigError."""
    try:
        return RunConfig.model_validate(read_config_file(folder / "config.yaml"), context=EACH_KEY_ALONE)
    except ValidationError:
        return load_run_config(str(folder / "config.yaml"))  # which says what is wrong


def read_config_file(path: Path) -> dict[str, Any]:
    """The YAML file as nested dicts, not yet validated. Raises ConfigError: missing, bad YAML, repeated keys.

    A relative path that does not exist here is looked for among the shipped files (recipes/...).
    """
    try:
        content = load_yaml(find_file(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__} at its top, expected `key: value` lines")
    return content


def dump_config(config: RunConfig) -> str:
    """Every key of the config as YAML; reading it back gives an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_chosen(config: RunConfig) -> str:
    """The keys that differ from their defaults as YAML, each below a line on what it is; equal when read back."""
    return "".join(_chosen(config, ""))


def _chosen(section: BaseModel, indent: str) -> Iterator[str]:
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), field.get_default(call_default_factory=True)
        if value == default:
            continue
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:\n"
            of_it = "".join(_chosen(value, f"{indent}  "))
            yield of_it or f"{indent}  {{}}\n"  # a section that is null by default
            continue
        if isinstance(value, list) and all(isinstance(one, BaseModel) for one in value):  # data.train: paths, mostly
            sources = [one.model_dump(mode="json", exclude_defaults=True) for one in value]
            values[name] = [one["path"] if list(one) == ["path"] else one for one in sources]
        about = " ".join((field.description or "").split()).partition(". ")[0].removesuffix(".")
        yield textwrap.indent(f"# {about}\n{dump_yaml({name: values[name]})}", indent)


def _keys_that_are_no_words(content: Any, path: tuple[int | str, ...] = ()) -> list[str]:
    """`1: 2` has a number for a key, which no section has and no message could name."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    where, texts = f" of {dotted(path)}" if path else "", []
    for key, value in items:
        if isinstance(content, dict) and not isinstance(key, str):
            texts.append(f"key {'null' if key is None else str(key).lower()}{where} is no text")
        else:
            texts += _keys_that_are_no_words(value, (*path, key))
    return texts


def _read_command_line(argv: list[str]) -> tuple[dict[str, Any], Problems]:
    """What was given, nested and not yet validated, and the problems of reading it."""
    try:
        given = _command_line()(args=argv)()
    except SettingsError as error:
        key, problem = _unreadable(str(error))
        rest = _without_flag(argv, key)
        if rest == argv:
            return {}, {problem: EVERY_KEY}
        given, problems = _read_command_line(rest)
        return given, {problem: key, **problems}
    unknown, words = _unrecognised(given.pop("unrecognised", []))
    problems = unknown | _half_null_problems(given, argv)
    for word in words:
        if "config" not in given and (word.endswith((".yaml", ".yml")) or find_file(word).is_file()):
            given["config"] = word
        else:
            problems[f"{word!r} on the command line belongs to no key: write --key value, or one FILE.yaml"] = None
    if sum(word.split("=")[0] == "--config" for word in argv) > 1:  # of the first one nothing would be left
        problems["--config is given twice on the command line: one file holds a run's keys"] = EVERY_KEY
    return given, problems


@cache  # a tenth of a second, and a report or a test reads many configs
def _command_line() -> CliSettingsSource[Any]:
    source = CliSettingsSource[Any](CommandLine, cli_ignore_unknown_args=True, cli_exit_on_error=False)
    source.root_parser.usage = "deepspeed launch/train.py [FILE.yaml] [--key value ...]"
    source.root_parser.epilog = EPILOG
    return source


def _unreadable(message: str) -> tuple[str, str]:
    """The key of a value that the command-line library could not take apart, and a text with what it expects."""
    match = re.search(r"argument --([\w.]+): |field \"([\w.]+)\"|encountered for ([\w.]+)", message)
    key = next(filter(None, match.groups()), None) if match else None
    if key is None or key not in all_keys():
        return EVERY_KEY, message
    what = "no value given" if "expected one argument" in message else "value cannot be read"
    return key, f"{key}: {what} on the command line, expected {expectation(key)}"


def _without_flag(argv: list[str], key: str) -> list[str]:
    """The command line without a flag and its value."""
    kept, is_value = [], False
    for word in argv:
        is_flag = word.split("=")[0] == f"--{key}"
        is_value = is_value and not word.startswith("--")
        if not is_flag and not is_value:
            kept.append(word)
        is_value = is_flag and "=" not in word
    return kept


def _unrecognised(arguments: list[str]) -> tuple[Problems, list[str]]:
    """One problem for each flag nobody knows, and the words; one right behind such a flag is taken for its value."""
    problems: Problems = {}
    words, behind_flag = [], False
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.split("=")[0].lstrip("-")
            problems[unknown_key(key, all_keys())] = meant_key(key, all_keys())
        elif not behind_flag:
            words.append(argument)
        behind_flag = argument.startswith("-") and "=" not in argument
    return problems, words


def _half_null_problems(given: dict[str, Any], argv: list[str]) -> Problems:
    """Sections that the command line switches off and gives keys of; the library lets null win without a word."""
    return {
        f"{key} is null and {word.split('=')[0]} is given on the same command line: leave one of them out": key
        for key, value in given.items()
        for word in argv
        if value is None and word.startswith(f"--{key}.")
    }


def _validate(
    content: dict[str, Any], problems: Problems, preflight: Callable[[RunConfig], object] | None
) -> RunConfig:
    """Validate each key alone, then the rules across keys, but for rules that read a wrong key."""
    try:
        config = RunConfig.model_validate(content, context=EACH_KEY_ALONE)
    except ValidationError as error:
        unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
        for loc in unknown:
            key, known = dotted(loc), [*keys_beside(loc), *all_keys()]
            problems[unknown_key(key, known)] = meant_key(key, known)
        # Of a list with a wrong entry nothing is kept.
        wrong = {text: key.split("[")[0] for key, text in validation_problems(error, content).items()}
        problems |= wrong
        rest = _without(content, [*unknown, *(tuple(key.split(".")) for key in wrong.values())])
        try:
            config = RunConfig.model_validate(rest, context=EACH_KEY_ALONE)
        except ValidationError:  # there is no run behind it, e.g. a top-level key that is a number
            raise ConfigError(list(problems)) from None
    together = contradictions(config)
    if preflight is not None and (problems or together):
        try:
            preflight(config)
        except ConfigError as error:
            together += error.problems
    found = [*problems, *(p for p in together if not any(_goes_by(p, key) for key in problems.values()))]
    if found:
        raise ConfigError(found)
    return config


def _goes_by(problem: str, key: str | None) -> bool:
    """Whether the text names the key, or one below it."""
    return key is not None and (key == EVERY_KEY or bool(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", problem)))


def _deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: sections merge key by key, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _deep_merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _without(content: Any, unknown: list[tuple[int | str, ...]]) -> Any:
    """A copy of the nested content that lacks the entries at these places."""
    if not isinstance(content, list | dict):
        return content
    items: Any = content.items() if isinstance(content, dict) else enumerate(content)
    kept = {
        key: _without(value, [loc[1:] for loc in unknown if loc[0] == key and len(loc) > 1])
        for key, value in items
        if (key,) not in unknown
    }
    return list(kept.values()) if isinstance(content, list) else kept


def _one_line(error: yaml.YAMLError) -> str:
    """`line 3, column 5: what is wrong` of a YAML error."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else " ".join(problem.split())
