"""The accuracy of a variant, and the difference of two variants on the same items: intervals, tests, power.

With one run on each side the test is McNemar's exact test and the interval is Tango's (`single_run`). If a side has
several runs, seeds are a random effect (`across_seeds`). Items of one subject depend on each other, so with twenty
subjects or more the test is also made with subjects as the sample (`across_subjects`), and the larger of the two
p-values counts.

Suffixes of array names: R runs, N items; 1 is right, 0 is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from scipy.stats import norm

from superexperts.results.statistics import across_seeds, across_subjects, single_run
from superexperts.results.statistics.across_seeds import Floats, ItemVariance, SeedVariance, seed_variance
from superexperts.results.statistics.across_subjects import Clusters

__all__ = ["compare", "compare_without_bootstrap", "item_variance", "proportion"]

POWER = 0.8
"""Of the smallest detectable difference."""


def proportion(
    correct_RN: Floats, clusters: Clusters | None
) -> tuple[float, tuple[float, float], tuple[float, float] | None]:
    """(accuracy, 95% interval, 95% interval with subjects as the sample) of runs on the same items.

    The interval is Wilson's. For several runs it is Wilson's for an effective number of items: as many as would give
    the width that items and seeds have together, and at most the items asked.
    """
    runs, number = correct_RN.shape
    mean_N = correct_RN.mean(0)
    accuracy = float(mean_N.mean())
    seeds = [seed_variance(correct_RN)] if runs > 1 else []
    items = ItemVariance(variance=float(mean_N.var()) / max(number - 1, 1))
    effective = float(number)
    if seeds and 0 < accuracy < 1:
        half = across_seeds.half_width(items, seeds)
        # Inverts half = z * sqrt(p (1 - p) / n) for n. At 0 or 1 that is 0 / 0, so the number asked is kept.
        effective = min(effective, accuracy * (1 - accuracy) * (float(norm.ppf(0.975)) / half) ** 2)
    clustered = None
    if clusters is not None:
        by_subject = _at_least(across_subjects.item_variance_by_subject(mean_N, clusters), items)
        half = across_seeds.half_width(by_subject, seeds)
        clustered = max(0.0, accuracy - half), min(1.0, accuracy + half)
    return accuracy, single_run.wilson(accuracy * effective, effective), clustered


def compare(
    variant_RN: Floats,
    reference_RN: Floats,
    clusters: Clusters | None = None,
    *,
    tests: int = 1,
    random: tuple[bool, bool] = (True, True),
) -> dict[str, Any]:
    """A row of `comparisons` in results.json, without its names and its adjusted p-value.

    `tests` is the number of tests in the family. `random` says for each side whether another seed would give another
    model. If such a side has only one run, it is assumed to vary as much as the runs of the other side do.
    """
    row, smallest = compare_without_bootstrap(variant_RN, reference_RN, clusters, tests=tests, random=random)
    difference_N = variant_RN.mean(0) - reference_RN.mean(0)
    return row | {"bootstrap": across_subjects.bootstrap(difference_N, clusters), "detectable": smallest()}


def compare_without_bootstrap(
    variant_RN: Floats,
    reference_RN: Floats,
    clusters: Clusters | None = None,
    *,
    tests: int = 1,
    random: tuple[bool, bool] = (True, True),
) -> tuple[dict[str, Any], Callable[[], float]]:
    """The row without the two parts that take long: no bootstrap, and the smallest detectable difference as a call."""
    difference_N = variant_RN.mean(0) - reference_RN.mean(0)
    number = len(difference_N)
    difference = float(difference_N.mean())
    of_sides = _seed_variances(variant_RN, reference_RN, random)
    seeds = [part for part in of_sides if part is not None]
    items, null_items = item_variance(difference_N)
    only_reference = only_variant = None
    if seeds:
        half = across_seeds.half_width(items, seeds)
        low, high = max(-1.0, difference - half), min(1.0, difference + half)
        p = across_seeds.p_value(difference, null_items, seeds)
    else:
        paired = single_run.mcnemar(list(reference_RN[0] > 0), list(variant_RN[0] > 0))
        only_reference, only_variant = paired.only_base, paired.only_variant
        low, high, p = paired.low, paired.high, paired.p
    clustered, by_subject = None, None
    if clusters is not None:
        by_subject = _at_least(across_subjects.item_variance_by_subject(difference_N, clusters), items)
        half = across_seeds.half_width(by_subject, seeds)
        clustered = max(-1.0, difference - half), min(1.0, difference + half)
        if clusters.many:
            # The larger p-value: correlated items must not make a result look more certain than independent ones.
            p = max(p, across_seeds.p_value(difference, _at_least(by_subject, null_items), seeds))

    def smallest() -> float:
        differing = float((difference_N**2).sum())
        # `null_items` includes two added items (see `item_variance`); a smaller square would scale them up as well.
        square = max(differing / number, null_items.variance * number)
        if seeds:
            sizes = [across_seeds.detectable(square, null_items, seeds, tests, POWER)]
        else:
            sizes = [single_run.detectable(round(differing), number, tests, POWER)]
        if clusters is not None and clusters.many and by_subject is not None:
            sizes.append(across_seeds.detectable(square, _at_least(by_subject, null_items), seeds, tests, POWER))
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
        "seed_sd": [part.sd if part is not None else None for part in of_sides],
        "test": "seeds" if seeds else "mcnemar",
        "subjects": clusters.subjects if clusters is not None and clusters.many else None,
        "p": p,
    }, smallest


def item_variance(difference_N: Floats) -> tuple[ItemVariance, ItemVariance]:
    """Variance of the mean difference, for an interval, and under the null hypothesis, for a test.

    Two items are added to both, one won and one lost (D. G. Bonett and R. M. Price, Journal of Educational and
    Behavioral Statistics 37 (2012) 479-488). This keeps the intervals honest where few items differ, and gives them a
    width where none do.
    """
    more = len(difference_N) + 2
    square = float((difference_N**2).sum() + 2) / more
    mean = float(difference_N.sum()) / more
    return ItemVariance(variance=(square - mean**2) / more), ItemVariance(variance=square / more)


def _at_least(one: ItemVariance, other: ItemVariance) -> ItemVariance:
    """`one`, but no smaller than `other`: subjects must never make a result more certain."""
    return dataclasses.replace(one, variance=max(one.variance, other.variance))


def _seed_variances(variant_RN: Floats, reference_RN: Floats, random: tuple[bool, bool]) -> list[SeedVariance | None]:
    """The seed variances of the variant and of the reference; None for a side with one run."""
    found = [seed_variance(side_RN) if len(side_RN) > 1 else None for side_RN in (variant_RN, reference_RN)]
    for place, other in ((0, 1), (1, 0)):
        part = found[other]
        if len((variant_RN, reference_RN)[place]) == 1 and random[place] and part is not None:
            # A single run varies by the whole seed variance: 1 / 1, on top of the other side's 1 / runs.
            found[other] = dataclasses.replace(part, weight=part.weight + 1)
    return found
