"""Items, seeds and subjects: against stock analyses of variance, numerical integration, formulas and simulation."""

from __future__ import annotations

import gc
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import integrate
from scipy.stats import norm
from scipy.stats import t as student
from statsmodels.formula.api import ols
from statsmodels.regression.linear_model import OLS
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.anova import anova_lm

from superexperts.results.statistics import across_seeds, across_subjects
from superexperts.results.statistics.across_seeds import ItemVariance, SeedVariance, seed_variance
from superexperts.results.statistics.across_subjects import clusters_of
from superexperts.results.statistics.paired import compare, proportion
from superexperts.results.statistics.single_run import mcnemar, wilson


def answers(runs: int, items: int, *, share: float = 0.6, flips: float = 0.1, seed: int = 0) -> Any:
    """Runs that agree on most items."""
    rng = np.random.default_rng(seed)
    base_N = rng.random(items) < share
    return (base_N ^ (rng.random((runs, items)) < flips)).astype(float)


def test_seeds_are_those_of_the_two_way_analysis_of_variance() -> None:
    correct_RN = answers(4, 30)
    frame = pd.DataFrame({"y": correct_RN.ravel(), "run": np.repeat(range(4), 30), "item": np.tile(range(30), 4)})
    table = anova_lm(ols("y ~ C(run) + C(item)", frame).fit())
    squares = table["sum_sq"] / table["df"]
    found = seed_variance(correct_RN)
    assert found.between == pytest.approx(squares["C(run)"] / 30)
    assert found.rest == pytest.approx(squares["Residual"] / 30)
    assert (found.df, found.weight) == (3, 0.25)
    assert found.sd == pytest.approx(math.sqrt(max(0, squares["C(run)"] - squares["Residual"]) / 30))


def test_seeds_are_those_of_a_mixed_model() -> None:
    rng = np.random.default_rng(0)
    values_RN = rng.normal(size=40) + 0.7 * rng.normal(size=(4, 1)) + 0.8 * rng.normal(size=(4, 40))
    frame = pd.DataFrame(
        {"y": values_RN.ravel(), "run": np.repeat(range(4), 40), "item": np.tile(range(40), 4), "one": 1}
    )
    parts = {"run": "0 + C(run)", "item": "0 + C(item)"}
    fitted = MixedLM.from_formula("y ~ 1", groups="one", vc_formula=parts, data=frame).fit(reml=True)
    between = dict(zip(fitted.model.exog_vc.names, fitted.vcomp, strict=True))["run"]
    found = seed_variance(values_RN)
    assert found.sd**2 == pytest.approx(between, rel=1e-3)
    assert found.rest * 40 == pytest.approx(fitted.scale, rel=1e-3)
    items = values_RN.mean(0).var(ddof=1) / 40
    assert items + found.weight * found.sd**2 == pytest.approx(
        fitted.cov_params().loc["Intercept", "Intercept"], rel=1e-3
    )


@pytest.mark.parametrize("df", [1, 2, 4])
@pytest.mark.parametrize(("items", "between"), [(1.0, 1.0), (1.0, 0.01), (0.01, 1.0)])
def test_p_value_is_the_tail_of_a_normal_and_a_scaled_t(df: int, items: float, between: float) -> None:
    part = SeedVariance(between=between, df=df, rest=0.0, weight=1.0)
    for distance in (0.5, 2.0, 5.0):

        def both_tails(x: float, distance: float = distance) -> float:
            ends = [(side * distance - math.sqrt(between) * x) / math.sqrt(items) for side in (1, -1)]
            return float(student.pdf(x, df) * (norm.sf(ends[0]) + norm.cdf(ends[1])))

        expected = integrate.quad(both_tails, -np.inf, np.inf, limit=2000, epsabs=1e-12)[0]
        assert across_seeds.p_value(distance, ItemVariance(variance=items), [part]) == pytest.approx(expected, rel=1e-3)
        edge = across_seeds.half_width(ItemVariance(variance=items), [part], expected)
        assert edge == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("df", [4, 9, 30, 56, 900])
def test_items_alone_are_students_t(df: int) -> None:
    for distance in (0.5, 2.0, 4.0):
        found = across_seeds.p_value(distance, ItemVariance(variance=1.0, df=df), [])
        assert found == pytest.approx(2 * student.sf(distance, df), rel=5e-3)


def test_two_sides_against_simulation() -> None:
    rng = np.random.default_rng(1)
    parts = [
        SeedVariance(between=2.0, df=2, rest=0.0, weight=1 / 3),
        SeedVariance(between=1.0, df=4, rest=0.0, weight=1 / 5),
    ]
    draws = 0.5 * rng.standard_normal(10**6)
    draws += math.sqrt(2 / 3) * rng.standard_t(2, 10**6) + math.sqrt(1 / 5) * rng.standard_t(4, 10**6)
    for distance in (1.0, 3.0):
        expected = float((abs(draws) > distance).mean())
        assert across_seeds.p_value(distance, ItemVariance(variance=0.25), parts) == pytest.approx(expected, abs=0.0015)


def test_a_seed_variance_below_zero_counts_as_zero() -> None:
    # Runs that are all equally often right say that seeds add nothing, and never that items add less.
    part = SeedVariance(between=0.0, df=2, rest=1e-4, weight=1 / 3)
    assert part.sd == 0
    assert across_seeds.half_width(ItemVariance(variance=1e-4), [part]) == pytest.approx(1.96 * 0.01, rel=1e-3)


def test_clustered_interval_is_statsmodels_and_the_sandwich() -> None:
    rng = np.random.default_rng(2)
    names = [f"s{number % 12}" for number in range(240)]
    shift = rng.normal(0, 0.3, 12)
    values_N = rng.normal(0, 0.3, 240) + np.array([shift[number % 12] for number in range(240)])
    found = clusters_of(names)
    assert found is not None
    items = across_subjects.item_variance_by_subject(values_N, found)
    sums = [sum(values_N[i] - values_N.mean() for i in range(240) if names[i] == name) for name in set(names)]
    expected = 12 / 11 * 239 / 239 * sum(one**2 for one in sums) / 240**2
    assert items.variance == pytest.approx(expected)
    assert items.df == 11
    fitted = OLS(values_N, np.ones(240)).fit(cov_type="cluster", cov_kwds={"groups": found.codes_N}, use_t=True)
    half = across_seeds.half_width(items, [])
    assert [values_N.mean() - half, values_N.mean() + half] == pytest.approx(list(fitted.conf_int()[0]), rel=1e-4)


def test_items_without_a_subject_stand_for_themselves() -> None:
    subjects = [*("abcdef" * 3), *[None] * 20]
    found = clusters_of(subjects)
    assert found is not None
    assert (found.subjects, len(set(found.codes_N))) == (6, 26)
    values_N = np.random.default_rng(3).normal(size=38)
    assert 5 < across_subjects.item_variance_by_subject(values_N, found).df < 25
    assert clusters_of(["a", "b", "c", "d", None]) is None
    assert clusters_of([]) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_against_a_loop(grouped: bool) -> None:
    rng = np.random.default_rng(4)
    values_N = rng.choice([-1.0, 0.0, 1.0], size=200, p=[0.1, 0.7, 0.2])
    found = clusters_of([f"s{number // 10}" for number in range(200)]) if grouped else None
    blocks = values_N.reshape(20, 10) if grouped else values_N.reshape(200, 1)
    means = [blocks[rng.integers(0, len(blocks), len(blocks))].mean() for _ in range(4000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert across_subjects.bootstrap(values_N, found) == pytest.approx(tuple(expected), abs=0.012)
    assert across_subjects.bootstrap(values_N, found) == across_subjects.bootstrap(values_N, found)


def test_one_run_each_is_mcnemar() -> None:
    one, other = answers(1, 200, seed=5), answers(1, 200, seed=6)
    row, pair = compare(one, other), mcnemar(list(other[0] > 0), list(one[0] > 0))
    names = ("only_base", "only_variant", "difference", "low", "high", "p")
    assert [row[name] for name in names] == pytest.approx([getattr(pair, name) for name in names])
    assert (row["test"], row["runs"], row["seed_sd"]) == ("mcnemar", [1, 1], [None, None])


def test_twenty_subjects_and_more_enter_the_test() -> None:
    # Half of the subjects are won as a whole and a fifth lost: many items, few subjects.
    signs = np.array([1] * 12 + [-1] * 4 + [0] * 8)
    one = np.repeat(signs > 0, 10).astype(float)[None]
    other = np.repeat(signs < 0, 10).astype(float)[None]
    found = clusters_of([f"s{number // 10}" for number in range(240)])
    alone, together = compare(one, other), compare(one, other, found)
    assert alone["p"] < 1e-9
    means = signs.astype(float)
    t = means.mean() / math.sqrt(means.var(ddof=1) / 24)
    assert together["p"] == pytest.approx(2 * student.sf(t, 23), rel=5e-3)
    assert (together["subjects"], alone["subjects"]) == (24, None)
    assert together["detectable"] > alone["detectable"]
    few = clusters_of([f"s{number // 24}" for number in range(240)])
    assert compare(one, other, few)["p"] == alone["p"]
    assert compare(one, other, few)["clustered"] is not None


def test_several_runs_widen_what_one_run_seems_to_know() -> None:
    base = answers(1, 400, flips=0.0)
    steady = np.repeat(answers(1, 400, seed=0), 3, axis=0)
    moving = np.stack(
        [base[0] * (np.random.default_rng(k).random(400) < share) for k, share in enumerate((1, 0.9, 0.7))]
    )
    calm, wild = compare(steady, base, random=(True, False)), compare(moving, base, random=(True, False))
    assert (calm["test"], calm["seed_sd"][1]) == ("seeds", None)
    assert calm["seed_sd"][0] == 0
    assert wild["seed_sd"][0] > 0.05
    assert wild["high"] - wild["low"] > 4 * (calm["high"] - calm["low"])
    assert wild["p"] > 0.05 > mcnemar(list(base[0] > 0), list(moving[2] > 0)).p
    # One run of a side that another seed would change is taken to vary as the other side's runs do.
    lone = compare(moving, base, random=(True, True))
    assert lone["high"] - lone["low"] > 1.5 * (wild["high"] - wild["low"])


def test_no_item_that_differs_is_no_certainty() -> None:
    same = np.repeat(answers(1, 100), 3, axis=0)
    row = compare(same, same)
    assert row["p"] == 1
    assert row["low"] < 0 < row["high"]
    every = compare(np.ones((3, 12)), np.zeros((1, 12)), random=(True, False))
    assert 1e-5 < every["p"] < 0.01


def test_proportion() -> None:
    one = answers(1, 150)
    accuracy, interval, clustered = proportion(one, None)
    assert (accuracy, clustered) == (pytest.approx(one.mean()), None)
    assert interval == pytest.approx(wilson(int(one.sum()), 150))
    accuracy, wide, _ = proportion(np.stack([np.ones(150), np.ones(150), np.arange(150) % 3 > 0]).astype(float), None)
    assert wide[0] < accuracy < wide[1]
    assert wide[1] - wide[0] > 0.2
    assert proportion(np.zeros((3, 50)), None)[1] == pytest.approx(wilson(0, 50))


@pytest.fixture(scope="module")
def calibration() -> Iterator[Any]:
    """The benchmark's module."""
    file = Path(__file__).parents[3] / "benchmarks" / "calibration.py"
    spec = importlib.util.spec_from_file_location("calibration", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    gc.freeze()  # statsmodels' Holm collects garbage at each call
    yield module
    gc.unfreeze()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"runs": (1, 1, 5, 3, 3, 3), "seed": 0.0137},
        {"runs": (1, 1, 2, 2, 2, 2), "seed": 0.00343},
        {"items": 1140, "subjects": 57, "subject": 0.1, "variant_subject": 0.01},
    ],
    ids=["one run each", "several", "two seeds", "subjects"],
)
def test_false_alarms_and_coverage(calibration: Any, changes: dict[str, Any]) -> None:
    """A quick look at what `benchmarks/calibration.py` measures; these bounds fail for an error of 1.5 times."""
    design = calibration.Design(title="x", **{"items": 300, **changes})
    counts = calibration.null_studies(design, 120, 7)
    assert wilson(counts.base, 120)[0] <= 0.05
    assert wilson(counts.control, 120)[0] <= 0.05
    name = "difference, by subject" if design.subjects else "difference"
    assert wilson(counts.held[name], 120)[1] >= 0.95


def test_detectable_is_seen_with_80_percent_power(calibration: Any) -> None:
    design = calibration.Design(title="x", items=300, runs=(1, 1, 5, 3, 3, 3), seed=0.00343)
    effect = calibration.predicted(design, 0, 20)
    low, high = wilson(calibration.power(design, effect, 150, 1), 150)
    assert low < 0.9
    assert high > 0.7


def test_detectable_of_very_few_items_is_at_most_everything() -> None:
    """Ten items and seeds that agree: no difference would be seen for sure, which once stopped the conclusion."""
    agreeing = SeedVariance(between=0.0, df=2, rest=0.0, weight=1 / 3)
    assert across_seeds.detectable(5 / 36, ItemVariance(variance=1 / 72), [agreeing], 30, 0.8) == 1.0
