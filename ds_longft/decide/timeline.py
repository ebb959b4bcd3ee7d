"""Bytes alive over one step: what is held, what is dropped, and what was alive at the highest moment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Timeline:
    """A ledger of named tensors. `hold` and `drop` follow the code that is described; the peak comes out of it."""

    live: dict[str, tuple[str, float]] = field(default_factory=dict)  # name -> (part, bytes)
    now: float = 0.0
    peak: float = 0.0
    moment: str = ""  # where the code was at the peak
    _alive_at_peak: tuple[tuple[str, float], ...] = ()

    def hold(self, name: str, size: float, part: str = "working set", at: str = "") -> None:
        """A tensor is allocated, `at` a place of the code; a name is held once at a time."""
        assert name not in self.live, name
        self.live[name] = part, size
        self.now += size
        if self.now > self.peak:
            self.peak, self.moment = self.now, at or name
            self._alive_at_peak = tuple(self.live.values())

    @property
    def at_peak(self) -> dict[str, float]:
        """Part -> bytes at the peak."""
        parts: dict[str, float] = {}
        for part, size in self._alive_at_peak:
            parts[part] = parts.get(part, 0.0) + size
        return parts

    def drop(self, *names: str) -> None:
        """Tensors are freed; names that are not held are passed over (kept tensors may take their place)."""
        for name in names:
            _, size = self.live.pop(name, ("", 0.0))
            self.now -= size

    def during(self, name: str, size: float, part: str = "working set") -> None:
        """Something that lives for a moment beside everything that is held now."""
        self.hold(name, size, part)
        self.drop(name)
