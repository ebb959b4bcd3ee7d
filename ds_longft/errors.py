"""The few errors a user can get, each with the exit code it ends the process with.

Exit codes: 0 done, 64 config or data, 66 `check` could not read the model's config, 69 port in use, 70 non-finite, 71
hang, 75 stopped and saved (requeue me).
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_CONFIG = 64
EXIT_UNCHECKED = 66
EXIT_PORT = 69
EXIT_NON_FINITE = 70
EXIT_HANG = 71
EXIT_REQUEUE = 75


class LongftError(Exception):
    """Base of every error meant for the user: one clear message, no traceback."""

    exit_code = EXIT_CONFIG


class ConfigError(LongftError):
    """The run config, the DeepSpeed JSON and the machine do not fit together.

    Collects every problem, so that one failed start is enough to mend them all.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)  # it travels from the rank that found them to the others


class DataError(LongftError):
    """The data cannot be trained on: nothing readable, too many bad rows, no targets."""


class ModelError(LongftError):
    """The model cannot be trained exactly with what was asked: unsupported layers, masks, kernels."""


class CheckpointError(LongftError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class RankError(LongftError):
    """Seen by the rank it happened to, not by all ranks."""


class GpuMemoryError(RankError):
    """A GPU's memory does not hold a step."""


class DiskError(RankError):
    """Layer inputs could not be written to a disk or read back."""


class PortError(LongftError):
    """The port at which ranks meet is taken; the next start may have another."""

    exit_code = EXIT_PORT


class NonFiniteError(LongftError):
    """Loss, gradient or a log-probability is NaN or infinite on some rank; the weights were not touched."""

    exit_code = EXIT_NON_FINITE
