"""Whether corpora agree on the super experts: which are found on all, and how similar the ranks of all peaks are."""

from __future__ import annotations

import itertools
from typing import Any

from rich.table import Table
from rich.text import Text
from scipy.stats import spearmanr

from superexperts.core.console import stdout
from superexperts.core.types import Profile, key_name
from superexperts.profiling.criterion import found_on, peak

__all__ = ["STABILITY_SCHEMA", "show_stability", "stability"]

STABILITY_SCHEMA = "superexperts/stability/1"


def stability(profile: Profile) -> dict[str, Any]:
    """The super experts with their corpora, and for each pair of corpora Jaccard's index of the two sets and Spearman's
    rank correlation of the peaks of all experts.

    The index is None if neither corpus has a super expert, the correlation None if all peaks of a corpus are equal.
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
        # Ranks of equal values are undefined; scipy would return NaN with a warning.
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


def show_stability(result: dict[str, Any]) -> None:
    """Prints what `stability` returns: the super experts' peaks on each corpus, and each pair's agreement."""
    table = Table(title="super experts, corpus by corpus")
    table.add_column("expert")
    for name in result["corpora"]:
        table.add_column(Text(name), justify="right")
    for row in result["super"]:
        marks = [
            f"{row['peaks'][name]:.4g}" + ("" if name in row["corpora"] else " (no)") for name in result["corpora"]
        ]
        table.add_row(row["expert"], *marks)
    stdout.print(table)
    for pair in result["pairs"]:
        jaccard, rank = (
            "none" if value is None else f"{value:.2f}" for value in (pair["jaccard"], pair["rank_correlation"])
        )
        one, two = pair["corpora"]
        stdout.print(f"{one} and {two}: Jaccard {jaccard}, rank correlation of all peaks {rank}", markup=False)
