"""The files of a study's runs -> the value of `results.json`: scores, intervals, and every comparison with its test.

Suffixes of the arrays' names: R runs, N items.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.stats import norm

from . import clusters as grouping
from . import seeds, stats
from .artifacts import Answer, ExpertSet, Extraction, Score, key_name
from .clusters import Clusters, clusters_of
from .corpora import read_rows
from .errors import DataError
from .results import RESULTS_SCHEMA
from .rundir import read_json
from .seeds import Floats, Seeds, seeds_of
from .variants import Run, title_of

__all__ = ["compare", "conclude", "proportion"]

DRAWN = ("random", "anywhere")
"""Sets that are another one with another seed."""
REFERENCES = ("attention", "custom")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Variant:
    """A variant's runs with their answers."""

    name: str
    runs: tuple[Run, ...]
    correct: Mapping[str, Floats]
    """Per benchmark, right (1) or wrong (0) [R, N], items in base's order."""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def random(self) -> bool:
        """Whether another seed would have given another model."""
        return self.first.kind == "lora" or self.first.target in DRAWN

    def all(self, task: str | None) -> Floats:
        """[R, N] of one benchmark, or of all of them."""
        return self.correct[task] if task is not None else np.concatenate(list(self.correct.values()), axis=1)


def conclude(
    out: Path,
    runs: Sequence[Run],
    *,
    name: str,
    model: str,
    revision: str | None,
    limit: int | None,
    protocol: str,
    corpora: Sequence[str],
    tasks: Sequence[str],
) -> dict[str, Any]:
    """The value of results.json, with nothing in it that differs between two equal runs of a study.

    `out` is the study's folder; `runs` come with the base's first, those of one variant together. `DataError` where a
    file is missing, or where two runs did not answer the same items.
    """
    found = {run.name: _answers(out, run, tasks) for run in runs}
    ids = {task: list(found[runs[0].name][task]) for task in tasks}
    variants = [
        _variant(variant, tuple(group), found, ids)
        for variant, group in itertools.groupby(runs, key=lambda run: run.variant)
    ]
    if len({variant.name for variant in variants}) < len(variants):
        raise DataError("STUDY: the runs of a variant do not stand together; list each variant's runs in a row")
    subjects = {task: _subjects(out, runs[0], task) for task in tasks}
    return {
        "schema": RESULTS_SCHEMA,
        "name": name,
        "model": model,
        "revision": revision,
        "limit": limit,
        "protocol": protocol,
        "corpora": list(corpora),
        "tasks": list(tasks),
        "variants": [_row(out, variant, subjects) for variant in variants],
        "comparisons": _comparisons(variants, subjects),
    }


def _answers(out: Path, run: Run, tasks: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Per benchmark, id -> right or wrong."""
    found: dict[str, dict[str, bool]] = {}
    for task in tasks:
        file = out / "variants" / run.name / "extractions" / f"{task}.jsonl"
        if not file.is_file():
            raise DataError(f"STUDY: {file} is missing; run the study again")
        rows = [Extraction.from_json(row) for _, row in read_rows(file, "extractions")]
        found[task] = {row.id: row.correct for row in rows}
        if len(found[task]) < len(rows):
            raise DataError(f"{task}: {len(rows) - len(found[task])} ids of {run.name} occur twice; evaluate again")
    return found


def _variant(
    name: str,
    runs: tuple[Run, ...],
    found: Mapping[str, Mapping[str, Mapping[str, bool]]],
    ids: Mapping[str, Sequence[str]],
) -> _Variant:
    for run, (task, wanted) in itertools.product(runs, ids.items()):
        odd = sorted(set(wanted) ^ found[run.name][task].keys())
        if odd:
            raise DataError(
                f"{task}: {len(odd)} items are in base or in {run.name} only, first {odd[0]!r}; evaluate both again"
            )
    correct = {
        task: np.array([[found[run.name][task][item] for item in wanted] for run in runs], dtype=np.float64)
        for task, wanted in ids.items()
    }
    return _Variant(name=name, runs=runs, correct=correct)


def _subjects(out: Path, run: Run, task: str) -> list[str | None]:
    """Each item's subject, in the order of the answers; all None where the file knows none."""
    file = out / "variants" / run.name / "answers" / f"{task}.jsonl"
    if not file.is_file():
        return []
    return [Answer.from_json(row).subject for _, row in read_rows(file, "answers")]


def _row(out: Path, variant: _Variant, subjects: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    rows = [_run_row(out, run, list(variant.correct)) for run in variant.runs]
    scores = [
        _score_row(task, correct_RN, [row["scores"][place] for row in rows], clusters_of(subjects[task]))
        for place, (task, correct_RN) in enumerate(variant.correct.items())
    ]
    perplexities = [row["perplexity"] for row in rows if row["perplexity"] is not None]
    return {
        "name": variant.name,
        "title": title_of(variant.first.kind, variant.first.target),
        "kind": variant.first.kind,
        "target": variant.first.target,
        "runs": rows,
        "mean": sum(score["accuracy"] for score in scores) / len(scores),
        "perplexity": sum(perplexities) / len(perplexities) if perplexities else None,
        "scores": scores,
    }


def _run_row(out: Path, run: Run, tasks: Sequence[str]) -> dict[str, Any]:
    folder = out / "variants" / run.name
    found = read_json(folder / "scores.json", "scores")["scores"]
    scores = {score.task: score for score in map(Score.from_json, found)}
    training = read_json(folder / "train" / "training.json", "training") if run.kind == "lora" else None
    perplexity = folder / "perplexity.json"
    measured = read_json(perplexity, "perplexity") if perplexity.is_file() else None
    chosen = ExpertSet.parse(str(out / "experts" / f"{run.experts}.json")).experts if run.experts else None
    return {
        "name": run.name,
        "seed": run.seed,
        "experts": [key_name(key) for key in chosen] if chosen else None,
        "trainable_parameters": training["trainable_parameters"] if training else None,
        "exposure": training["exposure"] if training else None,
        "perplexity": measured["perplexity"] if measured else None,
        "perplexity_interval": measured["interval"] if measured else None,
        "scores": [scores[task].to_json() for task in tasks],
    }


def _score_row(
    task: str, correct_RN: Floats, scores: Sequence[Mapping[str, Any]], clusters: Clusters | None
) -> dict[str, Any]:
    accuracy, interval, clustered = proportion(correct_RN, clusters)
    return {
        "task": task,
        "items": correct_RN.shape[1],
        "runs": len(correct_RN),
        "correct": sum(score["correct"] for score in scores),
        "unparsed": sum(score["unparsed"] for score in scores),
        "accuracy": accuracy,
        "low": interval[0],
        "high": interval[1],
        "clustered": clustered,
    }


def proportion(
    correct_RN: Floats, clusters: Clusters | None
) -> tuple[float, tuple[float, float], tuple[float, float] | None]:
    """(accuracy, its 95% interval, the same with clusters) of runs [R, N] of right (1) and wrong (0).

    One run's interval is Wilson's. That of several is Wilson's too, for as many items as would give the width that
    items and seeds together have, and at most for the items that there are.
    """
    runs, items = correct_RN.shape
    mean_N = correct_RN.mean(0)
    accuracy = float(mean_N.mean())
    parts = [seeds_of(correct_RN)] if runs > 1 else []
    worth = float(items)
    if parts:
        half = seeds.critical(float(mean_N.var(ddof=1)) / items if items > 1 else 0.25, parts)
        if 0 < accuracy < 1:
            worth = min(worth, accuracy * (1 - accuracy) * (float(norm.ppf(0.975)) / half) ** 2)
    clustered = None
    if clusters is not None:
        half = seeds.critical(grouping.variance(mean_N, clusters), parts, clusters.df)
        clustered = max(0.0, accuracy - half), min(1.0, accuracy + half)
    return accuracy, stats.wilson(accuracy * worth, worth), clustered


def _comparisons(variants: Sequence[_Variant], subjects: Mapping[str, Sequence[str | None]]) -> list[dict[str, Any]]:
    """Every comparison of three families, each corrected by Holm."""
    base, others = variants[0], variants[1:]
    families: dict[str, list[tuple[_Variant, _Variant, str | None]]] = {
        "base": [(other, base, None) for other in others],
        "benchmark": [(other, base, task) for other in others for task in base.correct],
        "control": [(one, other, None) for one, other in _controls(others)],
    }
    everything = [subject for found in subjects.values() for subject in found]
    grouped = {None: clusters_of(everything)} | {task: clusters_of(found) for task, found in subjects.items()}
    rows = []
    for family, pairs in families.items():
        found = [_compare(variant, reference, task, grouped[task], len(pairs)) for variant, reference, task in pairs]
        adjusted = stats.holm([row["p"] for row in found])
        for (variant, reference, task), row, p in zip(pairs, found, adjusted, strict=True):
            named = {"family": family, "variant": variant.name, "reference": reference.name, "task": task}
            rows.append({**named, **row, "adjusted": p})
    return rows


def _controls(others: Sequence[_Variant]) -> list[tuple[_Variant, _Variant]]:
    """Each variant on chosen experts with each other one of its kind that is its control.

    Super experts are compared with every other variant; any other chosen set with those drawn at random.
    """
    pairs = []
    for one, other in itertools.product(others, others):
        if one.first.kind != other.first.kind or one.name == other.name:
            continue
        chosen = one.first.target not in (*DRAWN, *REFERENCES)
        if one.first.target == "super" or (chosen and other.first.target in DRAWN):
            pairs.append((one, other))
    return pairs


def _compare(
    variant: _Variant, reference: _Variant, task: str | None, clusters: Clusters | None, tests: int
) -> dict[str, Any]:
    return compare(
        variant.all(task),
        reference.all(task),
        clusters,
        tests=tests,
        random=(variant.random, reference.random),
    )


def compare(
    variant_RN: Floats,
    reference_RN: Floats,
    clusters: Clusters | None = None,
    *,
    tests: int = 1,
    random: tuple[bool, bool] = (True, True),
) -> dict[str, Any]:
    """A row of `comparisons`, less its names and its adjusted p-value.

    `tests` is the family's size. `random` says of each side whether another seed would give another model: the only
    run of such a side is taken to vary as the other side's runs do, if there are several.
    """
    difference_N = variant_RN.mean(0) - reference_RN.mean(0)
    items = len(difference_N)
    difference = float(difference_N.mean())
    parts = _parts(variant_RN, reference_RN, random)
    spreads = [part.sd if part is not None else None for part in parts]
    both = [part for part in parts if part is not None]
    row: dict[str, Any] = {
        "n": items,
        "runs": [len(variant_RN), len(reference_RN)],
        "only_base": None,
        "only_variant": None,
        "difference": difference,
    }
    if both:
        own = float(difference_N.var(ddof=1)) / items if items > 1 else 1.0
        half = seeds.critical(own, both)
        low, high = max(-1.0, difference - half), min(1.0, difference + half)
        p = seeds.p_value(difference, own, both)
        smallest = seeds.detectable(float((difference_N**2).mean()), items, both, tests)
    else:
        paired = stats.mcnemar(cast(Any, reference_RN[0] > 0), cast(Any, variant_RN[0] > 0))
        row |= {"only_base": paired.only_base, "only_variant": paired.only_variant}
        low, high, p = paired.low, paired.high, paired.p
        smallest = stats.detectable(paired.only_base + paired.only_variant, items, tests)
    clustered = None
    if clusters is not None:
        half = seeds.critical(grouping.variance(difference_N, clusters), both, clusters.df)
        clustered = max(-1.0, difference - half), min(1.0, difference + half)
    return row | {
        "low": low,
        "high": high,
        "clustered": clustered,
        "bootstrap": grouping.bootstrap(difference_N, clusters),
        "seed_sd": spreads,
        "test": "seeds" if both else "mcnemar",
        "p": p,
        "detectable": smallest,
    }


def _parts(variant_RN: Floats, reference_RN: Floats, random: tuple[bool, bool]) -> list[Seeds | None]:
    """The seeds' parts of the variant and of the reference; None for one run."""
    found = [seeds_of(side_RN) if len(side_RN) > 1 else None for side_RN in (variant_RN, reference_RN)]
    for place, other in ((0, 1), (1, 0)):
        part = found[other]
        if found[place] is None and random[place] and part is not None:
            found[other] = dataclasses.replace(part, weight=part.weight + 1)
    return found
