"""Other trainers' files, which tests compare with: TRL is installed, Axolotl lies beside, without what it needs to run."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from wonderwords import RandomWord

from ds_longft.tools.evaluate.ruler.texts_of_tasks import SENTENCE


def trl_folder() -> Path:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def axolotl_folder() -> Path:
    """`launch/setup.sh` puts it into .venv/peers; DS_LONGFT_TEST_PEERS names another folder."""
    folder = Path(os.environ.get("DS_LONGFT_TEST_PEERS", Path(sys.prefix) / "peers")) / "axolotl"
    if not folder.is_dir():
        pytest.skip("no axolotl: pip install --no-deps --target .venv/peers axolotl==0.19.0")
    return folder


def axolotl_chat_templates() -> ModuleType:
    """Axolotl's own module that finds what of a chat is trained, with stand-ins for what it imports beside it."""
    folder = axolotl_folder()
    name = "axolotl.prompt_strategies.chat_template"
    if name not in sys.modules:
        sys.modules["colorama"] = _StandIn("colorama")
        for other in ("utils.logging", "utils.dict", "utils.chat_templates", "utils.schemas.datasets"):
            sys.modules[f"axolotl.{other}"] = _StandIn(f"axolotl.{other}")
        sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger
        sys.modules["axolotl.utils.dict"].remove_none_values = _without_none
        for package in ("axolotl", "axolotl.utils", "axolotl.utils.schemas", "axolotl.prompt_strategies"):
            sys.modules[package] = _StandIn(package)
            sys.modules[package].__path__ = [str(folder.parent / package.replace(".", "/"))]
    return importlib.import_module(name)


class _StandIn(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"CYAN": "", "RESET": ""})


def _without_none(record: object) -> object:
    if isinstance(record, dict):
        return {key: _without_none(value) for key, value in record.items() if value is not None}
    return [_without_none(value) for value in record] if isinstance(record, list) else record


def lm_eval_ruler(name: str) -> ModuleType:
    """A module of lm-eval's RULER out of its wheel, which `launch/setup.sh` puts into .venv/peers as it is.

    For nltk our end of a sentence stands in (its own is a download), for wonderwords a hundred nouns and adjectives of
    it where needles' keys are made: lm-eval would make six million pairs of all.
    """
    _open_lm_eval("ruler")
    wanted = f"lm_eval.tasks.ruler.{name}"
    if wanted not in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            whole = RandomWord()._categories
            few = {kind: words[:100] if kind.endswith("s") else words for kind, words in whole.items()}
            words, nltk = ModuleType("wonderwords"), ModuleType("nltk")
            words.RandomWord = lambda: SimpleNamespace(_categories=few)  # type: ignore[attr-defined]
            nltk.sent_tokenize = SENTENCE.split  # type: ignore[attr-defined]
            nltk.data = SimpleNamespace(find=str)  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "wonderwords", words)
            patch.setitem(sys.modules, "nltk", nltk)
            patch.setattr(importlib.metadata, "version", lambda _: "3.9.1")
            importlib.import_module(wanted)
    return sys.modules[wanted]


def lm_eval_longproc() -> ModuleType:
    """lm-eval's scorers of LongProc."""
    _open_lm_eval("longproc")
    return importlib.import_module("lm_eval.tasks.longproc.metrics")


def _open_lm_eval(tasks: str) -> None:
    """A package of lm-eval's tasks can be imported out of its wheel, without what lm-eval needs to run."""
    folder = Path(os.environ.get("DS_LONGFT_TEST_PEERS", Path(sys.prefix) / "peers"))
    wheels = sorted(folder.glob("lm_eval-*.whl"))
    if not wheels:
        pytest.skip("no lm-eval: pip download --no-deps --dest .venv/peers lm-eval==0.4.13")
    for package in ("lm_eval", "lm_eval.tasks", f"lm_eval.tasks.{tasks}"):
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(wheels[-1] / package.replace(".", "/"))]


def lm_eval_choices() -> tuple[type, type, str]:
    """lm-eval's model that says how likely a continuation is, its task that makes scores of that, LongBench v2's prompt."""
    _open_lm_eval("longbench2")
    wheel = sys.modules["lm_eval"].__path__[0].removesuffix("/lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sacrebleu", "evaluate", "sqlitedict"):  # of other scores
            if find_spec(name) is None:
                patch.setitem(sys.modules, name, _StandIn(name))
        model = importlib.import_module("lm_eval.models.huggingface").HFLM
        task = importlib.import_module("lm_eval.api.task").ConfigurableTask
    with zipfile.ZipFile(wheel) as files:
        common = yaml.safe_load(files.read("lm_eval/tasks/longbench2/_longbench_common_yaml"))
    return model, task, common["doc_to_text"]


def lm_eval_graphwalks() -> ModuleType:
    """lm-eval's scores of GraphWalks."""
    _open_lm_eval("graphwalks")
    return importlib.import_module("lm_eval.tasks.graphwalks.utils")
