"""The `ds-longft` command: a table of subcommands, run by fire, with every argument checked before anything runs.

fire alone calls the function first and complains about a mistyped flag or a surplus argument afterwards.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from ds_longft.errors import EXIT_CONFIG, LongftError

HELP = """\
ds-longft: fine-tuning on very long samples, one sample split over many GPUs.

commands:
{commands}

`ds-longft COMMAND --help` explains one of them.

example, from your chats to a model:
  ds-longft config --model.path Qwen/Qwen3-8B --data.train my.jsonl --output_dir runs/mine > mine.yaml
  ds-longft data stats mine.yaml
  deepspeed launch/train.py --config mine.yaml
  ds-longft export runs/mine runs/mine-merged
"""

TRAIN = """\
Training runs on several processes, so a launcher starts it, with the same keys under each of them:
  deepspeed launch/train.py {keys}            one node, from a clone
  deepspeed --module ds_longft.train {keys}   one node, installed
  torchrun --nproc-per-node 8 launch/train.py {keys}
  srun python launch/train.py {keys}          one task a GPU

Without any key it trains a small real model on a small real job. `ds-longft config --help` lists every key,
`ds-longft config {keys}` shows what a run would use and finds mistakes.
"""


FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A subcommand; its module is imported only when it is asked for."""

    target: str  # "module:function"
    summary: str
    takes_run_keys: bool = False  # hands its arguments on as they are: --a.b value
    flags: tuple[str, ...] = ()  # that it always has


COMMANDS = {
    "data convert": Command("ds_longft.tools.make_data.commands:convert", "a published set to rows of one kind"),
    "data synth refgpt8x": Command(
        "ds_longft.tools.make_data.synth.commands:refgpt8x", "hide each dialogue's reference among near ones"
    ),
    "data synth needle": Command(
        "ds_longft.tools.make_data.synth.commands:needle", "questions about long texts, answers checked by program"
    ),
    "data synth code": Command(
        "ds_longft.tools.make_data.synth.commands:code", "long code questions from Python's own source"
    ),
    "data synth agents": Command(
        "ds_longft.tools.make_data.synth.commands:agents", "an agent's long way to an answer, by tools"
    ),
    "data synth stretches": Command(
        "ds_longft.tools.make_data.synth.text_commands:stretches", "long texts cut into plain rows of many lengths"
    ),
    "data mix": Command("ds_longft.tools.make_data.commands:mix", "a training set of many sources, by a recipe"),
    "data tokenize": Command("ds_longft.tools.look.commands:tokenize", "chats to token ids, once, into the cache"),
    "data stats": Command("ds_longft.tools.look.commands:stats", "lengths, targets, packs and padding of a data set"),
    "data inspect": Command("ds_longft.tools.look.commands:inspect", "show which tokens of a row are trained on"),
    "data ref_logps": Command(
        "ds_longft.tools.ref_logps:ref_logps", "a reference's log-probabilities of preference pairs, once", True
    ),
    "plan": Command("ds_longft.tools.plan.command:plan", "how long a sample fits, how fast it trains, as a recipe"),
    "verify": Command(
        "ds_longft.tools.verify.command:verify", "prove that your run trains what one process would", True
    ),
    "eval perplexity": Command(
        "ds_longft.tools.evaluate.perplexity:perplexity", "loss at every position of long texts, over several GPUs too"
    ),
    "eval needle": Command("ds_longft.tools.evaluate.needle:needle", "hide facts in long texts and ask for them"),
    "eval short": Command(
        "ds_longft.tools.evaluate.short:short", "short questions and texts: what long training must not harm"
    ),
    "eval longbench run": Command(
        "ds_longft.tools.evaluate.longbench.predictions:run", "answer LongBench or LongBench-E, and score"
    ),
    "eval longbench score": Command(
        "ds_longft.tools.evaluate.longbench.score:score", "score anyone's LongBench predictions"
    ),
    "report": Command("ds_longft.tools.report.command:report", "one self-contained page about a run"),
    "export": Command("ds_longft.tools.export:export", "a run's result as an ordinary Hugging Face folder"),
    "push": Command("ds_longft.tools.push:push", "a run's result, card and report to a model hub"),
    "slurm render": Command("ds_longft.tools.slurm.render:render", "the sbatch script of a run, filled and checked"),
    "slurm submit": Command("ds_longft.tools.slurm.render:render", "the same, handed to sbatch", flags=("--submit",)),
    "doctor": Command("ds_longft.tools.doctor:doctor", "is this machine fit for training, and how to mend what is not"),
    "migrate": Command(
        "ds_longft.tools.migrate:migrate", "a config of Axolotl, LLaMA-Factory, TRL or swift as one of ours"
    ),
    "config": Command("ds_longft.cli:show_config", "the resolved run config; --help lists every key", True),
    "train": Command("ds_longft.cli:show_train", "how to start a training run", True),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 64 for a mistake in what was asked."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except LongftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted: the same command uses what was finished (tokenised parts, evaluation rows)", file=sys.stderr
        )
        return 130


def show_config(*argv: str) -> None:
    """Print the run config that these arguments give, as YAML that `--config` reads back."""
    from ds_longft.config.read import dump_config, load_run_config

    print(dump_config(load_run_config(list(argv))), end="")


def show_train(*argv: str) -> None:
    """Print the launch commands for these run keys."""
    keys = " ".join(a for a in argv if a not in ("--help", "-h")) or "--config recipe.yaml"
    print(TRAIN.format(keys=keys), end="")


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(HELP.format(commands=_summaries(list(COMMANDS))), end="")
        return 0
    name = next((n for n in COMMANDS if argv[: len(n.split())] == n.split()), None)
    if name is None:
        return _no_such_command(argv)
    command = COMMANDS[name]
    rest = [*command.flags, *argv[len(name.split()) :]]
    if not command.takes_run_keys and {"--help", "-h"} & set(rest):
        _print_help(_described(command.target), f"ds-longft {name}")
        return 0
    module, _, attribute = command.target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if command.takes_run_keys:
        function(*rest)
        return 0
    return _run(function, f"ds-longft {name}", rest)


def _described(target: str) -> Callable[..., Any]:
    """A function with the signature and docstring of "module:function", read from the source: importing the module may
    take seconds (torch), and its help needs none of it.
    """
    module, _, name = target.partition(":")
    origin, tree = _source_of(module)
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    found.body, found.decorator_list = found.body[:1], []  # the docstring
    namespace = _Constants(module, tree)
    flags = annotations.compiler_flag  # they stay text, as everywhere here
    exec(compile(ast.Module([found], []), origin, "exec", flags, dont_inherit=True), {}, namespace)
    function: Callable[..., Any] = namespace[name]
    return function


class _Constants(dict[str, Any]):
    """The constants that a module's defaults name, read from the source, its own or where it imports them from."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__()
        self.module, self.tree = module, tree

    def __missing__(self, name: str) -> Any:
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name in [target.id for target in targets if isinstance(target, ast.Name)]:
                    try:
                        return ast.literal_eval(node.value)
                    except ValueError:  # it is computed
                        return getattr(importlib.import_module(self.module), name)
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _Constants(node.module, _source_of(node.module)[1])[alias.name]
        raise KeyError(name)


def _source_of(module: str) -> tuple[str, ast.Module]:
    """(file, parsed source) of a module that is not imported for it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin, ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _print_help(function: Callable[..., Any], name: str) -> None:
    from fire import helptext, trace

    text = helptext.HelpText(function, trace=trace.FireTrace(function, name=name))
    # -h is the help, also where fire takes it for the only flag with that letter
    print(text.replace(f"'{name}'", name).replace("    -h, --", "    --"))


def _summaries(names: list[str]) -> str:
    return "\n".join(f"  {name:<20} {COMMANDS[name].summary}" for name in names)


def _no_such_command(argv: list[str]) -> int:
    words = list(takewhile(lambda a: not a.startswith("-"), argv))
    group = [n for n in COMMANDS if words and n.split()[: len(words)] == words]
    if group and (argv == words or argv[len(words)] in ("--help", "-h")):
        print(f"ds-longft {' '.join(words)}:\n{_summaries(group)}")
        return 0
    asked = " ".join(a for a in argv[:2] if not a.startswith("-")) or argv[0]
    close = difflib.get_close_matches(asked, COMMANDS, n=1) or difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean `ds-longft {close[0]}`?" if close else "`ds-longft --help` lists the commands"
    print(f"ds-longft: no command {asked!r}: {hint}", file=sys.stderr)
    return EXIT_CONFIG


def _run(function: Callable[..., Any], name: str, arguments: list[str]) -> int:
    """Call the function through fire; nothing is called unless every argument fits its signature."""
    import fire
    from pydantic import ConfigDict, ValidationError, validate_call

    exact = bind_arguments(function, name, arguments)
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)
    try:
        fire.Fire(checked, command=exact, name=name)
    except ValidationError as error:
        if error.title != function.__name__:  # not about the arguments: from inside the command
            raise
        known = list(inspect.signature(function).parameters)
        flags = [known[e["loc"][0]] if isinstance(e["loc"][0], int) else e["loc"][0] for e in error.errors()]
        lines = [
            f"{name}: --{flag}: seen {e['input']!r}; {e['msg']}" for flag, e in zip(flags, error.errors(), strict=True)
        ]
        raise LongftError("\n".join(lines)) from None
    except fire.core.FireExit as stop:
        return EXIT_CONFIG if stop.code else 0
    return 0


def bind_arguments(function: Callable[..., Any], name: str, arguments: list[str]) -> list[str]:
    """The arguments as `--name=value`, surplus words of `*args` behind: nothing is left for fire to guess.

    A bool flag takes no value from the next word; `-x` stands for the only flag with that letter. Raises LongftError
    with every flag that does not exist (and the nearest that does) and every argument missing or one too many.
    """
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    places = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    given: dict[str, str] = {}
    words: list[str] = []
    problems = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        match = FLAG.fullmatch(word)
        if match is None:
            words.append(word)
            continue
        key, value = match[1].replace("-", "_"), match[2]
        if len(key) == 1:
            key = next((p for p in parameters if [q for q in parameters if q[0] == key] == [p]), key)
        if value is None and key in parameters and hints.get(key) is bool:
            value = "True"
        elif value is None and queue and not FLAG.fullmatch(queue[0]):
            value = queue.pop(0)
        if key not in parameters:
            close = difflib.get_close_matches(key, parameters, n=1)
            known = ", ".join(f"--{p}" for p in parameters)
            problems.append(f"no flag {word}: " + (f"did you mean --{close[0]}?" if close else f"known are {known}"))
        elif value is None:
            problems.append(f"{word} needs a value")
        else:
            given[key] = value
    free = [p for p in places if p not in given]
    surplus = words[len(free) :]
    given |= zip(free, words, strict=False)
    usage = " ".join(
        p.upper() if parameters[p].default is inspect.Parameter.empty else f"[{p.upper()}]" for p in places
    )
    if not takes_more:
        problems += [f"argument {word!r} is one too many: it takes {usage}" for word in surplus]
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    problems += [f"{p.upper()} is missing: it takes {usage}" for p in required if p not in given]
    if problems:
        raise LongftError("\n".join(f"{name}: {problem}" for problem in problems))
    # repr where text is wanted: fire would make a number of a folder called 2024.
    texts = {key for key, hint in hints.items() if hint is str or set(get_args(hint)) == {str, NoneType}}
    return [*(f"--{key}={value!r}" if key in texts else f"--{key}={value}" for key, value in given.items()), *surplus]


if __name__ == "__main__":
    raise SystemExit(main())
