"""Whether corpora agree on the super experts: which are found on all, and how alike the orders of the peaks are."""

from __future__ import annotations

import itertools
from typing import Any

from scipy.stats import spearmanr

from superexperts.core.types import ExpertKey, Profile, key_name, key_order
from superexperts.profiling.criterion import peak, super_experts

__all__ = ["STABILITY_SCHEMA", "found_on", "stability"]

STABILITY_SCHEMA = "superexperts/stability/1"


def found_on(profile: Profile) -> dict[ExpertKey, list[str]]:
    """Every expert that is a super expert on some corpus -> the corpora; the most often found first."""
    found: dict[ExpertKey, list[str]] = {}
    for name, corpus in profile.corpora.items():
        for row in super_experts(
            corpus.experts, profile.num_layers, depth=profile.criterion_depth, statistic=profile.statistic
        ):
            found.setdefault(row.key, []).append(name)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), key_order(item[0]))))


def stability(profile: Profile) -> dict[str, Any]:
    """The super experts with their corpora, and per pair of corpora Jaccard's index of the two sets and Spearman's rank
    correlation of all experts' peaks.

    A pair in which neither corpus has a super expert has no index, and one in which all peaks are equal no
    correlation: None.
    """
    found = found_on(profile)
    sets = {name: {key for key, names in found.items() if name in names} for name in profile.corpora}
    peaks = {
        name: {row.key: peak(row, profile.statistic) for row in corpus.experts}
        for name, corpus in profile.corpora.items()
    }
    pairs = []
    for one, two in itertools.combinations(profile.corpora, 2):
        both = sets[one] | sets[two]
        keys = list(peaks[one])
        values = [[peaks[name][key] for key in keys] for name in (one, two)]
        constant = any(len(set(column)) == 1 for column in values)
        pairs.append(
            {
                "corpora": [one, two],
                "jaccard": len(sets[one] & sets[two]) / len(both) if both else None,
                "rank_correlation": None if constant else float(spearmanr(values[0], values[1]).statistic),
            }
        )
    rows = [
        {"expert": key_name(key), "corpora": names, "peaks": {name: peaks[name][key] for name in profile.corpora}}
        for key, names in found.items()
    ]
    return {"schema": STABILITY_SCHEMA, "corpora": list(profile.corpora), "super": rows, "pairs": pairs}
