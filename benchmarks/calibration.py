"""Are the study's tests calibrated? Simulated studies without an effect and with a known one.

    python benchmarks/calibration.py --studies 2000

A study has six variants on the same items: base and five others. Items differ in how hard they are. A variant without
an effect answers some items otherwise than base, as often better as worse; one with an effect loses more than it wins.
Printed: the share of null studies with any false alarm after Holm (at most 5%), how often the 95% interval holds the
true difference, and the power found at the difference for which `stats.detectable` predicts 80%.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.stats import binomtest

from superexperts.stats import detectable, holm, paired_interval

OTHERS = 5
ITEMS = 600


def compared(base_N: np.ndarray, variant_N: np.ndarray) -> tuple[int, int]:
    """(items only the base has right, items only the variant has right)."""
    return int((base_N & ~variant_N).sum()), int((~base_N & variant_N).sum())


def simulate(rng: np.random.Generator, discordant: float, difference: float) -> tuple[int, int]:
    """One variant: each item differs with probability `discordant`, so that base minus variant is `difference`."""
    base_N = rng.random(ITEMS) < rng.beta(2, 2, ITEMS)
    lost = (discordant + difference) / 2
    draw_N = rng.random(ITEMS)
    # Of base's right items so many are lost, of its wrong ones so many won, that both shares are over all items.
    right, wrong = max(base_N.mean(), 1e-9), max(1 - base_N.mean(), 1e-9)
    variant_N = np.where(base_N, draw_N >= lost / right, draw_N < (discordant - lost) / wrong)
    return compared(base_N, variant_N)


def p_value(only_base: int, only_variant: int) -> float:
    total = only_base + only_variant
    return float(binomtest(only_variant, total).pvalue) if total else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    print(f"{options.studies} studies of {OTHERS} variants against base on {ITEMS} items each")
    print("items that differ | false alarms per study | interval holds 0 | difference for 80% power | power there")
    for discordant in (0.02, 0.05, 0.1, 0.2, 0.4):
        alarms = held = seen = 0
        wanted = detectable(round(discordant * ITEMS), ITEMS, OTHERS)
        for _ in range(options.studies):
            null = [simulate(rng, discordant, 0.0) for _ in range(OTHERS)]
            alarms += min(holm([p_value(*pair) for pair in null])) < 0.05
            low, high = paired_interval(*null[0], ITEMS)
            held += low <= 0 <= high
            one = [simulate(rng, max(discordant, wanted), wanted), *null[1:]]
            seen += holm([p_value(*pair) for pair in one])[0] < 0.05
        shares = [count / options.studies for count in (alarms, held, seen)]
        figures = f"{shares[0]:22.1%} | {shares[1]:16.1%} | {100 * wanted:17.1f} points | {shares[2]:.1%}"
        print(f"{discordant:17.0%} | {figures}")


if __name__ == "__main__":
    main()
