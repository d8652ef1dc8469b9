"""How far a super expert stands out from the other experts. The criterion alone crowns the largest of any heap."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from superexperts.core.types import CorpusProfile, ExpertKey, ExpertStats, Profile, Statistic, key_name
from superexperts.profiling.criterion import considered, peak, super_experts_of

__all__ = ["RATIO", "ROBUST_Z", "Prominence", "prominence", "prominence_on", "warning"]

RATIO = 2.0
"""A peak under this many times the next expert's does not stand out. The weakest published super experts of
Qwen3-30B-A3B and DeepSeek-V2-Lite have 6.8 and 4.1 (arXiv 2507.23279)."""
ROBUST_Z = 3.5
"""The usual bound for an outlier by the robust z-score (Iglewicz and Hoaglin 1993)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prominence:
    """How far the peak of one super expert is from those of the other considered experts."""

    expert: str
    """Such as L2E54."""
    ratio: float | None
    """Its peak over the largest peak of an expert that is not one; None if there is no other, or all others are 0."""
    z: float | None
    """Robust z-score of the peak's logarithm among all considered experts that a token reached: the distance from the
    median over 1.4826 times the median absolute deviation. None if that deviation is 0."""

    @property
    def stands_out(self) -> bool:
        """Whether neither measure is under its bound."""
        return (self.ratio is None or self.ratio >= RATIO) and (self.z is None or self.z >= ROBUST_Z)

    @property
    def sentence(self) -> str:
        """`L2E54: 6.8 times the next, robust z 9.1`."""
        ratio = "no other expert" if self.ratio is None else f"{self.ratio:.3g} times the next"
        return f"{self.expert}: {ratio}" + ("" if self.z is None else f", robust z {self.z:.1f}")


def prominence(
    stats: Sequence[ExpertStats],
    num_layers: int,
    found: Collection[ExpertKey],
    *,
    depth: float,
    statistic: Statistic,
) -> tuple[Prominence, ...]:
    """For each of the super experts `found`, in their order, how far it stands out among the considered experts."""
    peaks = {row.key: peak(row, statistic) for row in considered(stats, num_layers, depth)}
    reached = np.log([value for value in peaks.values() if value > 0])
    median = np.median(reached)
    deviation = 1.4826 * float(np.median(np.abs(reached - median)))
    following = max((value for key, value in peaks.items() if key not in found), default=0.0)
    return tuple(
        Prominence(
            expert=key_name(key),
            ratio=peaks[key] / following if following else None,
            z=float(np.log(peaks[key]) - median) / deviation if deviation else None,
        )
        for key in found
    )


def prominence_on(profile: Profile, corpus: CorpusProfile) -> tuple[Prominence, ...]:
    """The same for the super experts of one corpus of a profile by the paper's criterion."""
    found = [row.key for row in super_experts_of(profile, corpus)]
    return prominence(
        corpus.experts, profile.num_layers, found, depth=profile.criterion_depth, statistic=profile.statistic
    )


def warning(found: Sequence[Prominence]) -> str | None:
    """A sentence that names the experts that do not stand out; None if all do."""
    weak = [one for one in found if not one.stands_out]
    if not weak:
        return None
    names = ", ".join(one.expert for one in weak)
    one = min(weak, key=lambda one: one.ratio or RATIO)
    verb = "does" if len(weak) == 1 else "do"
    return (
        f"{names} {verb} not stand out ({one.sentence}): over the criterion's bounds, but close to the other experts. "
        "The published super experts are at least 4 times the next"
    )
