"""The paper's criterion for super experts (arXiv 2507.23279, Eq. 8), as functions of a profile's statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from superexperts.core.errors import DataError, OptionError
from superexperts.core.types import CorpusProfile, ExpertKey, ExpertStats, Profile, Statistic, key_order

__all__ = [
    "PEAK_FIELDS",
    "Threshold",
    "considered",
    "found_on",
    "layers_below",
    "peak",
    "super_experts",
    "super_experts_in",
    "super_experts_of",
    "threshold",
]


PEAK_FIELDS: Mapping[Statistic, str] = {
    "all": "output_max",
    "first": "first_token_output_max",
    "reference": "reference_output_max",
}
"""The field of `ExpertStats` that holds the peaks of a statistic."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """The two bounds of the criterion. The peak of a super expert is over both."""

    percentile: float
    """P99.5 of the considered peaks."""
    ratio: float
    """The largest considered peak / 10."""

    @property
    def value(self) -> float:
        """The larger of the two, which decides."""
        return max(self.percentile, self.ratio)


def layers_below(depth: float, num_layers: int) -> int:
    """Number of layers, dense ones included, below a depth: round(depth x layers), as in the reference code."""
    return round(depth * num_layers)


def peak(row: ExpertStats, statistic: Statistic) -> float:
    """The peak that the criterion compares, 0 for an expert without tokens; `DataError` if the profile lacks it."""
    if statistic == "reference" and row.tokens and row.reference_output_max is None:
        raise DataError("it does not have the reference profiler's peaks; profile again", field="profile")
    return getattr(row, PEAK_FIELDS[statistic]) or 0.0


def considered(stats: Sequence[ExpertStats], num_layers: int, depth: float) -> list[ExpertStats]:
    """The experts of the layers below round(depth x layers), dense layers included in the count."""
    return [row for row in stats if row.layer < layers_below(depth, num_layers)]


def threshold(
    peaks: Sequence[float], percentile: float = 99.5, ratio: float = 10.0, *, floor: bool = False
) -> Threshold:
    """The bounds over the peaks of the considered experts, routed and shared together. Experts that no token reached
    count as 0.

    arXiv 2507.23279, Eq. 8. Percentiles between two values are interpolated linearly, as in the reference code (numpy's
    default). `floor` divides the maximum by `//`, as that code does.
    """
    largest = max(peaks) // ratio if floor else max(peaks) / ratio
    return Threshold(percentile=float(np.percentile(peaks, percentile)), ratio=largest)


def super_experts(
    stats: Sequence[ExpertStats],
    num_layers: int,
    *,
    percentile: float = 99.5,
    ratio: float = 10.0,
    depth: float = 0.75,
    statistic: Statistic = "all",
    floor: bool = False,
) -> tuple[ExpertStats, ...]:
    """The experts with a peak over both bounds of `threshold`, the largest peak first.

    The defaults are the paper's criterion; `statistic="reference"` with `floor` follows its reference code exactly.
    `OptionError` if no layer with experts is below `depth`.
    """
    rows = considered(stats, num_layers, depth)
    if not rows:
        raise OptionError(f"{depth} leaves no MoE layer of {num_layers} layers; give a larger share", field="depth")
    bound = threshold([peak(row, statistic) for row in rows], percentile, ratio, floor=floor)
    # Strictly over the bound, as in Eq. 8: a model with equal peaks everywhere has no super expert.
    found = [row for row in rows if peak(row, statistic) > bound.value]
    return tuple(sorted(found, key=lambda row: (-peak(row, statistic), key_order(row.key))))


def super_experts_of(profile: Profile, corpus: CorpusProfile) -> tuple[ExpertStats, ...]:
    """The super experts of one corpus of a profile by the paper's criterion, for the statistic and at most the depth of
    the profile; none where the criterion considers no MoE layer."""
    return super_experts_in(corpus.experts, profile.num_layers, profile.criterion_depth, profile.statistic)


def super_experts_in(
    stats: Sequence[ExpertStats], num_layers: int, depth: float, statistic: Statistic
) -> tuple[ExpertStats, ...]:
    """As `super_experts`; none where all MoE layers are beyond the depth, which is the criterion's own and not a
    setting that someone gave."""
    if not considered(stats, num_layers, depth):
        return ()
    return super_experts(stats, num_layers, depth=depth, statistic=statistic)


def found_on(profile: Profile) -> dict[ExpertKey, list[str]]:
    """Every expert that is a super expert on at least one corpus -> these corpora; the most often found first."""
    found: dict[ExpertKey, list[str]] = {}
    for name, corpus in profile.corpora.items():
        for row in super_experts_of(profile, corpus):
            found.setdefault(row.key, []).append(name)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), key_order(item[0]))))
