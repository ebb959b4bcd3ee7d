"""What every section of the run config is made of: strict values, token counts, and what a resume does about each key.

Token counts accept "128K" and "1M" (1024-based).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


def parse_tokens(value: Any) -> Any:
    """`"128K"` -> 131072, `"1M"` -> 1048576; anything else is handed on for pydantic to judge."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM])\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    return int(float(match[1]) * {"k": 1024, "m": 1024**2}[match[2].lower()])


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]


Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]

T = TypeVar("T")


class OnResume(Enum):
    """What a run that goes on from a checkpoint does about another value of a key. Every key has one of these."""

    REFUSED = "refused"  # it decides what is trained
    BY_CONTENT = "by content"  # what it leads to is compared: the rows, the weights, the engine's settings
    APPLIED = "applied"  # it counts from the step on at which the run goes on; written down in changes.json
    ROUNDING = "rounding"  # another way to the same losses, equal to rounding; written down as well
    FREE = "free"  # it decides nothing that is trained


Refused = Annotated[T, OnResume.REFUSED]
ByContent = Annotated[T, OnResume.BY_CONTENT]
Applied = Annotated[T, OnResume.APPLIED]
Rounding = Annotated[T, OnResume.ROUNDING]
Free = Annotated[T, OnResume.FREE]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `true` for 1."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(part, bool) for part in parts) and not _takes_booleans(annotation):
            raise ValueError("true and false are no numbers")
        return value


def _takes_booleans(annotation: Any) -> bool:
    """Whether they may stand there, or in a section below, which judges them itself."""
    if isinstance(annotation, type) and issubclass(annotation, bool | Section):
        return True
    return any(map(_takes_booleans, get_args(annotation)))
