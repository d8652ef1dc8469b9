"""Intervals and tests against published values, closed forms and enumeration."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from superexperts.core.errors import DataError
from superexperts.core.types import Extraction
from superexperts.results.statistics.single_run import detectable, holm, mcnemar, paired_interval, score, wilson

Z = 1.959963984540054


def extraction(name: str, correct: bool, extracted: str | None = "A") -> Extraction:
    return Extraction(id=name, extracted=extracted, how="rule:label" if extracted else "unparsed", correct=correct)


def rows(pattern: str, prefix: str = "i") -> list[Extraction]:
    """One extraction a letter: + correct, - wrong, ? unparsed."""
    return [extraction(f"{prefix}{i}", c == "+", None if c == "?" else "A") for i, c in enumerate(pattern)]


@pytest.mark.parametrize(("correct", "items"), [(0, 10), (1, 10), (81, 263), (10, 10), (3500, 14042)])
def test_wilson_is_the_closed_form(correct: int, items: int) -> None:
    share = correct / items
    middle = (share + Z**2 / (2 * items)) / (1 + Z**2 / items)
    half = Z / (1 + Z**2 / items) * math.sqrt(share * (1 - share) / items + Z**2 / (4 * items**2))
    assert wilson(correct, items) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)


def test_wilson_published_values() -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("only_base", "only_variant"), [(0, 0), (1, 0), (0, 6), (3, 9), (7, 7), (12, 2)])
def test_mcnemar_is_the_exact_sign_test(only_base: int, only_variant: int) -> None:
    base = [True] * only_base + [False] * only_variant + [True, False, True]
    variant = [False] * only_base + [True] * only_variant + [True, False, True]
    found = mcnemar(base, variant)
    n, most = only_base + only_variant, max(only_base, only_variant)
    tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert (found.n, found.only_base, found.only_variant) == (n + 3, only_base, only_variant)
    assert found.difference == pytest.approx((sum(variant) - sum(base)) / len(base))
    assert found.low < found.difference < found.high


def test_paired_interval_published_value() -> None:
    # M. W. Fagerland, S. Lydersen, P. Laake, Statistics in Medicine 33 (2014) 2850-2875: airway hyper-responsiveness,
    # 21 children, 1 and 7 discordant pairs: Tango's score interval is (-0.517, -0.026)
    assert paired_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(
    ("only_base", "only_variant", "n"), [(7, 1, 21), (2, 12, 50), (20, 40, 160), (0, 4, 30), (3, 3, 9)]
)
def test_paired_interval_is_the_inverted_score_test(only_base: int, only_variant: int, n: int) -> None:
    """Maximises the trinomial likelihood under each difference on a grid, instead of by Tango's formula."""
    lost = np.linspace(0, 1, 200_001)[1:-1]

    def score_statistic(difference: float) -> float:
        won = lost + difference
        same = 1 - lost - won
        inside = (won > 0) & (same > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = (
                only_base * np.log(lost) + only_variant * np.log(won) + (n - only_base - only_variant) * np.log(same)
            )
        best = lost[int(np.argmax(np.where(inside, likelihood, -np.inf)))]
        variance = n * (2 * best + difference - difference**2)
        return float((only_variant - only_base - n * difference) / math.sqrt(variance))

    low, high = paired_interval(only_base, only_variant, n)
    assert score_statistic(low) == pytest.approx(Z, abs=2e-3)
    assert score_statistic(high) == pytest.approx(-Z, abs=2e-3)


def test_paired_interval_when_the_two_never_differ() -> None:
    # the score is n d**2 = z**2 d (1 - d) then, so d = z**2 / (n + z**2)
    for n in (1, 50, 1319):
        assert paired_interval(0, 0, n) == pytest.approx((-(Z**2) / (n + Z**2), Z**2 / (n + Z**2)), abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400))
def test_paired_interval_is_ordered_and_mirrors(only_base: int, only_variant: int, same: int) -> None:
    n = max(1, only_base + only_variant + same)
    low, high = paired_interval(only_base, only_variant, n)
    assert -1 <= low < high <= 1
    assert low - 1e-9 <= (only_variant - only_base) / n <= high + 1e-9
    assert paired_interval(only_variant, only_base, n) == pytest.approx((-high, -low), abs=1e-7)


def test_mcnemar_needs_the_same_items() -> None:
    with pytest.raises(DataError, match="3 and 2 items"):
        mcnemar([True, False, True], [True, False])
    with pytest.raises(DataError, match="0 and 0 items"):
        mcnemar([], [])


def test_score_counts_unparsed_as_wrong() -> None:
    found = score("gsm8k", "base", rows("++-??"))
    assert (found.items, found.correct, found.unparsed, found.accuracy) == (5, 2, 2, 0.4)
    assert (found.low, found.high) == wilson(2, 5)
    with pytest.raises(DataError, match="gsm8k: base has no answers"):
        score("gsm8k", "base", [])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=5))
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis's adjusted p is the worst Bonferroni p of all intersections that hold it."""
    every = range(len(p_values))
    for index, adjusted in enumerate(holm(p_values)):
        holding = [set_ for size in every for set_ in combinations(every, size + 1) if index in set_]
        closure = max(min(1.0, len(set_) * min(p_values[i] for i in set_)) for set_ in holding)
        assert adjusted == pytest.approx(closure)


@pytest.mark.parametrize(
    ("discordant", "n", "tests"), [(12, 600, 5), (60, 600, 5), (120, 600, 1), (30, 100, 3), (0, 200, 1)]
)
def test_detectable_difference_is_seen_with_80_percent_power(discordant: int, n: int, tests: int) -> None:
    """The exact power of the exact test, summed over every outcome."""
    difference = detectable(discordant, n, tests)
    share = max(discordant / n, difference)
    counts = np.arange(n + 1)
    power = 0.0
    for total, weight in zip(counts, binom.pmf(counts, n, share), strict=True):
        if weight > 1e-9:
            lost = np.arange(total + 1)
            p_values = np.minimum(1, 2 * binom.cdf(np.minimum(lost, total - lost), total, 0.5))
            odds = (1 + difference / share) / 2
            power += weight * binom.pmf(lost, total, odds)[p_values < 0.05 / tests].sum()
    assert 0.7 < power < 0.92
    assert detectable(discordant, 4 * n, tests) < difference
