"""A command's function as a command line: its signature gives flags and choices, its docstring the help (argparse).

Every mistake on a command line is listed at once, before the command runs. A help imports nothing of the command:
signature and docstring are read from the source.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ds_longft.errors import ConfigError, LongftError

RunKeys = str | tuple[str, ...]
"""A run config: a YAML file, or the words of a command line, `("mine.yaml", "--data.max_length_tokens", "32K")`."""

_NO_VALUE = "\0"
_NUMBER = re.compile(r"-\.?\d.*")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LongftError(f"{self.prog}: {message}")


class _Formatter(argparse.HelpFormatter):
    """Paragraphs are filled, lines that are indented stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(p if "\n  " in f"\n{p}" else textwrap.fill(p, width) for p in paragraphs)


def help_of(target: str, name: str, example: str) -> str:
    """The help of "module:function"."""
    parser = _parser(described(target), name, shown=True)
    parser.epilog = f"example:\n  {name} {example}" if example else None
    return parser.format_help()


def call(function: Callable[..., Any], name: str, argv: list[str]) -> int:
    """Call the function with a command line's arguments; returns its exit code. Raises LongftError for mistakes."""
    bound = bind(function, name, argv)
    return function(*bound.args, **bound.kwargs) or 0


def bind(function: Callable[..., Any], name: str, argv: list[str]) -> inspect.BoundArguments:
    """The arguments of the function, each of its type.

    A parameter without a default, and the first one, takes a word (`RUN`) or a flag (`--run RUN`); all others are
    flags. `RunKeys` take the words and flags that belong to nothing else. Raises LongftError with every mistake: flags
    that do not exist (and the nearest that does), values of another type, arguments missing or one too many.
    """
    parameters = _parameters(function)
    given = [_underscored(word, parameters) for word in argv]
    parsed, rest = _parser(function, name, shown=False).parse_known_args(given)
    texts: dict[str, Any] = vars(parsed)
    problems = []
    keys = [p.name for p in parameters.values() if p.annotation == RunKeys]
    flags, words = _unknown(rest)
    for flag in flags:
        close = difflib.get_close_matches(flag.lstrip("-"), parameters, n=1, cutoff=0.75 if keys else 0.6)
        if not keys or (close and not _is_run_key(flag)):
            known = ", ".join(f"--{p}" for p in parameters)
            problems.append(f"no flag {flag}: " + (f"did you mean --{close[0]}?" if close else f"known are {known}"))
    if keys:
        texts[keys[0]] = (*((texts[keys[0]],) if keys[0] in texts else ()), *rest)
    else:
        free = [p.name for p in parameters.values() if _is_word(p, parameters) and p.name not in texts]
        texts |= zip(free, words, strict=False)
        more = words[len(free) :]
        if variable := [p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL]:
            texts[variable[0]] = more
        else:
            problems += [f"argument {word!r} is one too many: it takes {_usage(parameters)}" for word in more]
    problems += [
        f"{p.name.upper()} is missing: it takes {_usage(parameters)}"
        for p in parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in texts
    ]
    values = {}
    for key, text in texts.items():
        values[key], problem = _value(parameters[key], text)
        problems += [f"--{key}{problem}"] if problem else []
    if problems:
        raise LongftError("\n".join(f"{name}: {problem}" for problem in problems))
    bound = inspect.BoundArguments(inspect.signature(function), {})
    for p in inspect.signature(function, eval_str=True).parameters.values():
        if is_dataclass(p.annotation):
            shared = {field.name: values[field.name] for field in fields(p.annotation) if field.name in values}
            bound.arguments[p.name] = replace(p.default, **shared)
        elif p.name in values:
            bound.arguments[p.name] = values[p.name]
    return bound


def as_words(arguments: dict[str, Any]) -> list[str]:
    """Arguments as the words of a command line, for a process that is started with them."""
    words = [word for value in arguments.values() if isinstance(value, tuple) for word in value]
    flags = {key: value for key, value in arguments.items() if not is_dataclass(value) and not isinstance(value, tuple)}
    for shared in filter(is_dataclass, arguments.values()):
        flags |= vars(shared)
    given = {key: value for key, value in flags.items() if value is not None and value is not False}
    return [*words, *(f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items())]


def tokens_of(flag: str, value: int | str) -> int:
    """`128K` -> 131072. Raises ConfigError for what is no positive count."""
    from ds_longft.config.section import parse_tokens  # brings pydantic, which a help should not wait for

    tokens = parse_tokens(value)
    if isinstance(tokens, str) and tokens.strip().isdigit():
        tokens = int(tokens)
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"{flag} is {value!r}: expected a number of tokens, e.g. 4096 or 128K")
    return tokens


def described(target: str) -> Callable[..., Any]:
    """A function with the signature and docstring of "module:function", read from the source: importing the module may
    take seconds (torch), and its help needs none of it.
    """
    module, _, name = target.partition(":")
    origin, tree = _source_of(module)
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    found.body, found.decorator_list = found.body[:1], []  # the docstring
    namespace = _Constants(module, tree)
    as_text = annotations.compiler_flag
    exec(compile(ast.Module([found], []), origin, "exec", as_text, dont_inherit=True), {}, namespace)
    function: Callable[..., Any] = namespace[name]
    function.__annotations__ = {key: eval(text, {}, namespace) for key, text in function.__annotations__.items()}
    return function


class _Constants(dict[str, Any]):
    """What a module's defaults and annotations name, read from the source, its own or where it imports them from."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__()
        self.module, self.tree = module, tree

    def __missing__(self, name: str) -> Any:
        for node in self.tree.body:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=found)], value=ast.expr() as value)
                    | ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value)
                ) if found == name:
                    try:
                        code = compile(ast.Expression(value), self.module, "eval", dont_inherit=True)
                        return eval(code, {}, self)
                    except Exception:  # it is computed
                        return getattr(importlib.import_module(self.module), name)
                case ast.ClassDef(name=found) if found == name:
                    return getattr(importlib.import_module(self.module), name)
                case ast.ImportFrom(module=str(source), names=names):
                    for alias in (alias for alias in names if name == (alias.asname or alias.name)):
                        if source.startswith("ds_longft"):
                            return _Constants(source, _source_of(source)[1])[alias.name]
                        return getattr(importlib.import_module(source), alias.name)
        raise KeyError(name)


def _source_of(module: str) -> tuple[str, ast.Module]:
    """(file, parsed source) of a module that is not imported for it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin, ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _parser(function: Callable[..., Any], name: str, *, shown: bool) -> _Parser:
    """The parser of a function's flags. One that is to be `shown` also names the words it takes.

    Words are told apart by `bind`: argparse would take the value of an unknown flag for one of them.
    """
    parameters = _parameters(function)
    about, texts = _docstring(function)
    parser = _Parser(
        prog=name, usage=f"{name} {_usage(parameters)} [options]", description=about, formatter_class=_Formatter,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    words, options = parser.add_argument_group("arguments"), parser.add_argument_group("options")
    for p in parameters.values():
        text = texts.get(p.name, "").replace("%", "%%")
        if shown and (_is_word(p, parameters) or p.kind is p.VAR_POSITIONAL):
            words.add_argument(p.name.upper(), help=text)
            continue
        if p.kind is p.VAR_POSITIONAL:
            continue
        flag = f"--{p.name}"
        if p.annotation is bool:
            options.add_argument(flag, help=text, action="store_true", default=argparse.SUPPRESS)
        elif shown:
            options.add_argument(flag, help=_with_default(p, text), metavar=_metavar(p))
        else:
            options.add_argument(flag, nargs="?", const=_NO_VALUE, default=argparse.SUPPRESS)
    if shown:
        options.add_argument("-h", "--help", action="store_true", help="show this help")
    return parser


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function; of one that is a dataclass, the fields of it: flags that commands share."""
    found = {}
    for p in inspect.signature(function, eval_str=True).parameters.values():
        if not is_dataclass(p.annotation):
            found[p.name] = p
            continue
        kinds = get_type_hints(p.annotation)
        for name, default in vars(p.default).items():
            found[name] = inspect.Parameter(name, p.KEYWORD_ONLY, default=default, annotation=kinds[name])
    return found


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(what it does, parameter -> its text) of docstrings in Google's style: the function's, and those of the
    dataclasses that it takes flags from.
    """
    kinds = [p.annotation for p in inspect.signature(function, eval_str=True).parameters.values()]
    bases: list[Any] = [base for kind in kinds if is_dataclass(kind) for base in reversed(kind.mro()[:-1])]  # type: ignore[union-attr]
    texts: dict[str, str] = {}
    for documented in (function, *bases):
        _, _, rest = (inspect.getdoc(documented) or "").partition("\nArgs:\n")
        entries = re.split(r"^ {4}(\w+): ", rest.partition("\n\n")[0], flags=re.MULTILINE)[1:]
        texts |= {key: " ".join(text.split()) for key, text in zip(entries[::2], entries[1::2], strict=True)}
    return (inspect.getdoc(function) or "").partition("\nArgs:\n")[0], texts


def _usage(parameters: Any) -> str:
    """The words a command takes, `RUN [OUT]`."""
    words = []
    for p in parameters.values():
        if p.annotation == RunKeys:
            words.append(f"{p.name.upper() if p.default is p.empty else f'[{p.name.upper()}]'} [--key value ...]")
        elif p.kind is p.VAR_POSITIONAL:
            words.append(f"[{p.name.upper()} ...]")
        elif _is_word(p, parameters):
            words.append(p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]")
    return " ".join(words)


def _is_word(p: inspect.Parameter, parameters: Any) -> bool:
    """Whether the parameter may stand as a word, without its flag."""
    is_first = next(iter(parameters)) == p.name and p.annotation is not bool
    return p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or is_first)


def _metavar(p: inspect.Parameter) -> str:
    """What stands behind a flag in the help: its choices, N for a number, else its name."""
    kinds = [kind for kind in get_args(p.annotation) or (p.annotation,) if kind is not NoneType]
    choices = [c for kind in (p.annotation, *kinds) if get_origin(kind) is Literal for c in get_args(kind)]
    if choices:
        return f"{{{','.join(map(str, choices))}}}"
    return {int: "N", float: "X"}.get(kinds[0] if len(kinds) == 1 else str, p.name.upper())


def _with_default(p: inspect.Parameter, text: str) -> str:
    told = p.default in (None, False, "", p.empty) or "eft out" in text or "default" in text
    return text if told else f"{text.removesuffix('.')} (default {p.default})"


def _underscored(word: str, parameters: Any) -> str:
    """`--max-tokens` as the flag it is."""
    flag, equals, value = word.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    return f"--{name}{equals}{value}" if flag.startswith("--") and name in parameters else word


def _unknown(rest: list[str]) -> tuple[list[str], list[str]]:
    """(flags, words) of what the parser left over; a word right behind an unknown flag is taken for its value."""
    flags, words, behind = [], [], False
    for word in rest:
        is_flag = word.startswith("-") and not _NUMBER.match(word) and word != "-"
        if is_flag:
            flags.append(word.partition("=")[0])
        elif not behind:
            words.append(word)
        behind = is_flag and "=" not in word
    return flags, words


def _is_run_key(flag: str) -> bool:
    from ds_longft.config.messages import all_keys

    return flag.lstrip("-") in (*all_keys(), "config")


def _value(p: inspect.Parameter, text: Any) -> tuple[Any, str]:
    """(value, "") of a flag's text, or (None, what is wrong with it)."""
    if text == _NO_VALUE:
        return None, " needs a value"
    if p.annotation in (str, str | None, bool) or p.kind is p.VAR_POSITIONAL:
        return text, ""
    if {int, str} <= set(get_args(p.annotation)) and text.isdecimal():
        return int(text), ""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(p.annotation).validate_python(text), ""
    except ValidationError as error:
        return None, f": seen {text!r}; {error.errors()[0]['msg']}"
