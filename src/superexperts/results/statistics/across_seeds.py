"""Items and seeds together: what a variant's accuracy, or a difference of two, is worth when it was run several times.

Both are samples: other items could have been asked, and another seed would have given another adapter or another draw
of experts. With a balanced table of runs x items, right or wrong, the variance of a mean of R runs over n items is

    items / n + seeds / R,

where `items` is the variance over items of the item's mean over runs (it holds the rest of the two-way analysis of
variance) and `seeds` that between runs once the rest's share is taken off; the seeds' estimate has R - 1 degrees of
freedom, often two. Student's t with Satterthwaite's degrees of freedom is far too sure then (docs/lab-log.md has the
figures), so the distribution is that of the Behrens-Fisher problem: a normal variable for the items plus one scaled
Student's t for each side's seeds (R. A. Fisher, Annals of Eugenics 6 (1935) 391-398; that its size is not over the
level: G. K. Robinson, Annals of Statistics 4 (1976) 963-971). A variance below zero counts as zero.

Suffixes of the arrays' names: R runs, N items, Q points of a quadrature, D draws.
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

__all__ = ["Floats", "Items", "Seeds", "critical", "detectable", "p_value", "seeds_of"]

Floats = NDArray[np.float64]
POINTS = 48
FEW_POINTS = 20  # for a power, which needs two digits
DRAWS = (1, 31, 9)  # of a seeds' variance, for no, one and two sides with seeds
KNOWN = 1000  # a variance with more degrees of freedom is taken as known
TINY = 1e-300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """What the items add to the variance of a difference."""

    variance: float
    df: float = np.inf
    """Degrees of freedom of that estimate; few where subjects are the sample."""


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


def p_value(difference: float, items: Items, seeds: Sequence[Seeds]) -> float:
    """Two-sided p-value of a difference."""
    values_Q, weights_Q = _variances(items, seeds, [part.between for part in seeds])
    return min(1.0, float(_tail(np.asarray(abs(difference)), values_Q, weights_Q)))


def critical(items: Items, seeds: Sequence[Seeds], level: float = 1 - CONFIDENCE) -> float:
    """The difference whose p-value is `level`: half the width of an interval."""
    values_Q, weights_Q = _variances(items, seeds, [part.between for part in seeds])
    return float(_quantile(values_Q, weights_Q, level))


def detectable(square: float, items: Items, seeds: Sequence[Seeds], tests: int, power: float) -> float:
    """The smallest difference that the test would have found with this `power`, were the variances those estimated.

    `square` is the mean over the items of the squared difference, and `items` the variance of its mean if there is no
    difference; at least the difference itself is taken, as where items are won or lost as a whole. The level is 5%
    shared by `tests` tests (the first step of Holm's). What the seeds' variances would have been estimated as is
    averaged over.
    """
    level = (1 - CONFIDENCE) / tests
    shares = (np.arange(DRAWS[len(seeds)]) + 0.5) / DRAWS[len(seeds)]
    factors = [chi.ppf(shares, part.df) ** 2 / part.df for part in seeds]
    own = sum(part.weight * part.sd**2 for part in seeds)
    found = 0.0
    for _ in range(6):  # a larger difference makes the items' variance larger, which has settled by then
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
        spread = float(np.sqrt(max(centred + own, TINY)))
        before, found = found, min(1.0, _powerful(edges_D, spread, power))
        if found == 1 or abs(found - before) < 1e-4:
            break
    return found


def _powerful(edges_D: Floats, spread: float, power: float) -> float:
    """The difference that is beyond one of the equally likely edges with this probability."""
    highest = float(edges_D.max()) + 10 * spread
    return float(brentq(lambda size: float(norm.sf((edges_D - size) / spread).mean()) - power, 0.0, highest))


@functools.cache
def _points(df: float, most: int) -> tuple[Floats, Floats]:
    """Gauss-Legendre points of df / chi**2 with df degrees of freedom, and their weights, which sum to 1."""
    if df > KNOWN:
        return np.ones(1), np.ones(1)
    # With few degrees of freedom points are closest near 0, where the variance is large and small p-values are made.
    points, power = (most, 3) if df < 4 else (min(most, 28), 3) if df < 20 else (16, 1)
    start, end = float(chi.ppf(1e-12, df)), float(chi.isf(1e-12, df))
    nodes_Q, weights_Q = np.polynomial.legendre.leggauss(points)
    u_Q = (nodes_Q + 1) / 2
    x_Q = start + (end - start) * u_Q**power
    weights_Q = weights_Q * u_Q ** (power - 1) * chi.pdf(x_Q, df)
    return df / x_Q**2, weights_Q / weights_Q.sum()


def _variances(
    items: Items, seeds: Sequence[Seeds], between: Sequence[float], points: int = POINTS
) -> tuple[Floats, Floats]:
    """Points of the difference's variance [Q], given the estimates, and their weights [Q]."""
    factor_Q, weights_Q = _points(items.df, points)
    values_Q = items.variance * factor_Q
    for part, estimate in zip(seeds, between, strict=True):
        factor_Q, more_Q = _points(part.df, points)
        added_Q = part.weight * np.maximum(estimate * factor_Q - part.rest, 0.0)
        values_Q = (values_Q[:, None] + added_Q).ravel()
        weights_Q = (weights_Q[:, None] * more_Q).ravel()
    return np.maximum(values_Q, TINY), weights_Q


def _tail(distance: Floats, values_Q: Floats, weights_Q: Floats) -> Floats:
    """P(|difference| > distance), were there none."""
    return np.asarray(2 * np.dot(norm.sf(distance[..., None] / np.sqrt(values_Q)), weights_Q))


def _quantile(values_Q: Floats, weights_Q: Floats, level: float) -> float:
    scale = float(np.sqrt(np.dot(values_Q, weights_Q)))
    highest = 2 * scale
    while float(_tail(np.asarray(highest), values_Q, weights_Q)) > level:
        highest *= 2
    return float(
        brentq(lambda x: float(_tail(np.asarray(x), values_Q, weights_Q)) - level, 0.0, highest, xtol=1e-12 * scale)
    )
