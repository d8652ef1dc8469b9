"""Intervals, tests and power for variants that were run once; and the adjustment for several tests.

Sources: E. B. Wilson, JASA 22 (1927) for the interval of a share; Q. McNemar, Psychometrika 12 (1947), exact form, for
the paired test; T. Tango, Statistics in Medicine 17 (1998) 891-908 for the interval of a paired difference; S. Holm,
Scandinavian Journal of Statistics 6 (1979) for families of tests; R. J. Connor, Biometrics 43 (1987) 207-211 for the
power of McNemar's test. All intervals are two-sided 95% intervals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from superexperts.core.errors import DataError
from superexperts.core.types import Extraction, Score

__all__ = ["CONFIDENCE", "Paired", "detectable", "graded", "holm", "mcnemar", "paired_interval", "score", "wilson"]

CONFIDENCE = 0.95
"""Of all intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
    """Two variants on the same items; `difference` is the second one's accuracy minus the first one's."""

    n: int
    """Items that both answered."""
    only_base: int
    """Items that only the first one has right."""
    only_variant: int
    """Items that only the second one has right."""
    difference: float
    """(only_variant - only_base) / n, in -1..1."""
    low: float
    high: float
    """95% interval of the difference (Tango's score interval)."""
    p: float
    """Exact two-sided McNemar test; 1.0 when the two never differ. Not adjusted for other tests, see `holm`."""


def wilson(correct: float, items: float) -> tuple[float, float]:
    """95% Wilson score interval of the share `correct / items`; (0, 1) without items.

    Both may be fractions, for an effective number of items.
    """
    if items == 0:
        return 0.0, 1.0
    low, high = proportion_confint(correct, items, alpha=1 - CONFIDENCE, method="wilson")
    share = correct / items  # must lie in the interval in spite of rounding
    return max(0.0, min(float(low), share)), min(1.0, max(float(high), share))


def mcnemar(base_correct: Sequence[bool], variant_correct: Sequence[bool]) -> Paired:
    """Compares two variants item by item: the exact test on the items where one is right and the other wrong.

    `DataError` unless both have the same number of items, at least one.
    """
    n = len(base_correct)
    if n != len(variant_correct) or n == 0:
        raise DataError(f"paired test: {n} and {len(variant_correct)} items; evaluate both on the same items")
    pairs = [(bool(a), bool(b)) for a, b in zip(base_correct, variant_correct, strict=True)]
    only_base, only_variant = pairs.count((True, False)), pairs.count((False, True))
    discordant = only_base + only_variant
    low, high = paired_interval(only_base, only_variant, n)
    return Paired(
        n=n,
        only_base=only_base,
        only_variant=only_variant,
        difference=(only_variant - only_base) / n,
        low=low,
        high=high,
        # Items that both have right, or both wrong, say nothing about the difference.
        p=float(binomtest(only_variant, discordant).pvalue) if discordant else 1.0,
    )


def paired_interval(only_base: int, only_variant: int, n: int) -> tuple[float, float]:
    """95% interval of the difference `(only_variant - only_base) / n` of two paired shares.

    Tango's score interval: all differences that a score test does not reject. At 0 that test is McNemar's without
    continuity correction. Unlike Wald's, the interval has a width when the two never differ, and stays within -1..1.
    """
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    observed = (only_variant - only_base) / n

    def excess(difference: float) -> float:
        """Squared numerator of the score minus z**2 times its variance: negative inside the interval."""
        a = 2 * n
        b = -only_variant - only_base + (2 * n - only_variant + only_base) * difference
        c = -only_base * difference * (1 - difference)
        # Rounding can make the discriminant slightly negative where it is 0.
        lost = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # P(only the base is right), given `difference`
        variance = n * (2 * lost + difference * (1 - difference))
        return float((only_variant - only_base - n * difference) ** 2 - z * z * variance)

    # At the observed difference itself the variance can be 0 (no item differs), so the search starts next to it.
    below, above = observed - 1e-9, observed + 1e-9
    low = float(brentq(excess, -1.0, below, xtol=1e-12)) if below > -1 and excess(-1.0) > 0 else -1.0
    high = float(brentq(excess, above, 1.0, xtol=1e-12)) if above < 1 and excess(1.0) > 0 else 1.0
    return low, high


def detectable(discordant: int, n: int, tests: int = 1, power: float = 0.8) -> float:
    """The smallest |difference| of two paired shares that McNemar's test detects with this `power`.

    `discordant` items of `n` differ between the two variants. The level is 5% divided by `tests` (Bonferroni, the first
    step of Holm's procedure). This is Connor's formula, with a discordant share of at least the difference itself.
    """
    z_level, z_power = float(norm.isf((1 - CONFIDENCE) / 2 / tests)), float(norm.ppf(power))

    def excess(difference: float) -> float:
        # A difference of d needs at least d * n differing items, so a smaller observed share is raised.
        share = max(discordant / n, difference)
        return difference * math.sqrt(n) - z_level * math.sqrt(share) - z_power * math.sqrt(share - difference**2)

    return float(brentq(excess, 1e-12, 1.0)) if excess(1.0) > 0 else 1.0


def score(task: str, variant: str, extractions: Sequence[Extraction]) -> Score:
    """Counts the answers of a variant to a benchmark. Unparsed answers are wrong and stay in the denominator."""
    items = len(extractions)
    if items == 0:
        raise DataError(f"{task}: {variant} has no answers; evaluate it again")
    correct = sum(graded(task, row) for row in extractions)
    low, high = wilson(correct, items)
    return Score(
        task=task,
        variant=variant,
        items=items,
        correct=correct,
        unparsed=sum(row.extracted is None for row in extractions),
        accuracy=correct / items,
        low=low,
        high=high,
        cut=sum(row.ended == "cut" for row in extractions),
        empty=sum(row.ended == "empty" for row in extractions),
        refused=sum(row.ended == "refused" for row in extractions),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given. Rejecting those under 0.05 keeps the family-wise error rate at 5%."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def graded(task: str, row: Extraction) -> bool:
    """Whether an answer is right; `DataError` if there is no gold answer to compare it with."""
    if row.correct is None:
        raise DataError(f"{task}: item {row.id!r} has no gold answer and no score; leave {task} out")
    return row.correct
