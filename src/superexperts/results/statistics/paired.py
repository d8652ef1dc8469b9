"""What a variant's accuracy, and a difference of two variants on the same items, is worth: intervals, tests, power.

With one run on either side the test is McNemar's exact one and the interval Tango's. Where a side has several runs,
seeds are a random effect (`seeds.py`). Items of one subject depend on each other, so with twenty subjects or more the
test is made with subjects as the sample too (`clusters.py`), and the larger of the two p-values counts.

Suffixes of the arrays' names: R runs, N items; 1 is right, 0 wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from scipy.stats import norm

from superexperts.results.statistics import across_seeds, single_run
from superexperts.results.statistics import across_subjects as grouping
from superexperts.results.statistics.across_seeds import Floats, Items, Seeds, seeds_of
from superexperts.results.statistics.across_subjects import Clusters

__all__ = ["compare", "items_of", "proportion", "with_test"]

POWER = 0.8


def proportion(
    correct_RN: Floats, clusters: Clusters | None
) -> tuple[float, tuple[float, float], tuple[float, float] | None]:
    """(accuracy, its 95% interval, the same with subjects as the sample) of runs on the same items.

    One run's interval is Wilson's. That of several is Wilson's too, for as many items as would give the width that
    items and seeds together have, and at most for the items that there are.
    """
    runs, number = correct_RN.shape
    mean_N = correct_RN.mean(0)
    accuracy = float(mean_N.mean())
    parts = [seeds_of(correct_RN)] if runs > 1 else []
    own = Items(variance=float(mean_N.var()) / max(number - 1, 1))
    worth = float(number)
    if parts and 0 < accuracy < 1:
        half = across_seeds.critical(own, parts)
        worth = min(worth, accuracy * (1 - accuracy) * (float(norm.ppf(0.975)) / half) ** 2)
    clustered = None
    if clusters is not None:
        half = across_seeds.critical(_wider(grouping.items(mean_N, clusters), own), parts)
        clustered = max(0.0, accuracy - half), min(1.0, accuracy + half)
    return accuracy, single_run.wilson(accuracy * worth, worth), clustered


def compare(
    variant_RN: Floats,
    reference_RN: Floats,
    clusters: Clusters | None = None,
    *,
    tests: int = 1,
    random: tuple[bool, bool] = (True, True),
) -> dict[str, Any]:
    """A row of `comparisons`, less its names and its adjusted p-value.

    `tests` is the family's size. `random` says of each side whether another seed would give another model: the only
    run of such a side is taken to vary as the other side's runs do, if there are several.
    """
    row, smallest = with_test(variant_RN, reference_RN, clusters, tests=tests, random=random)
    difference_N = variant_RN.mean(0) - reference_RN.mean(0)
    return row | {"bootstrap": grouping.bootstrap(difference_N, clusters), "detectable": smallest()}


def with_test(
    variant_RN: Floats,
    reference_RN: Floats,
    clusters: Clusters | None = None,
    *,
    tests: int = 1,
    random: tuple[bool, bool] = (True, True),
) -> tuple[dict[str, Any], Callable[[], float]]:
    """The row without what takes long, the bootstrap; and a function that gives the smallest detectable difference."""
    difference_N = variant_RN.mean(0) - reference_RN.mean(0)
    number = len(difference_N)
    difference = float(difference_N.mean())
    parts = _parts(variant_RN, reference_RN, random)
    both = [part for part in parts if part is not None]
    own, null = items_of(difference_N)
    only_reference = only_variant = None
    if both:
        half = across_seeds.critical(own, both)
        low, high = max(-1.0, difference - half), min(1.0, difference + half)
        p = across_seeds.p_value(difference, null, both)
    else:
        paired = single_run.mcnemar(list(reference_RN[0] > 0), list(variant_RN[0] > 0))
        only_reference, only_variant = paired.only_base, paired.only_variant
        low, high, p = paired.low, paired.high, paired.p
    clustered, by_subject = None, None
    if clusters is not None:
        by_subject = _wider(grouping.items(difference_N, clusters), own)
        half = across_seeds.critical(by_subject, both)
        clustered = max(-1.0, difference - half), min(1.0, difference + half)
        if clusters.many:
            p = max(p, across_seeds.p_value(difference, _wider(by_subject, null), both))

    def smallest() -> float:
        differing = float((difference_N**2).sum())
        # No less than what the variance stands for, whose two made-up items would else be blown up with the rest.
        square = max(differing / number, null.variance * number)
        if both:
            sizes = [across_seeds.detectable(square, null, both, tests, POWER)]
        else:
            sizes = [single_run.detectable(round(differing), number, tests, POWER)]
        if clusters is not None and clusters.many and by_subject is not None:
            sizes.append(across_seeds.detectable(square, _wider(by_subject, null), both, tests, POWER))
        return max(sizes)

    return {
        "n": number,
        "runs": [len(variant_RN), len(reference_RN)],
        "only_base": only_reference,
        "only_variant": only_variant,
        "difference": difference,
        "low": low,
        "high": high,
        "clustered": clustered,
        "seed_sd": [part.sd if part is not None else None for part in parts],
        "test": "seeds" if both else "mcnemar",
        "subjects": clusters.subjects if clusters is not None and clusters.many else None,
        "p": p,
    }, smallest


def items_of(difference_N: Floats) -> tuple[Items, Items]:
    """Variance of the mean difference over items as it is, and if there were none, which is what a test asks about.

    Both with two made-up items, one won and one lost, after D. G. Bonett and R. M. Price, Journal of Educational and
    Behavioral Statistics 37 (2012) 479-488: so a few items that differ are not taken for more than they are, and none
    at all still leave an interval.
    """
    more = len(difference_N) + 2
    square = float((difference_N**2).sum() + 2) / more
    mean = float(difference_N.sum()) / more
    return Items(variance=(square - mean**2) / more), Items(variance=square / more)


def _wider(one: Items, other: Items) -> Items:
    """`one`, but no smaller than `other`: subjects never make a result surer."""
    return dataclasses.replace(one, variance=max(one.variance, other.variance))


def _parts(variant_RN: Floats, reference_RN: Floats, random: tuple[bool, bool]) -> list[Seeds | None]:
    """The seeds' parts of the variant and of the reference; None for one run."""
    found = [seeds_of(side_RN) if len(side_RN) > 1 else None for side_RN in (variant_RN, reference_RN)]
    for place, other in ((0, 1), (1, 0)):
        part = found[other]
        if len((variant_RN, reference_RN)[place]) == 1 and random[place] and part is not None:
            found[other] = dataclasses.replace(part, weight=part.weight + 1)
    return found
