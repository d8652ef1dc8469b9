"""Items that depend on each other: those of one subject. What an interval is when subjects are the sample.

Sources: K.-Y. Liang and S. L. Zeger, Biometrika 73 (1986) 13-22 for the covariance, as statsmodels computes it, with
Student's t of clusters - 1 degrees of freedom; B. Efron, Annals of Statistics 7 (1979) 1-26 for the bootstrap, by
scipy.

Suffixes of the arrays' names: N items, G clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.regression.linear_model import OLS

from superexperts.results.statistics.across_seeds import Floats, Items
from superexperts.results.statistics.single_run import CONFIDENCE

__all__ = ["Clusters", "bootstrap", "clusters_of", "items"]

FEWEST = 5  # with fewer clusters their variance says next to nothing
MANY = 20
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clusters:
    """Which items belong together."""

    codes_N: NDArray[np.int64]
    """A number for each item's cluster; an item without a subject is a cluster of its own."""
    subjects: int
    """Clusters that are subjects."""

    @property
    def many(self) -> bool:
        """Whether there are enough for a test: with few, even Student's t does not make up for their variance's."""
        return self.subjects >= MANY


def clusters_of(subjects: Sequence[str | None]) -> Clusters | None:
    """From each item's subject; None where there are fewer than five."""
    named = sorted({subject for subject in subjects if subject is not None})
    if len(named) < FEWEST:
        return None
    numbers = {subject: number for number, subject in enumerate(named)}
    codes = [len(named) + place if subject is None else numbers[subject] for place, subject in enumerate(subjects)]
    return Clusters(codes_N=np.array(codes), subjects=len(named))


def items(values_N: Floats, clusters: Clusters) -> Items:
    """Variance of the mean of `values_N`, cluster-robust, with the usual correction for few clusters.

    Its degrees of freedom are subjects - 1 where every item has a subject; items that stand for themselves add theirs,
    by Satterthwaite.
    """
    groups_N = np.unique(clusters.codes_N, return_inverse=True)[1]
    fitted = OLS(values_N, np.ones(len(values_N))).fit(cov_type="cluster", cov_kwds={"groups": groups_N}, use_t=True)
    squares_G = np.bincount(groups_N, weights=values_N - values_N.mean()) ** 2
    alone = len(squares_G) - clusters.subjects
    df = float(clusters.subjects - 1)
    if alone and squares_G.sum() > 0:
        share = float(squares_G[: clusters.subjects].sum() / squares_G.sum())  # subjects have the first numbers
        df = 1 / (share**2 / df + (1 - share) ** 2 / alone)
    return Items(variance=float(np.asarray(fitted.cov_params())[0, 0]), df=df)


def bootstrap(values_N: Floats, clusters: Clusters | None) -> tuple[float, float]:
    """95% percentile interval of the mean over resampled items, or over resampled clusters where there are any."""
    groups = np.arange(len(values_N))
    if clusters is not None:
        groups = np.unique(clusters.codes_N, return_inverse=True)[1]
    sums_G, sizes_G = np.bincount(groups, weights=values_N), np.bincount(groups)
    if len(sums_G) < 2:
        return float(values_N.mean()), float(values_N.mean())
    interval = stats.bootstrap(
        (sums_G, sizes_G),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
