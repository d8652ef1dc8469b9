"""The tables and sentences of the report as plain text, for the page and for report.md."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

from superexperts.benchmarks import title_of
from superexperts.results.results import Results, RunResult, VariantResult, signed_points
from superexperts.results.tables import MANY_EXPERTS, count, effect_of, expert_names, mean_accuracy, percent
from superexperts.results.verdict import Verdict, against_base, against_controls, format_p

__all__ = [
    "Budget",
    "budgets",
    "comparison_rows",
    "lede",
    "perplexity_change",
    "run_difference",
    "verdict_rows",
]


def lede(results: Results) -> str:
    """What was measured, in a few words."""
    items = sum(score.items for score in results.base.scores)
    runs = len(results.runs)
    return (
        f"{results.model} on {items:,} items of {count(len(results.tasks), 'benchmark')}: "
        f"{count(len(results.variants), 'variant')}, {count(runs, 'run')}. Differences are over all items, from paired "
        "tests. “Detected” means p < 0.05 after Holm's adjustment."
    )


def verdict_rows(results: Results, family: str) -> list[dict[str, str]]:
    """A sentence for each comparison of a family, base or control."""
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
    said = format_p(verdict.p) if verdict.detected else f"95% interval {verdict.interval}, {format_p(verdict.p)}"
    return said if runs == (1, 1) else f"{said}, {runs[0]} against {count(runs[1], 'run')}"


def _unmatched(results: Results, verdict: Verdict) -> str:
    """How the budgets of a variant and its control differ, by their first runs; empty if they do not."""
    one, other = (results.variant(name).runs[0] for name in (verdict.row.variant, verdict.row.reference))
    said = ""
    if one.experts is not None and other.experts is not None:
        if len(one.experts) != len(other.experts):
            said += f", {len(one.experts):,} against {count(len(other.experts), 'expert')}"
        elif _layers(one) != _layers(other):
            said += ", experts in other layers"
    if one.trainable_parameters != other.trainable_parameters:
        said += f", {one.trainable_parameters or 0:,} against {other.trainable_parameters or 0:,} trainable parameters"
    return said


def perplexity_change(results: Results, name: str) -> str:
    """`2.08 → 4.89 (×2.4)`; empty if it was not measured."""
    before, after = results.base.perplexity, results.variant(name).perplexity
    if before is None or after is None:
        return ""
    factor = after / before
    times = f" (×{factor:.{1 if factor < 10 else 0}f})" if factor >= 1.1 or factor <= 0.9 else ""
    return f"{before:.2f} → {after:.2f}{times}"


def comparison_rows(results: Results) -> list[dict[str, str]]:
    """All figures of all comparisons."""
    rows = []
    for row in results.comparisons:
        spreads = [percent(sd) if sd is not None else "–" for sd in row.seed_sd]
        rows.append(
            {
                "family": row.family,
                "variant": results.variant(row.variant).title,
                "reference": results.variant(row.reference).title,
                "task": "all items" if row.task is None else title_of(row.task),
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
                "detectable": percent(row.detectable),
                "effect": effect_of(row),
            }
        )
    return rows


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{signed_points(interval[0])} to {signed_points(interval[1])}"


def run_difference(results: Results, run: RunResult, reference: VariantResult, task: str | None) -> float:
    """A single run's accuracy minus the mean of the reference's runs, on a benchmark or over all items."""

    def accuracy(one: RunResult) -> float:
        scores = [score for score in one.scores if task is None or score.task == task]
        return sum(score.correct for score in scores) / sum(score.items for score in scores)

    return accuracy(run) - statistics.fmean(map(accuracy, reference.runs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The budget of one run, compared with the variant on super experts of the same kind (prune or LoRA)."""

    variant: str
    run: str
    reference: bool
    """Whether the others are compared with this run."""
    experts: str
    layers: str
    """Number of experts by layer."""
    parameters: str
    exposure: str
    """Training tokens routed to its experts, in total."""
    exposure_each: str
    """The fewest and the most tokens of one expert."""
    accuracy: str
    perplexity: str
    odd: tuple[str, ...]
    """Names of the columns in which it differs from the reference."""


def budgets(results: Results) -> list[Budget]:
    """A row for each run of each variant except base, in order. The reference is the first run on super experts."""
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
        experts=expert_names(run.experts) or "–",
        layers=_by_layer(_layers(run)),
        parameters=parameters,
        exposure=f"{sum(seen):,}" if seen else "–",
        exposure_each=f"{min(seen):,} to {max(seen):,} each" if len(seen) > 1 else "",
        accuracy=percent(mean_accuracy(run)),
        perplexity="–" if run.perplexity is None else f"{run.perplexity:.2f}",
        odd=tuple(odd),
    )


def _layers(run: RunResult) -> dict[int, int]:
    """Layer -> number of its experts."""
    found: dict[int, int] = {}
    for name in run.experts or ():
        layer = int(name[1:].replace("shared", "E").split("E")[0])
        found[layer] = found.get(layer, 0) + 1
    return dict(sorted(found.items()))


def _by_layer(layers: Mapping[int, int]) -> str:
    if len(layers) > MANY_EXPERTS:
        return f"{sum(layers.values()):,} in {len(layers)} layers"
    return ", ".join(f"{count} in L{layer}" for layer, count in layers.items()) or "none"
