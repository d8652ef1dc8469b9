"""Are a study's tests calibrated? Simulates studies without an effect and with a known one.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --studies 1000

A simulated study has a base model and five variants on the same items: two prunings (one fixed, one drawn at random)
and three adapters. An item is answered correctly where a latent normal variable is above a threshold. The variable is
the sum of a part that all models share, an interaction of the item (and of its subject) with the variant, an effect of
the run's seed, and an interaction of the run with the item. All models have the same expected accuracy, except that the
first adapter can have a known advantage.

Prints, with 95% Monte Carlo intervals: the share of null studies with any false alarm after Holm's correction, in the
family of comparisons with base and in the family of controls; how often each 95% interval covers the true value; and
the power found at the difference for which `detectable` predicts 80%.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from superexperts.results.statistics import across_seeds
from superexperts.results.statistics.across_seeds import ItemVariance, SeedVariance, seed_variance
from superexperts.results.statistics.across_subjects import Clusters, bootstrap, clusters_of, item_variance_by_subject
from superexperts.results.statistics.paired import compare_without_bootstrap, item_variance, proportion
from superexperts.results.statistics.single_run import detectable, holm, wilson

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """How studies are simulated. The variances are shares of the latent variable's variance, which is 1."""

    title: str
    items: int = 600
    subjects: int = 0
    """0: items have no subjects."""
    runs: tuple[int, ...] = (1, 1, 1, 1, 1, 1)
    """Runs of base, of the fixed pruning, of the random one, and of the three adapters."""
    subject: float = 0.0
    """Variance of the subject, the same for all models."""
    variant: float = 0.03
    """Variance of the interaction of item and variant."""
    variant_subject: float = 0.0
    """Variance of the interaction of subject and variant."""
    seed: float = 0.0
    """Variance of the seed; only for variants where another seed gives another model."""
    rest: float = 0.02
    """Variance of the interaction of run and item; for the same variants as `seed`."""


# For each model, whether another seed would give another model.
RANDOM = (False, False, True, True, True, True)
SEVERAL = (1, 1, 5, 3, 3, 3)
DESIGNS = (
    Design(title="one run each"),
    Design(title="one run each, few items differ", variant=0.002, rest=0.0005),
    Design(title="one run each, 57 subjects", items=1140, subjects=57, subject=0.1, variant_subject=0.01),
    Design(title="several, seeds alike", runs=SEVERAL),
    Design(title="several, seed SD 1 point", runs=SEVERAL, seed=0.00086),
    Design(title="several, seed SD 4 points", runs=SEVERAL, seed=0.0137),
    Design(title="several, few items differ", runs=SEVERAL, variant=0.002, rest=0.0005),
    Design(title="two seeds, SD 2 points", runs=(1, 1, 2, 2, 2, 2), seed=0.00343),
    Design(title="several, SD 1 point, 57 subjects", items=1140, subjects=57, runs=SEVERAL, subject=0.1,
           variant_subject=0.01, seed=0.00086),
)  # fmt: skip
LEVEL = 0.55  # expected accuracy of all models
LARGEST = 0.42  # effect
PAIRS = {
    "base": [(variant, 0) for variant in range(1, 6)],
    "control": [(1, 2), (3, 4), (3, 5)],  # the fixed pruning and the first adapter against the others of their kind
}


def study(rng: np.random.Generator, design: Design, effect: float = 0.0) -> tuple[list[Floats], Clusters | None]:
    """Correct (1) or wrong (0) answers, [runs, items], of base and the five variants, and the clusters of subjects.

    `effect` is added to the expected accuracy of the first adapter, the fourth model."""
    groups_N = np.arange(design.items) % max(design.subjects, 1)
    varied = design.seed + design.rest
    common = 1 - design.subject - design.variant - design.variant_subject - varied
    shared_N = np.sqrt(common) * rng.standard_normal(design.items)
    shared_N += np.sqrt(design.subject) * rng.standard_normal(max(design.subjects, 1))[groups_N]
    models = []
    for model, runs in enumerate(design.runs):
        random = RANDOM[model]
        own_N = np.sqrt(design.variant + (0 if random else varied)) * rng.standard_normal(design.items)
        own_N += np.sqrt(design.variant_subject) * rng.standard_normal(max(design.subjects, 1))[groups_N]
        run_RN = np.zeros((runs, 1))
        if random:
            run_RN = np.sqrt(design.seed) * rng.standard_normal((runs, 1))
            run_RN = run_RN + np.sqrt(design.rest) * rng.standard_normal((runs, design.items))
        threshold = norm.isf(LEVEL + (effect if model == 3 else 0.0))
        models.append((shared_N + own_N + run_RN > threshold).astype(np.float64))
    subjects = [f"s{group}" for group in groups_N] if design.subjects else []
    return models, clusters_of(subjects)


def row_of(
    models: list[Floats], clusters: Clusters | None, pair: tuple[int, int], tests: int
) -> tuple[dict[str, Any], Callable[[], float]]:
    variant, reference = pair
    return compare_without_bootstrap(
        models[variant],
        models[reference],
        clusters,
        tests=tests,
        random=(RANDOM[variant], RANDOM[reference]),
    )


def share(count: int, total: int) -> str:
    low, high = wilson(count, total)
    return f"{count / total:6.1%} [{low:.1%}, {high:.1%}]"


@dataclasses.dataclass
class Counts:
    """Counts over null studies: false alarms, and how often each interval covered the truth."""

    studies: int = 0
    base: int = 0
    control: int = 0
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    asked: dict[str, int] = dataclasses.field(default_factory=dict)

    def hold(self, name: str, interval: tuple[float, float] | None, truth: float) -> None:
        if interval is not None:
            self.asked[name] = self.asked.get(name, 0) + 1
            self.held[name] = self.held.get(name, 0) + (interval[0] <= truth <= interval[1])


def null_studies(design: Design, studies: int, seed: int) -> Counts:
    """False alarms and coverage; the bootstrap is measured on the first adapter against base."""
    rng = np.random.default_rng(seed)
    counts = Counts(studies=studies)
    for _ in range(studies):
        models, clusters = study(rng, design)
        for family, pairs in PAIRS.items():
            rows = [row_of(models, clusters, pair, len(pairs))[0] for pair in pairs]
            alarm = min(holm([row["p"] for row in rows])) < 0.05
            setattr(counts, family, getattr(counts, family) + alarm)
            if family == "base":
                counts.hold("difference", (rows[2]["low"], rows[2]["high"]), 0.0)
                counts.hold("difference, by subject", rows[2]["clustered"], 0.0)
        counts.hold("bootstrap", bootstrap(models[3].mean(0) - models[0].mean(0), clusters), 0.0)
        _, interval, clustered = proportion(models[3], clusters)
        counts.hold("accuracy", interval, LEVEL)
        counts.hold("accuracy, by subject", clustered, LEVEL)
    return counts


def predicted(design: Design, seed: int, studies: int = 500) -> float | None:
    """The difference for which `detectable` predicts a power of 80%, given the average variances of studies with it.

    A single study predicts from its own estimates, which are far from the average with two or three seeds. The
    variances depend on the effect, so this searches for the effect that its own studies call just detectable. None
    above 42 points, for which an accuracy of 55% leaves no room.
    """

    def beyond(effect: float) -> float:
        """The smallest detectable difference in studies with this effect, minus the effect."""
        rng = np.random.default_rng(seed)
        found: list[tuple[float, ...]] = []
        for _ in range(studies):
            models, clusters = study(rng, design, effect)
            difference_N = models[3].mean(0) - models[0][0]
            _, null = item_variance(difference_N)
            part = seed_variance(models[3]) if len(models[3]) > 1 else None
            between, rest = (part.between, part.rest) if part is not None else (0.0, 0.0)
            by_subject = item_variance_by_subject(difference_N, clusters).variance if clusters is not None else 0.0
            found.append((float((difference_N**2).mean()), null.variance, by_subject, between, rest))
        square, variance, by_subject, between, rest = np.mean(found, axis=0).tolist()
        runs = design.runs[3]
        parts = [SeedVariance(between=between, df=runs - 1, rest=rest, weight=1 / runs)] if runs > 1 else []
        sizes = [detectable(round(square * design.items), design.items, 5)]
        if parts:
            sizes = [across_seeds.detectable(square, ItemVariance(variance=variance), parts, 5, 0.8)]
        if design.subjects:
            wider = ItemVariance(variance=max(by_subject, variance), df=design.subjects - 1)
            sizes.append(across_seeds.detectable(square, wider, parts, 5, 0.8))
        return max(sizes) - effect

    if beyond(LARGEST) > 0:
        return None
    return float(brentq(beyond, 0.005, LARGEST, xtol=0.0005))


def power(design: Design, effect: float, studies: int, seed: int) -> int:
    """How many studies detect the first adapter's effect at Holm's first step, the level of the prediction."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(studies):
        models, clusters = study(rng, design, effect)
        found += row_of(models, clusters, (3, 0), 5)[0]["p"] < 0.05 / 5
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="null studies of each design")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    gc.freeze()  # statsmodels' Holm collects garbage at each call, which would otherwise take most of the time
    for design in DESIGNS:
        counts = null_studies(design, options.studies, options.seed)
        print(f"{design.title}: {options.studies} null studies, {design.items} items, runs {design.runs}")
        print(f"  false alarms, against base        {share(counts.base, counts.studies)}")
        print(f"  false alarms, controls            {share(counts.control, counts.studies)}")
        for name, held in counts.held.items():
            print(f"  interval covers: {name:24} {share(held, counts.asked[name])}")
        effect = predicted(design, options.seed + 1)
        if effect is None:
            print("  power of 80% only above 42 points", flush=True)
            continue
        found = power(design, effect, options.studies, options.seed + 2)
        print(f"  power at {100 * effect:4.1f} points              {share(found, options.studies)}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
