"""Accuracies and differences of variants that were run with several seeds: p-values, intervals, power.

Items and seeds are both samples. Other items could have been asked, and another seed would have given another adapter
or another draw of experts. For a balanced table of R runs x N items, right or wrong, the variance of the mean is

    item variance / N + seed variance / R.

The item variance is the variance over the items of an item's mean over the runs; it includes the residual of the
two-way analysis of variance. The seed variance is the variance between the runs' accuracies minus the residual's
share. Its estimate has R - 1 degrees of freedom, often only two, and Student's t with Satterthwaite's degrees of
freedom then rejects far too often (docs/decisions/11-seeds-as-a-random-effect.md has the figures). So the null
distribution is that of the Behrens-Fisher problem: a normal variable for the items plus one scaled Student's t for
the seeds of each side (R. A. Fisher, Annals of Eugenics 6 (1935) 391-398; that its size does not exceed the level:
G. K. Robinson, Annals of Statistics 4 (1976) 963-971). A negative variance estimate counts as zero.

Suffixes of array names: R runs, N items, Q points of a quadrature, D draws.
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

from superexperts.results.statistics.single_run import CONFIDENCE

__all__ = ["Floats", "ItemVariance", "SeedVariance", "detectable", "half_width", "p_value", "seed_variance"]

Floats = NDArray[np.float64]
POINTS = 48
"""Points of the quadrature over each estimated variance."""
FEW_POINTS = 20
"""The same for a power, which needs only two digits."""
DRAWS = (1, 31, 9)
"""Quantiles of each seed variance's estimate that a power is averaged over, for no, one and two sides with seeds."""
KNOWN = 1000
"""A variance estimated with more degrees of freedom than this is taken as known."""
TINY = 1e-300
"""Keeps square roots and divisions away from zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemVariance:
    """What the choice of items adds to the variance of a difference."""

    variance: float
    df: float = np.inf
    """Degrees of freedom of the estimate; few where subjects, not items, are the sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedVariance:
    """What the choice of seeds on one side adds to the variance of a difference."""

    between: float
    """Variance between the runs' accuracies; includes the residual's share."""
    df: int
    """Runs - 1."""
    rest: float
    """The residual's share of `between`: its mean square divided by the number of items."""
    weight: float
    """1 / runs; larger where the only run of the other side is assumed to vary as much."""

    @property
    def sd(self) -> float:
        """Standard deviation between seeds, without the residual's share."""
        return float(np.sqrt(max(self.between - self.rest, 0.0)))


def seed_variance(correct_RN: Floats) -> SeedVariance:
    """The seed variance of several runs [R, N], R at least 2: right (1) or wrong (0) answers to the same items."""
    runs, items = correct_RN.shape
    rest_RN = correct_RN - correct_RN.mean(0) - correct_RN.mean(1, keepdims=True) + correct_RN.mean()
    # Interaction residual of a two-way table: (R - 1)(N - 1) degrees of freedom.
    rest = float((rest_RN**2).sum()) / ((runs - 1) * max(items - 1, 1))
    between = float(correct_RN.mean(1).var(ddof=1))
    return SeedVariance(between=between, df=runs - 1, rest=rest / items, weight=1 / runs)


def p_value(difference: float, items: ItemVariance, seeds: Sequence[SeedVariance]) -> float:
    """Two-sided p-value of a difference, of no difference as the null hypothesis."""
    values_Q, weights_Q = _variances(items, seeds, [part.between for part in seeds])
    return min(1.0, float(_tail(np.asarray(abs(difference)), values_Q, weights_Q)))


def half_width(items: ItemVariance, seeds: Sequence[SeedVariance], level: float = 1 - CONFIDENCE) -> float:
    """Half the width of the two-sided interval: the difference that has `level` as its p-value."""
    values_Q, weights_Q = _variances(items, seeds, [part.between for part in seeds])
    return float(_quantile(values_Q, weights_Q, level))


def detectable(square: float, items: ItemVariance, seeds: Sequence[SeedVariance], tests: int, power: float) -> float:
    """The smallest difference that the test detects with this `power`, if the variances are those estimated.

    `square` is the mean over the items of the squared difference, `items` the variance of the mean difference under
    the null hypothesis. The level is 5% divided by `tests` (the first step of Holm's procedure). The power is averaged
    over what another study would have estimated as the seed variances.
    """
    level = (1 - CONFIDENCE) / tests
    # Midpoints of equal slices of probability: a deterministic average needs far fewer points than random draws.
    shares = (np.arange(DRAWS[len(seeds)]) + 0.5) / DRAWS[len(seeds)]
    factors = [chi.ppf(shares, part.df) ** 2 / part.df for part in seeds]
    seed_variance_of_mean = sum(part.weight * part.sd**2 for part in seeds)
    found = 0.0
    # The squared difference of an item is at least the difference itself if items are won or lost as a whole, so a
    # larger difference makes the item variance larger. The iteration settles within six rounds.
    for _ in range(6):
        larger = max(square, found) / max(square, TINY)
        part = dataclasses.replace(items, variance=items.variance * larger)
        edges_D = np.array(
            [
                _quantile(
                    *_variances(
                        part, seeds, [seed.between * f for seed, f in zip(seeds, drawn, strict=True)], FEW_POINTS
                    ),
                    level,
                )
                for drawn in itertools.product(*factors)
            ]
        )
        centred = part.variance * (1 - found**2 / max(square, found, TINY))
        spread = float(np.sqrt(max(centred + seed_variance_of_mean, TINY)))
        before, found = found, min(1.0, _powerful(edges_D, spread, power))
        if found == 1 or abs(found - before) < 1e-4:
            break
    return found


def _powerful(edges_D: Floats, spread: float, power: float) -> float:
    """The true difference at which the estimate exceeds the critical value, one of `edges_D`, with this probability."""
    highest = float(edges_D.max()) + 10 * spread
    return float(brentq(lambda size: float(norm.sf((edges_D - size) / spread).mean()) - power, 0.0, highest))


@functools.cache
def _points(df: float, most: int) -> tuple[Floats, Floats]:
    """Gauss-Legendre points of df / chi**2 with df degrees of freedom, and their weights, which sum to 1."""
    if df > KNOWN:
        return np.ones(1), np.ones(1)
    # With few degrees of freedom, place most points near 0: there the variance is large, which decides small p-values.
    points, power = (most, 3) if df < 4 else (min(most, 28), 3) if df < 20 else (16, 1)
    start, end = float(chi.ppf(1e-12, df)), float(chi.isf(1e-12, df))
    nodes_Q, weights_Q = np.polynomial.legendre.leggauss(points)
    u_Q = (nodes_Q + 1) / 2
    x_Q = start + (end - start) * u_Q**power
    weights_Q = weights_Q * u_Q ** (power - 1) * chi.pdf(x_Q, df)
    return df / x_Q**2, weights_Q / weights_Q.sum()


def _variances(
    items: ItemVariance, seeds: Sequence[SeedVariance], between: Sequence[float], points: int = POINTS
) -> tuple[Floats, Floats]:
    """Quadrature points [Q] of the variance of the difference, given the estimates, and their weights [Q]."""
    factor_Q, weights_Q = _points(items.df, points)
    values_Q = items.variance * factor_Q
    for part, estimate in zip(seeds, between, strict=True):
        factor_Q, more_Q = _points(part.df, points)
        # The difference of two mean squares can be negative; a variance cannot.
        added_Q = part.weight * np.maximum(estimate * factor_Q - part.rest, 0.0)
        values_Q = (values_Q[:, None] + added_Q).ravel()
        weights_Q = (weights_Q[:, None] * more_Q).ravel()
    return np.maximum(values_Q, TINY), weights_Q


def _tail(distance: Floats, values_Q: Floats, weights_Q: Floats) -> Floats:
    """P(|difference| > distance) under the null hypothesis."""
    return np.asarray(2 * np.dot(norm.sf(distance[..., None] / np.sqrt(values_Q)), weights_Q))


def _quantile(values_Q: Floats, weights_Q: Floats, level: float) -> float:
    """The distance with a tail probability of `level`."""
    scale = float(np.sqrt(np.dot(values_Q, weights_Q)))
    highest = 2 * scale
    # Heavy tails (one degree of freedom) can put the quantile far beyond two standard deviations.
    while float(_tail(np.asarray(highest), values_Q, weights_Q)) > level:
        highest *= 2
    return float(
        brentq(lambda x: float(_tail(np.asarray(x), values_Q, weights_Q)) - level, 0.0, highest, xtol=1e-12 * scale)
    )
