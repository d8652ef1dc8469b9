"""Items and seeds together: what a variant's accuracy, or a difference of two, is worth when it was run several times.

Both are samples: other items could have been asked, and another seed would have given another adapter or another draw
of experts. With a balanced table of runs x items, right or wrong, the variance of a mean of R runs over n items is

    items / n + seeds / R,

where `items` is the variance over items of the item's mean over runs (it holds the rest of the two-way analysis of
variance) and `seeds` that between runs once the rest's share is taken off; the seeds' estimate has R - 1 degrees of
freedom, often two. The distribution is that of the Behrens-Fisher problem: a normal variable for the items plus one
scaled Student's t for each side's seeds (R. A. Fisher, Annals of Eugenics 6 (1935) 391-398; that its size is not over
the level: G. K. Robinson, Annals of Statistics 4 (1976) 963-971).

Suffixes of the arrays' names: R runs, N items, Q points of a quadrature.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import chi, norm

from .stats import CONFIDENCE

__all__ = ["Seeds", "critical", "detectable", "p_value", "seeds_of"]

Floats = NDArray[np.float64]
POINTS = 48
TINY = 1e-300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
    """What runs with several seeds add to the variance of a difference."""

    between: float
    """Variance between the runs' accuracies: the seeds' own, and the rest's share."""
    df: int
    """Runs - 1."""
    rest: float
    """The rest's share of `between`: its mean square over the items."""
    weight: float
    """1 / runs; more where the other side's only run is taken to vary as much."""

    @property
    def sd(self) -> float:
        """Standard deviation between seeds, the rest's share taken off."""
        return float(np.sqrt(max(self.between - self.rest, 0.0)))


def seeds_of(correct_RN: Floats) -> Seeds:
    """The seeds' part of several runs [R, N], R at least 2, of right (1) or wrong (0) answers to the same items."""
    runs, items = correct_RN.shape
    rest_RN = correct_RN - correct_RN.mean(0) - correct_RN.mean(1, keepdims=True) + correct_RN.mean()
    rest = float((rest_RN**2).sum()) / ((runs - 1) * max(items - 1, 1))
    between = float(correct_RN.mean(1).var(ddof=1))
    return Seeds(between=between, df=runs - 1, rest=rest / items, weight=1 / runs)


@functools.cache
def _points(df: float) -> tuple[Floats, Floats]:
    """Gauss-Legendre points of df / chi**2 with df degrees of freedom, and their weights, which sum to 1."""
    if df > 1e6:
        return np.ones(1), np.ones(1)
    end = float(chi.isf(1e-12, df))
    start = float(chi.ppf(1e-12, df)) if df > 30 else 0.0
    x_Q, weights_Q = np.polynomial.legendre.leggauss(POINTS)
    x_Q = start + (end - start) * (x_Q + 1) / 2
    weights_Q = weights_Q * chi.pdf(x_Q, df)
    return df / x_Q**2, weights_Q / weights_Q.sum()


def _variances(items: float, items_df: float, seeds: Sequence[Seeds]) -> tuple[Floats, Floats]:
    """Points of the difference's variance, given what was estimated, and their weights."""
    factors = [_points(items_df), *(_points(part.df) for part in seeds)]
    values = np.zeros(1)
    weights = np.ones(1)
    for scale, (factor_Q, weights_Q) in zip([None, *seeds], factors, strict=True):
        if scale is None:
            added_Q = items * factor_Q
        else:
            added_Q = scale.weight * np.maximum(scale.between * factor_Q - scale.rest, 0.0)
        values = (values[:, None] + added_Q).ravel()
        weights = (weights[:, None] * weights_Q).ravel()
    return values, weights


def p_value(difference: float, items: float, seeds: Sequence[Seeds], items_df: float = np.inf) -> float:
    """Two-sided p-value of a difference whose items' part of the variance is `items`; 1.0 where nothing differs."""
    if difference == 0:
        return 1.0
    values, weights = _variances(items, items_df, seeds)
    return _tail(abs(difference), values, weights)


def critical(items: float, seeds: Sequence[Seeds], items_df: float = np.inf, level: float = 1 - CONFIDENCE) -> float:
    """The difference whose p-value is `level`: half the width of an interval."""
    values, weights = _variances(items, items_df, seeds)
    return _quantile(values, weights, level)


def _tail(distance: float, values: Floats, weights: Floats) -> float:
    return min(1.0, 2 * float(np.dot(weights, norm.sf(distance / np.sqrt(np.maximum(values, TINY))))))


def _quantile(values: Floats, weights: Floats, level: float) -> float:
    scale = float(np.sqrt(values.max()))
    if scale == 0:
        return 0.0
    return float(brentq(lambda x: _tail(x, values, weights) - level, 0.0, 40 * scale, xtol=1e-10))


def detectable(
    square: float, items: int, seeds: Sequence[Seeds], tests: int = 1, power: float = 0.8, points: int = 8
) -> float:
    """The smallest difference that the test would have found with this `power`, were the variances those estimated.

    `square` is the mean over the items of the squared difference; at least the difference itself is taken, as where
    items are won or lost as a whole. The level is 5% shared by `tests` tests (the first step of Holm's).
    """
    level = (1 - CONFIDENCE) / tests

    # What the seeds' estimates could have been: chi-square around the variances that were found.
    draws = []
    for part in seeds:
        shares = (np.arange(points) + 0.5) / points
        draws.append([part.between * float(x) ** 2 / part.df for x in chi.ppf(shares, part.df)])
    true = sum(part.weight * max(part.between - part.rest, 0.0) for part in seeds)

    def lacking(difference: float) -> float:
        own = (max(square, difference) - difference**2) / items
        found = 0.0
        for drawn in itertools.product(*draws):
            drawn_seeds = [
                dataclasses.replace(part, between=between) for part, between in zip(seeds, drawn, strict=True)
            ]
            edge = critical(own, drawn_seeds, level=level)
            found += float(norm.sf((edge - difference) / max(np.sqrt(own + true), TINY)))
        return found / float(points ** len(seeds)) - power

    return float(brentq(lacking, 1e-9, 1.0, xtol=1e-5)) if lacking(1.0) > 0 else 1.0
