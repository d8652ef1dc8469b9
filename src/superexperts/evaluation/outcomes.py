"""How the answers of a run ended, where they did not end by themselves."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from superexperts.core.types import Answer

__all__ = ["how_they_ended", "sentence"]


def how_they_ended(answers: Sequence[Answer]) -> dict[str, int]:
    """Counts of generated answers: `cut` at the limit of tokens or within thoughts, and of those `silent` without any
    text after the thoughts; `empty`; `refused` by the server or filtered. Kinds that do not occur are left out."""
    counts: collections.Counter[str] = collections.Counter()
    for answer in answers:
        if answer.loglikelihoods is not None:
            continue
        parts = answer.parts
        ended = answer.ended(parts)
        if ended is not None:
            counts[ended] += 1
            counts["silent"] += ended == "cut" and not parts.text.strip()
    return {kind: count for kind, count in counts.items() if count}


def sentence(counts: Mapping[str, int], total: int) -> str:
    """What `how_they_ended` counted among `total` answers, in words; empty if nothing was counted."""
    parts = []
    if cut := counts.get("cut", 0):
        silent = counts.get("silent", 0)
        before = f", {silent} of them before any answer (they are empty after the thoughts)" if silent else ""
        parts.append(f"{cut} were cut at the limit of new tokens{before}")
    if empty := counts.get("empty", 0):
        parts.append(f"{empty} are empty")
    if refused := counts.get("refused", 0):
        parts.append(f"{refused} were refused or filtered")
    return f"of {total} answers {'; '.join(parts)}" if parts else ""
