"""Fine-tuning of Hugging Face models on very long samples, one sample split over many GPUs.

From Python: `from ds_longft import RunConfig, load_run_config, plan, train_from, verify` (docs/python.md).
"""

from typing import Any

__version__ = "0.2.0"
_FROM_PYTHON = ("RunConfig", "load_run_config", "plan", "train_from", "verify")
_ERRORS = ("ConfigError", "LongftError")


def __getattr__(name: str) -> Any:
    """What `ds_longft.from_python` has, imported when it is asked for: a help needs none of it."""
    if name in (*_FROM_PYTHON, *_ERRORS):
        import importlib

        return getattr(
            importlib.import_module("ds_longft.errors" if name in _ERRORS else "ds_longft.from_python"), name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM_PYTHON, *_ERRORS])
