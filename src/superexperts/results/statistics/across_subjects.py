"""Items of one subject depend on each other: variances and intervals with subjects as the sample.

Sources: K.-Y. Liang and S. L. Zeger, Biometrika 73 (1986) 13-22 for the cluster-robust variance, computed by
statsmodels and used with Student's t of clusters - 1 degrees of freedom; B. Efron, Annals of Statistics 7 (1979) 1-26
for the bootstrap, computed by scipy.

Suffixes of array names: N items, G clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.regression.linear_model import OLS

from superexperts.results.statistics.across_seeds import Floats, ItemVariance
from superexperts.results.statistics.single_run import CONFIDENCE

__all__ = ["Clusters", "bootstrap", "clusters_of", "item_variance_by_subject"]

FEWEST = 5
"""With fewer subjects the variance between them is hardly known, and no interval is given."""
MANY = 20
"""With fewer subjects no test is made."""
RESAMPLES = 2000
"""Of the bootstrap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clusters:
    """Which items belong to the same subject."""

    codes_N: NDArray[np.int64]
    """The number of each item's cluster; an item without a subject is a cluster by itself."""
    subjects: int
    """Clusters that are subjects."""

    @property
    def many(self) -> bool:
        """Whether there are enough for a test. With fewer, even Student's t rejects too often."""
        return self.subjects >= MANY


def clusters_of(subjects: Sequence[str | None]) -> Clusters | None:
    """The clusters of items with these subjects; None if there are fewer than five subjects."""
    named = sorted({subject for subject in subjects if subject is not None})
    if len(named) < FEWEST:
        return None
    numbers = {subject: number for number, subject in enumerate(named)}
    codes = [len(named) + place if subject is None else numbers[subject] for place, subject in enumerate(subjects)]
    return Clusters(codes_N=np.array(codes), subjects=len(named))


def item_variance_by_subject(values_N: Floats, clusters: Clusters) -> ItemVariance:
    """Cluster-robust variance of the mean of `values_N`, with the usual correction for few clusters.

    It has subjects - 1 degrees of freedom if every item has a subject. Items without one add theirs, by
    Satterthwaite's formula.
    """
    groups_N = np.unique(clusters.codes_N, return_inverse=True)[1]
    # A regression on a constant: its coefficient is the mean, and its robust variance the one needed.
    fitted = OLS(values_N, np.ones(len(values_N))).fit(cov_type="cluster", cov_kwds={"groups": groups_N}, use_t=True)
    squares_G = np.bincount(groups_N, weights=values_N - values_N.mean()) ** 2
    alone = len(squares_G) - clusters.subjects
    df = float(clusters.subjects - 1)
    if alone and squares_G.sum() > 0:
        share = float(squares_G[: clusters.subjects].sum() / squares_G.sum())  # subjects have the first numbers
        df = 1 / (share**2 / df + (1 - share) ** 2 / alone)
    return ItemVariance(variance=float(np.asarray(fitted.cov_params())[0, 0]), df=df)


def bootstrap(values_N: Floats, clusters: Clusters | None) -> tuple[float, float]:
    """95% percentile interval of the mean, by resampling clusters if there are any, and items otherwise."""
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
        # A fixed seed: results.json must be the same when a study is concluded twice.
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
