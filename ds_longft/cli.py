"""The `ds-longft` command: a table of subcommands. What each takes is its function's signature (`command_line.py`)."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from inspect import BoundArguments
from itertools import takewhile
from typing import Any

from ds_longft import __version__
from ds_longft.command_line import bind, described, help_of
from ds_longft.errors import EXIT_CONFIG, LongftError
from ds_longft.ranks.console import quiet_libraries

HELP = """\
ds-longft: fine-tuning on very long samples, one sample split over many GPUs.

commands:
{commands}

`ds-longft COMMAND --help` explains one of them, `ds-longft docs` lists the documentation.
A run config is given as a file, and any of its keys behind it: mine.yaml --data.max_length_tokens 32K

example, from your chats to a model:
  ds-longft config --model.path Qwen/Qwen3-8B --data.train my.jsonl --output_dir runs/mine > mine.yaml
  ds-longft data stats mine.yaml
  ds-longft train mine.yaml
  ds-longft chat runs/mine
  ds-longft export runs/mine runs/mine-merged
"""


@dataclass(frozen=True)
class Command:
    """A subcommand; its module is imported only when it is asked for."""

    target: str  # "module:function"
    summary: str
    example: str = ""  # its arguments
    imports: str = ""  # what takes seconds to import: said before anything else


TORCH = "torch and transformers"
TOKENIZER = "transformers"  # without torch, which no tokenizer needs: two seconds instead of ten

TABLE = (  # command, module below `tools` (its last word is the function's name), summary, example, imports
    ("train", "begin", "train a run config on this machine's GPUs", "mine.yaml --sp 4", ""),
    ("check", "begin", "all checks of a start, without starting", "mine.yaml --gpus 8", ""),
    ("config", "begin", "a run config from keys and files; --help lists every key",
     "--model.path Qwen/Qwen3-8B --data.train my.jsonl --output_dir runs/mine", ""),
    ("migrate", "migrate", "a config of Axolotl, LLaMA-Factory, TRL or swift as one of ours",
     "axolotl.yaml --out mine.yaml", ""),
    ("models", "models", "model types that are proved; what is known of a checkpoint", "Qwen/Qwen3-8B", ""),
    ("plan", "plan.command", "how long a sample fits, how fast it trains, as a run config",
     "Qwen/Qwen3-8B --gpus 8 --gpu h100-80 --length 128K", TORCH),
    ("verify", "verify.command", "prove that your run trains what one process would",
     "mine.yaml --sp 8 --layers 2", ""),
    ("data convert", "make_data.commands", "a published set to rows of one kind",
     "LongAlign-10k rows.jsonl", "pyarrow"),
    ("data synth refgpt8x", "make_data.synth.commands", "hide each dialogue's reference among near ones",
     "RefGPT-Fact rows.jsonl --rows 1000", ""),
    ("data synth needle", "make_data.synth.commands", "questions about long texts, answers checked by program",
     "books needles.jsonl --rows 1000 --context_tokens 128K", ""),
    ("data synth code", "make_data.synth.commands", "long code questions from Python's own source",
     "code.jsonl --rows 100 --context_tokens 32K", ""),
    ("data synth agents", "make_data.synth.commands", "an agent's long way to an answer, by tools",
     "agents.jsonl --rows 100", ""),
    ("data synth stretches", "make_data.synth.commands", "long texts cut into plain rows of many lengths",
     "books stretches.jsonl --context_tokens 32K", ""),
    ("data synth negatives", "make_data.synth.commands",
     "a document's parts with near ones of others between them", "books negatives.jsonl --context_tokens 32K", ""),
    ("data synth lists", "make_data.synth.commands", "lists with many keys, links and counts to tell",
     "lists.jsonl --rows 1000 --context_tokens 32K", ""),
    ("data mix", "make_data.commands", "a training set of many sources, by a recipe",
     "recipes/faro_open.yaml --root texts --out mixed --tokenizer Qwen/Qwen3-8B", TORCH),
    ("data tokenize", "look.commands", "chats to token ids, once, into the cache", "mine.yaml", TOKENIZER),
    ("data stats", "look.commands", "lengths, targets, packs and padding of a data set",
     "mine.yaml --html stats.html", TOKENIZER),
    ("data inspect", "look.commands", "show which tokens of a row are trained on", "mine.yaml --row 3", TOKENIZER),
    ("data score", "evaluate.data_score", "what long context gains on each row, to choose rows by",
     "runs/mine rows.jsonl scored.jsonl --short 4K --sp 2", TORCH),
    ("data ref_logps", "ref_logps", "a reference's log-probabilities of preference pairs, once",
     "mine.yaml --sp 8", TORCH),
    ("eval perplexity", "evaluate.perplexity", "loss at every position of long texts, over several GPUs too",
     "runs/mine --length 128K --sp 8", TORCH),
    ("eval needle", "evaluate.needle", "hide facts in long texts and ask for them",
     "runs/mine --lengths 8K,32K,128K", TORCH),
    ("eval suite", "report.suite", "RULER, needles and short questions, before and after, as one table",
     "runs/mine --preset quick", TORCH),
    ("eval ruler", "evaluate.ruler.command", "RULER's 13 tasks at any length, scored as published",
     "runs/mine --lengths 4K,32K,128K", TORCH),
    ("eval short", "evaluate.short", "short questions and texts: what long training must not harm",
     "runs/mine --before", TORCH),
    ("eval longbench run", "evaluate.longbench.predictions", "answer LongBench or LongBench-E, and score",
     "runs/mine --data LongBench/ --gpus 8", TORCH),
    ("eval longbench v2", "evaluate.longbench.choices", "LongBench v2 by the likeliest letter, nothing generated",
     "runs/mine data.json --sp 8", TORCH),
    ("eval longproc", "evaluate.longproc.command", "LongProc: long answers that follow a procedure",
     "runs/mine LongProc/data --gpus 8", TORCH),
    ("eval reason", "evaluate.reason", "like requests told apart, walks in a graph, at any length",
     "runs/mine --lengths 4K,32K,128K", TORCH),
    ("eval longbench score", "evaluate.longbench.score", "score anyone's LongBench predictions", "predictions/", ""),
    ("report", "report.command", "one self-contained page about a run", "runs/mine", ""),
    ("chat", "chat", "talk to the result in the terminal", "runs/mine", TORCH),
    ("export", "export", "a run's result as an ordinary Hugging Face folder", "runs/mine runs/mine-merged", TORCH),
    ("push", "push", "a run's result, card and report to a model hub", "runs/mine me/mine", ""),
    ("slurm render", "slurm.render", "the sbatch script of a run, filled and checked",
     "mine.yaml --gpus_per_node 8 --out job.sbatch", ""),
    ("slurm submit", "slurm.render", "the same, handed to sbatch", "mine.yaml --gpus_per_node 8 --time 24:00:00", ""),
    ("doctor", "doctor", "this machine: fit for training? paste it into an issue", "", "torch"),
    ("docs", "documents", "the documentation, without a network", "data", ""),
)  # fmt: skip
COMMANDS = {
    name: Command(f"ds_longft.tools.{module}:{name.split()[-1]}", summary, example, imports)
    for name, module, summary, example, imports in TABLE
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 64 for a mistake in what was asked."""
    quiet_libraries()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv), alone=argv is None)
    except LongftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # of `| head`: what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            "interrupted: the same command uses what was finished (tokenised parts, evaluation rows)", file=sys.stderr
        )
        return 130


def _dispatch(argv: list[str], *, alone: bool = False) -> int:
    """`alone`: nothing else runs in this process."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(HELP.format(commands=_summaries(list(COMMANDS))), end="")
        return 0
    if argv[0] in ("--version", "-V", "version"):
        print(f"ds-longft {__version__}")
        return 0
    name = next((n for n in COMMANDS if argv[: len(n.split())] == n.split()), None)
    if name is None:
        return _no_such_command(argv)
    command, rest = COMMANDS[name], argv[len(name.split()) :]
    if {"--help", "-h"} & set(rest):
        _print_help(name, command)
        return 0
    bound = bind(described(command.target), f"ds-longft {name}", rest)
    if command.imports and sys.modules.get("torch") is None:
        print(f"ds-longft {name}: importing {command.imports} ...", file=sys.stderr, flush=True)
        if alone and command.imports == TOKENIZER:
            from ds_longft.model.hidden_torch import hide_torch

            hide_torch()
    module, _, attribute = command.target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if name.startswith("data "):
        return _through_fire(function, f"ds-longft {name}", bound)
    return function(*bound.args, **bound.kwargs) or 0


def _print_help(name: str, command: Command) -> None:
    print(help_of(command.target, f"ds-longft {name}", command.example), end="")
    if name == "config":
        from ds_longft.tools.documents import every_key

        print(every_key())


def _through_fire(function: Callable[..., Any], name: str, bound: BoundArguments) -> int:
    """`ds-longft data` calls its commands by fire, which gets arguments that have been checked: it never guesses."""
    import fire

    if any(map(is_dataclass, bound.arguments.values())):  # flags that commands share: fire cannot take them apart
        return function(*bound.args, **bound.kwargs) or 0
    words = [f"--{key}={value!r}" for key, value in bound.arguments.items()]
    fire.Fire(function, command=words, name=name)
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())
