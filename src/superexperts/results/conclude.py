"""From the files of a study's runs to the value of `results.json`: scores, intervals, comparisons with their tests.

Suffixes of array names: R runs, N items.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superexperts.core.errors import DataError
from superexperts.core.jsonl import read_rows
from superexperts.core.runs import read_json
from superexperts.core.types import Answer, ExpertSet, Extraction, Score, key_name
from superexperts.results.edges import chance_of
from superexperts.results.results import RESULTS_SCHEMA
from superexperts.results.statistics import single_run
from superexperts.results.statistics.across_seeds import Floats
from superexperts.results.statistics.across_subjects import Clusters, clusters_of
from superexperts.results.statistics.paired import compare, proportion
from superexperts.results.variants import Run, title_of

__all__ = ["conclude"]

WHOLE = ("layers", "attention")
"""Targets that are not a choice of single experts. They are controls, and have no controls themselves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Variant:
    """A variant with the answers of its runs."""

    name: str
    runs: tuple[Run, ...]
    correct: Mapping[str, Floats]
    """Benchmark -> right (1) or wrong (0) [R, N], items in the order of the base."""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def random(self) -> bool:
        """Whether another seed would have given another model."""
        return self.first.random

    def all(self, task: str | None) -> Floats:
        """[R, N] of one benchmark, or of all benchmarks."""
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
    """The value of results.json; two equal runs of a study give the same value.

    `out` is the study's folder. In `runs` the base comes first, and the runs of a variant come one after another.
    `DataError` if a file is missing, or if two runs did not answer the same items.
    """
    found = {run.name: _answers(out, run, tasks) for run in runs}
    ids = {task: list(found[runs[0].name][task]) for task in tasks}
    variants = [
        _variant(variant, tuple(group), found, ids)
        for variant, group in itertools.groupby(runs, key=lambda run: run.variant)
    ]
    if len({variant.name for variant in variants}) < len(variants):
        raise DataError("the runs of a variant are not listed one after another; list them so")
    asked = {task: _asked(out, runs[0], task) for task in tasks}
    subjects = {task: [answer.subject for answer in answers] for task, answers in asked.items()}
    chances = {task: chance_of(answers) for task, answers in asked.items()}
    return {
        "schema": RESULTS_SCHEMA,
        "name": name,
        "model": model,
        "revision": revision,
        "limit": limit,
        "protocol": protocol,
        "corpora": list(corpora),
        "tasks": list(tasks),
        "caution": _caution(out, runs),
        "subjects": {task: len(set(found)) for task, found in subjects.items() if found and None not in found},
        "variants": [_row(out, variant, subjects, chances) for variant in variants],
        "comparisons": _comparisons(variants, subjects),
    }


def _caution(out: Path, runs: Sequence[Run]) -> str | None:
    """The warning about super experts that do not stand out, from the file of each set that a run uses."""
    for stem in dict.fromkeys(run.experts for run in runs if run.experts):
        said = ExpertSet.parse(str(out / "experts" / f"{stem}.json")).rule.get("caution")
        if said:
            return str(said)
    return None


def _answers(out: Path, run: Run, tasks: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Benchmark -> item id -> whether the answer is right."""
    found: dict[str, dict[str, bool]] = {}
    for task in tasks:
        file = out / "variants" / run.name / "extractions" / f"{task}.jsonl"
        if not file.is_file():
            raise DataError(f"{file} is missing; run the study again", field="study")
        rows = [Extraction.from_json(row) for _, row in read_rows(file, "extractions")]
        found[task] = {row.id: single_run.graded(task, row) for row in rows}
        if len(found[task]) < len(rows):
            raise DataError(f"{task}: {len(rows) - len(found[task])} ids of {run.name} occur twice; evaluate again")
    return found


def _variant(
    name: str,
    runs: tuple[Run, ...],
    found: Mapping[str, Mapping[str, Mapping[str, bool]]],
    ids: Mapping[str, Sequence[str]],
) -> _Variant:
    for run, (task, expected) in itertools.product(runs, ids.items()):
        # Paired tests need the same items on both sides: comparing the common ones only would bias the result.
        odd = sorted(set(expected) ^ found[run.name][task].keys())
        if odd:
            raise DataError(
                f"{task}: {len(odd)} items are in base or in {run.name} only, first {odd[0]!r}; evaluate both again"
            )
    correct = {
        task: np.array([[found[run.name][task][item] for item in expected] for run in runs], dtype=np.float64)
        for task, expected in ids.items()
    }
    return _Variant(name=name, runs=runs, correct=correct)


def _asked(out: Path, run: Run, task: str) -> list[Answer]:
    """The answers of a run to a benchmark; empty if there is no such file."""
    file = out / "variants" / run.name / "answers" / f"{task}.jsonl"
    if not file.is_file():
        return []
    return [Answer.from_json(row) for _, row in read_rows(file, "answers")]


def _row(
    out: Path,
    variant: _Variant,
    subjects: Mapping[str, Sequence[str | None]],
    chances: Mapping[str, float | None],
) -> dict[str, Any]:
    rows = [_run_row(out, run, list(variant.correct)) for run in variant.runs]
    scores = [
        _score_row(task, correct_RN, [row["scores"][place] for row in rows], clusters_of(subjects[task]), chances[task])
        for place, (task, correct_RN) in enumerate(variant.correct.items())
    ]
    perplexities = [row["perplexity"] for row in rows if row["perplexity"] is not None]
    return {
        "name": variant.name,
        "title": title_of(variant.first.kind, variant.first.target),
        "kind": variant.first.kind,
        "target": variant.first.target,
        "random": variant.random,
        "runs": rows,
        # Benchmarks count equally in the mean, items equally in the test over all items (docs/statistics.md).
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
    task: str,
    correct_RN: Floats,
    scores: Sequence[Mapping[str, Any]],
    clusters: Clusters | None,
    chance: float | None,
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
        "chance": chance,
        "clustered": clustered,
    }


def _comparisons(variants: Sequence[_Variant], subjects: Mapping[str, Sequence[str | None]]) -> list[dict[str, Any]]:
    """All comparisons, in three families, each adjusted by Holm's procedure."""
    base, others = variants[0], variants[1:]
    families: dict[str, list[tuple[_Variant, _Variant, str | None]]] = {
        "base": [(other, base, None) for other in others],
        "benchmark": [(other, base, task) for other in others for task in base.correct],
        "control": [(one, other, None) for one, other in _controls(others)],
    }
    # The same subject name in two benchmarks is two clusters: their items are not related.
    grouped: dict[str | None, Clusters | None] = {task: clusters_of(found) for task, found in subjects.items()}
    grouped[None] = clusters_of(
        [None if name is None else f"{task} {name}" for task in subjects for name in subjects[task]]
    )
    rows = []
    for family, pairs in families.items():
        found = [
            compare(
                variant.all(task),
                reference.all(task),
                grouped[task],
                tests=len(pairs),
                random=(variant.random, reference.random),
            )
            for variant, reference, task in pairs
        ]
        adjusted = single_run.holm([row["p"] for row in found])
        for (variant, reference, task), row, p in zip(pairs, found, adjusted, strict=True):
            named = {"family": family, "variant": variant.name, "reference": reference.name, "task": task}
            rows.append({**named, **row, "adjusted": p})
    return rows


def _controls(others: Sequence[_Variant]) -> list[tuple[_Variant, _Variant]]:
    """Pairs of a variant on chosen experts and a control of the same kind (prune or LoRA).

    Super experts, or the first chosen set if there are none, are compared with every other variant. Further chosen
    sets are compared only with those drawn at random.
    """
    pairs: list[tuple[_Variant, _Variant]] = []
    for kind in ("prune", "lora"):
        own = [one for one in others if one.first.kind == kind]
        chosen = [one for one in own if not one.first.drawn and one.first.target not in WHOLE]
        # Super experts first; the sort is stable, so without them the order of the study file decides.
        chosen.sort(key=lambda one: one.first.target != "super")
        for one in chosen:
            pairs += [(one, other) for other in own if other is not one and (one is chosen[0] or other.first.drawn)]
    return pairs
