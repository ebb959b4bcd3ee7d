"""What a model draws at random in training: dropout, as modules and as functions, and noise on routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Rates = list[tuple[nn.Module, str, float]]


def random_rates(model: nn.Module) -> Rates:
    """(module, attribute, rate) of all that is on, LoRA's dropout included."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and value > 0
        if "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
    ]


def switch_off(rates: Rates) -> None:
    """The model is deterministic from now on."""
    for module, name, _ in rates:
        setattr(module, name, 0.0)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, the model is deterministic: what is compared must not be random."""
    rates = random_rates(model)
    switch_off(rates)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
