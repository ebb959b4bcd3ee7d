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
    at_peak: dict[str, float] = field(default_factory=dict)  # part -> bytes

    def hold(self, name: str, size: float, part: str = "working set", at: str = "") -> None:
        """A tensor is allocated, `at` a place of the code; a name is held once at a time."""
        assert name not in self.live, name
        self.live[name] = part, size
        self.now += size
        if self.now > self.peak:
            self.peak, self.moment = self.now, at or name
            self.at_peak = {}
            for part_of, bytes_of in self.live.values():
                self.at_peak[part_of] = self.at_peak.get(part_of, 0.0) + bytes_of

    def drop(self, *names: str) -> None:
        """Tensors are freed; names that are not held are passed over (kept tensors may take their place)."""
        for name in names:
            _, size = self.live.pop(name, ("", 0.0))
            self.now -= size

    def during(self, name: str, size: float, part: str = "working set") -> None:
        """Something that lives for a moment beside everything that is held now."""
        self.hold(name, size, part)
        self.drop(name)
