"""What the report's tables and sentences say, as plain text for the page and for report.md alike."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from superexperts.results.results import Comparison, Results, RunResult, VariantResult, signed_points, task_title
from superexperts.results.verdict import Verdict, against_base, against_controls, format_p

__all__ = [
    "Budget",
    "budgets",
    "comparison_rows",
    "lede",
    "perplexity_change",
    "result_rows",
    "run_difference",
    "verdict_rows",
]

MANY_UNPARSED = 0.05
"""From this share on it is coloured: an accuracy that mostly measures the format misleads."""
MANY_EXPERTS = 8
"""More are counted instead of named."""


def lede(results: Results) -> str:
    """What was measured, in one breath."""
    items = sum(score.items for score in results.base.scores)
    runs = len(results.runs)
    return (
        f"{results.model} on {items:,} items of {_count(len(results.tasks), 'benchmark')}, "
        f"{_count(len(results.variants), 'variant')} in {_count(runs, 'run')}. Differences are over all items, by "
        "paired tests; “detected” means p under 5% after Holm's adjustment."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def verdict_rows(results: Results, family: str) -> list[dict[str, str]]:
    """One plain sentence per comparison of a family, base or control."""
    verdicts = against_base(results) if family == "base" else against_controls(results)
    return [
        {
            "title": one.title,
            "reference": one.reference,
            "effect": one.effect,
            "difference": signed_points(one.row.difference),
            "sentence": one.sentence,
            "test": _how(one) + (_unmatched(results, one) if family == "control" else ""),
            "perplexity": perplexity_change(results, one.name) if family == "base" else "",
        }
        for one in verdicts
    ]


def _how(verdict: Verdict) -> str:
    runs = verdict.row.runs
    said = format_p(verdict.p) if verdict.sure else f"95% interval {verdict.interval}, {format_p(verdict.p)}"
    return said if runs == (1, 1) else f"{said}, {runs[0]} against {_count(runs[1], 'run')}"


def _unmatched(results: Results, verdict: Verdict) -> str:
    """What a control was given that the variant was not, by their first runs; empty where the budgets are the same."""
    one, other = (results.variant(name).runs[0] for name in (verdict.row.variant, verdict.row.reference))
    said = ""
    if one.experts is not None and other.experts is not None:
        if len(one.experts) != len(other.experts):
            said += f", {len(one.experts):,} against {_count(len(other.experts), 'expert')}"
        elif _layers(one) != _layers(other):
            said += ", experts of other layers"
    if one.trainable_parameters != other.trainable_parameters:
        said += f", {one.trainable_parameters or 0:,} against {other.trainable_parameters or 0:,} trainable parameters"
    return said


def perplexity_change(results: Results, name: str) -> str:
    """`2.08 → 4.89 (×2.4)`; empty where it was not measured."""
    before, after = results.base.perplexity, results.variant(name).perplexity
    if before is None or after is None:
        return ""
    factor = after / before
    times = f" (×{factor:.{1 if factor < 10 else 0}f})" if factor >= 1.1 or factor <= 0.9 else ""
    return f"{before:.2f} → {after:.2f}{times}"


def comparison_rows(results: Results) -> list[dict[str, str]]:
    """Every figure of every comparison, for those who check."""
    rows = []
    for row in results.comparisons:
        spreads = [_points(sd) if sd is not None else "–" for sd in row.seed_sd]
        rows.append(
            {
                "family": row.family,
                "variant": results.variant(row.variant).title,
                "reference": results.variant(row.reference).title,
                "task": "all items" if row.task is None else task_title(row.task),
                "n": f"{row.n:,}",
                "runs": f"{row.runs[0]} : {row.runs[1]}",
                "difference": signed_points(row.difference),
                "interval": _interval((row.low, row.high)),
                "clustered": _interval(row.clustered),
                "bootstrap": _interval(row.bootstrap),
                "only": "–" if row.only_variant is None else f"{row.only_variant} : {row.only_base}",
                "spread": " : ".join(spreads) if any(sd is not None for sd in row.seed_sd) else "–",
                "test": "exact McNemar" if row.test == "mcnemar" else "seeds random",
                "p": f"{row.p:.2g}",
                "adjusted": f"{row.adjusted:.2g}",
                "detectable": _points(row.detectable),
                "effect": _effect(row),
            }
        )
    return rows


def _effect(row: Comparison | None) -> str:
    return "none" if row is None or not row.sure else "down" if row.difference < 0 else "up"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{signed_points(interval[0])} to {signed_points(interval[1])}"


def result_rows(results: Results) -> list[dict[str, Any]]:
    """The result table: a row per variant with a cell per benchmark, None where it was not run."""
    return [
        {
            "title": variant.title,
            "what": _experts_of(variant),
            "runs": len(variant.runs),
            "cells": [_cell(variant, task, results.to_base(variant.name, task)) for task in results.columns],
            "mean": _points(variant.mean),
            "mean_runs": _each(_mean(run) for run in variant.runs) if len(variant.runs) > 1 else "",
            "perplexity": None if variant.perplexity is None else f"{variant.perplexity:.2f}",
            "perplexity_interval": "–".join(f"{end:.2f}" for end in variant.runs[0].perplexity_interval or ())
            if len(variant.runs) == 1
            else _each((run.perplexity for run in variant.runs), scale=1, digits=2),
        }
        for variant in results.variants
    ]


def _mean(run: RunResult) -> float:
    return statistics.fmean(score.accuracy for score in run.scores)


def _each(values: Any, scale: float = 100, digits: int = 1) -> str:
    return ", ".join("–" if value is None else f"{scale * value:.{digits}f}" for value in values)


def _cell(variant: VariantResult, task: str, row: Comparison | None) -> dict[str, Any] | None:
    score = variant.score(task)
    if score is None:
        return None
    own = [one.accuracy for run in variant.runs for one in run.scores if one.task == task]
    return {
        "accuracy": _points(score.accuracy),
        "interval": f"{_points(score.low)}–{_points(score.high)}",
        "clustered": "" if score.clustered is None else "–".join(map(_points, score.clustered)),
        "runs": _each(own) if len(own) > 1 else "",
        "difference": signed_points(row.difference) if row is not None else "",
        "effect": _effect(row),
        "unparsed": f"{_points(score.unparsed_share)}% unparsed" if score.unparsed else "all parsed",
        "many_unparsed": score.unparsed_share >= MANY_UNPARSED,
    }


def _experts_of(variant: VariantResult) -> str:
    """The first run's experts, and how many other draws there are."""
    first, *more = [run.experts for run in variant.runs]
    others = sum(one != first for one in more)
    return _named(first) + (f" and {_count(others, 'other draw')}" if others else "")


def _named(experts: Sequence[str] | None) -> str:
    if experts is None:
        return ""
    return ", ".join(experts) if len(experts) <= MANY_EXPERTS else f"{len(experts):,} experts"


def run_difference(results: Results, run: RunResult, reference: VariantResult, task: str | None) -> float:
    """A single run's accuracy minus the mean of the reference's runs, on a benchmark or over all items."""

    def accuracy(one: RunResult) -> float:
        scores = [score for score in one.scores if task is None or score.task == task]
        return sum(score.correct for score in scores) / sum(score.items for score in scores)

    return accuracy(run) - statistics.fmean(map(accuracy, reference.runs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What one run was given, beside what the variant on super experts of its kind was given."""

    variant: str
    run: str
    reference: bool
    """Whether the others are held against it."""
    experts: str
    layers: str
    """How many experts in which layers, and whether that is as the reference has it."""
    parameters: str
    exposure: str
    """Training tokens that its experts saw, together."""
    exposure_each: str
    """The least and the most seen of them."""
    accuracy: str
    perplexity: str
    odd: tuple[str, ...]
    """Names of those columns in which it differs from the reference."""


def budgets(results: Results) -> list[Budget]:
    """A line for each run of each variant but base, in order; the reference is the first run on super experts."""
    rows = []
    for variant in results.others:
        kin = [one for one in results.others if one.kind == variant.kind]
        reference = next((one.runs[0] for one in kin if one.target == "super"), None)
        rows += [_budget(variant, run, reference) for run in variant.runs]
    return rows


def _budget(variant: VariantResult, run: RunResult, reference: RunResult | None) -> Budget:
    own, seen = reference is run, list((run.exposure or {}).values())
    odd = []
    if reference is not None and not own:
        if _layers(run) != _layers(reference):
            odd.append("layers")
        if run.trainable_parameters != reference.trainable_parameters:
            odd.append("parameters")
    parameters = "–" if run.trainable_parameters is None else f"{run.trainable_parameters:,}"
    if "parameters" in odd and reference is not None and run.trainable_parameters and reference.trainable_parameters:
        parameters += f" (×{run.trainable_parameters / reference.trainable_parameters:.2g})"
    return Budget(
        variant=variant.title,
        run=f"seed {run.seed}",
        reference=own,
        experts=_named(run.experts) or "–",
        layers=_by_layer(_layers(run)),
        parameters=parameters,
        exposure=f"{sum(seen):,}" if seen else "–",
        exposure_each=f"{min(seen):,} to {max(seen):,} each" if len(seen) > 1 else "",
        accuracy=_points(_mean(run)),
        perplexity="–" if run.perplexity is None else f"{run.perplexity:.2f}",
        odd=tuple(odd),
    )


def _layers(run: RunResult) -> dict[int, int]:
    """Layer -> how many experts of it."""
    found: dict[int, int] = {}
    for name in run.experts or ():
        layer = int(name[1:].replace("shared", "E").split("E")[0])
        found[layer] = found.get(layer, 0) + 1
    return dict(sorted(found.items()))


def _by_layer(layers: Mapping[int, int]) -> str:
    if len(layers) > MANY_EXPERTS:
        return f"{sum(layers.values()):,} in {len(layers)} layers"
    return ", ".join(f"{count} in L{layer}" for layer, count in layers.items()) or "none"
