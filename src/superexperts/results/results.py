"""`results.json`: every variant on every benchmark, and the tests that compare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from superexperts.core.errors import DataError
from superexperts.core.runs import read_json
from superexperts.core.types import Score
from superexperts.core.validation import check_schema, validated
from superexperts.results.variants import Kind

__all__ = [
    "COLUMNS",
    "RESULTS_SCHEMA",
    "SIGNIFICANT",
    "Comparison",
    "Results",
    "RunResult",
    "VariantResult",
    "VariantScore",
    "signed_points",
    "task_title",
]

RESULTS_SCHEMA = "superexperts/results/2"
SIGNIFICANT = 0.05
MINUS = "\N{MINUS SIGN}"

COLUMNS = {
    "mmlu": "MMLU",
    "arc_easy": "ARC-E",
    "gsm8k": "GSM8K",
    "boolq": "BoolQ",
    "medqa": "MedicalQA",
    "vmlu": "VMLU",
}
"""Benchmark -> its column in the original project's result.csv, in that file's order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """One model that was asked: a variant with one seed."""

    name: str
    """Its folder below `variants/`."""
    seed: int
    experts: tuple[str, ...] | None = None
    """Pruned or adapted experts, such as L2E54; None where the run has none."""
    trainable_parameters: int | None = None
    exposure: Mapping[str, int] | None = None
    """Training tokens that each adapted expert saw; None for what was not trained."""
    perplexity: float | None = None
    """On held-out text; None where it was not measured."""
    perplexity_interval: tuple[float, float] | None = None
    """95%, over the sequences; None also where there is only one."""
    scores: tuple[Score, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantScore:
    """A variant on one benchmark, all its runs together."""

    task: str
    items: int
    """Asked of each run."""
    runs: int
    correct: int
    """Summed over the runs, as `unparsed`."""
    unparsed: int
    accuracy: float
    """Mean over the runs, in 0..1."""
    low: float
    high: float
    """95% interval of the accuracy: Wilson's for one run; over items and seeds for several (`effects.proportion`)."""
    clustered: tuple[float, float] | None = None
    """95% interval with items of one subject as one cluster; None where there are too few subjects."""

    @property
    def unparsed_share(self) -> float:
        """Of all answers of all runs."""
        return self.unparsed / (self.items * self.runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One row of the result table."""

    name: str
    """base, prune-SET, lora-SET or lora-attention."""
    title: str
    kind: Kind
    target: str | None = None
    """The set of experts, or "attention"; None for base."""
    random: bool
    """Whether another seed would give another model: what was trained, or drawn."""
    runs: tuple[RunResult, ...]
    mean: float
    """Mean accuracy of the benchmarks, each counting once, in 0..1."""
    perplexity: float | None = None
    """Mean over the runs; None where it was not measured."""
    scores: tuple[VariantScore, ...]

    def score(self, task: str) -> VariantScore | None:
        """The variant's score on a benchmark, None where it was not run."""
        return next((score for score in self.scores if score.task == task), None)


Family = Literal["base", "benchmark", "control"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One variant against another on the same items; `difference` is the variant's accuracy minus the reference's."""

    family: Family
    """Tests that are corrected together: against base over all items, on each benchmark, and against controls."""
    variant: str
    reference: str
    task: str | None
    """None for all items of all benchmarks, each counting once."""
    n: int
    """Items that both answered."""
    runs: tuple[int, int]
    """Of the variant and of the reference."""
    only_base: int | None = None
    """Items that only the reference has right; None where a side has several runs, as the next one."""
    only_variant: int | None = None
    """Items that only the variant has right."""
    difference: float
    """In -1..1."""
    low: float
    high: float
    """95% interval: Tango's for one run each; over items and seeds where a side has several runs."""
    clustered: tuple[float, float] | None = None
    """95% interval with items of one subject as one cluster; None where there are too few subjects."""
    bootstrap: tuple[float, float] | None = None
    """95% percentile interval over resampled items (subjects, where there are), the runs being what they are."""
    seed_sd: tuple[float | None, float | None] = (None, None)
    """Standard deviation of the accuracy between runs, the items' share taken off, of the variant and of the reference;
    None for one run."""
    test: Literal["mcnemar", "seeds"]
    subjects: int | None = None
    """Subjects that the test took as the sample too, the larger p-value counting; None where there are under twenty."""
    p: float
    """Two-sided: the exact McNemar test, or the test with seeds as a random effect. Not adjusted."""
    adjusted: float
    """By Holm within the family."""
    detectable: float
    """The smallest difference that this test would have detected with 80% power, at the family's first step."""

    @property
    def sure(self) -> bool:
        """Whether a difference was detected at 5%."""
        return self.adjusted < SIGNIFICANT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a study found; holds no path and no date, so that two runs with one seed give the same file."""

    name: str
    model: str
    revision: str | None = None
    limit: int | None = None
    """Items per benchmark at most; None when all were asked."""
    protocol: str = "generative"
    """How the benchmarks were asked."""
    corpora: tuple[str, ...]
    """Corpora of the profile; the first one is the perplexity's."""
    tasks: tuple[str, ...]
    variants: tuple[VariantResult, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def base(self) -> VariantResult:
        """The variant that the others are compared with."""
        return next(variant for variant in self.variants if variant.kind == "base")

    @property
    def others(self) -> tuple[VariantResult, ...]:
        """Every variant but the base, in order."""
        return tuple(variant for variant in self.variants if variant.kind != "base")

    @property
    def runs(self) -> tuple[tuple[VariantResult, RunResult], ...]:
        """Every run with its variant, in order."""
        return tuple((variant, run) for variant in self.variants for run in variant.runs)

    @property
    def columns(self) -> tuple[str, ...]:
        """The benchmarks that were run, in the order of `COLUMNS`, unknown ones last."""
        known = list(COLUMNS)
        return tuple(sorted(self.tasks, key=lambda task: known.index(task) if task in COLUMNS else len(known)))

    def variant(self, name: str) -> VariantResult:
        """The variant of that name, which must be there."""
        return next(variant for variant in self.variants if variant.name == name)

    def family(self, name: Family) -> tuple[Comparison, ...]:
        """The comparisons of a family, in order."""
        return tuple(row for row in self.comparisons if row.family == name)

    def to_base(self, variant: str, task: str | None = None) -> Comparison | None:
        """The variant against base on a benchmark, or over all items; None for base itself."""
        rows = self.family("base" if task is None else "benchmark")
        return next((row for row in rows if (row.variant, row.task) == (variant, task)), None)

    @classmethod
    def from_json(cls, value: Any) -> Results:
        """Reads results.json's value; `DataError` for anything else, and unless exactly one variant is the base."""
        check_schema(value, RESULTS_SCHEMA, "results", "run the study again")
        results = validated(cls, value, "results", "run the study again")
        bases = sum(variant.kind == "base" for variant in results.variants)
        if bases != 1:
            raise DataError(f"results: {bases} variants are the base, one is needed; run the study again")
        names = {variant.name for variant in results.variants}
        for row in results.comparisons:
            if not {row.variant, row.reference} <= names:
                raise DataError(
                    f"results: {row.variant} against {row.reference} compares no variant; run the study again"
                )
        for variant in results.others:
            for task in (None, *results.tasks):
                if results.to_base(variant.name, task) is None:
                    raise DataError(f"results: {variant.name} has no test against base; run the study again")
        return results

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Reads `results.json` of a study's folder."""
        return cls.from_json(read_json(folder / "results.json", "results"))


def task_title(task: str) -> str:
    """A benchmark's column title; a name that the original did not have stays as it is."""
    return COLUMNS.get(task, task)


def signed_points(difference: float, digits: int = 1) -> str:
    """0.0123 -> `+1.2`, with a real minus sign; a difference that rounds to nothing has no sign."""
    text = f"{100 * abs(difference):.{digits}f}"
    return text if float(text) == 0 else f"{MINUS if difference < 0 else '+'}{text}"
