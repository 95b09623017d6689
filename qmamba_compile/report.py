"""What the passes found, rewrote and left alone: the data behind `explain`."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from .errors import SkipReason, StrictError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One anchor of one pass. ``reason`` is None when it was rewritten. Bytes are those of the weight or state."""

    rewrite: str
    layer: str
    detail: str
    reason: SkipReason | None = None
    bytes_before: int = 0
    bytes_after: int = 0


class Report:
    """Entries of one compiled graph.

    Attributes:
        phase: ``"prefill"``, ``"decode"`` or ``"other"`` (no Mamba2 layer in the graph).
        strict: a skipped anchor raises `StrictError`.
        seconds: run time by pass.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.phase = "other"
        self.strict = strict
        self.entries: list[Entry] = []
        self.seconds: dict[str, float] = {}
        self._current = ""

    def start(self, rewrite: str) -> None:
        """Entries from here on belong to the pass ``rewrite``."""
        self._current = rewrite

    def rewrote(self, layer: str, detail: str, *, bytes_before: int = 0, bytes_after: int = 0) -> None:
        self.entries.append(Entry(self._current, layer, detail, bytes_before=bytes_before, bytes_after=bytes_after))

    def skipped(self, layer: str, reason: SkipReason, detail: str, *, bytes_before: int = 0) -> None:
        """Record an anchor left alone.

        Raises:
            StrictError: ``strict`` is set and the layer was not excluded on purpose.
        """
        entry = Entry(self._current, layer, detail, reason, bytes_before=bytes_before, bytes_after=bytes_before)
        self.entries.append(entry)
        if self.strict and reason is not SkipReason.EXCLUDED:
            raise StrictError(
                f"{layer}: {self._current} left this alone: {reason.value} ({detail}); "
                "name the layer in skip_layers, or set strict=False"
            )

    def rewritten(self, rewrite: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.rewrite == rewrite and entry.reason is None]

    def skips(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.reason is not None]

    def to_json(self) -> dict[str, Any]:
        passes: dict[str, Any] = {}
        for name in self.seconds:
            entries = [entry for entry in self.entries if entry.rewrite == name]
            passes[name] = {
                "found": len(entries),
                "rewritten": sum(entry.reason is None for entry in entries),
                "skipped": [
                    {"layer": e.layer, "reason": e.reason.name, "detail": e.detail} for e in entries if e.reason
                ],
                "bytes_before": sum(entry.bytes_before for entry in entries),
                "bytes_after": sum(entry.bytes_after for entry in entries),
                "seconds": round(self.seconds[name], 4),
            }
        return {"phase": self.phase, "passes": passes}


recent: collections.deque[Report] = collections.deque(maxlen=64)
"""Reports of the graphs that this process compiled last, oldest first."""
