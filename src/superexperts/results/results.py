"""`results.json`: every variant on every benchmark, and the tests that compare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from superexperts.benchmarks import result_columns
from superexperts.core.errors import DataError
from superexperts.core.runs import read_json
from superexperts.core.types import Score
from superexperts.core.validation import check_schema, validated
from superexperts.results.variants import Kind

__all__ = [
    "RESULTS_SCHEMA",
    "SIGNIFICANT",
    "Comparison",
    "Results",
    "RunResult",
    "VariantResult",
    "VariantScore",
    "signed_points",
]

RESULTS_SCHEMA = "superexperts/results/2"
SIGNIFICANT = 0.05
MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """One evaluated model: a variant with one seed."""

    name: str
    """Its folder below `variants/`."""
    seed: int
    experts: tuple[str, ...] | None = None
    """Pruned or adapted experts, such as L2E54; None if the run has none."""
    trainable_parameters: int | None = None
    exposure: Mapping[str, int] | None = None
    """Training tokens routed to each adapted expert; None for a model that was not trained."""
    perplexity: float | None = None
    """On held-out text; None if it was not measured."""
    perplexity_interval: tuple[float, float] | None = None
    """95% interval over the sequences; None also if there is only one sequence."""
    scores: tuple[Score, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantScore:
    """A variant on one benchmark, over all its runs."""

    task: str
    items: int
    """Items per run."""
    runs: int
    correct: int
    """Right answers, summed over the runs; `unparsed` as well."""
    unparsed: int
    accuracy: float
    """Mean over the runs, in 0..1."""
    low: float
    high: float
    """95% interval of the accuracy: Wilson's for one run, over items and seeds for several."""
    chance: float | None = None
    """Accuracy without looking at a question; None for results of earlier versions."""
    clustered: tuple[float, float] | None = None
    """95% interval with subjects as the sample; None if there are too few subjects."""

    @property
    def unparsed_share(self) -> float:
        """Share of unparsed answers in all answers of all runs."""
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
    """Whether another seed would give another model, because it was trained or its experts were drawn."""
    runs: tuple[RunResult, ...]
    mean: float
    """Mean accuracy over the benchmarks, each with the same weight, in 0..1."""
    perplexity: float | None = None
    """Mean over the runs; None if it was not measured."""
    scores: tuple[VariantScore, ...]

    def score(self, task: str) -> VariantScore | None:
        """The variant's score on a benchmark; None if the benchmark was not run."""
        return next((score for score in self.scores if score.task == task), None)


Family = Literal["base", "benchmark", "control"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One variant compared with another on the same items; `difference` is its accuracy minus the reference's."""

    family: Family
    """Tests that are adjusted together: against base over all items, against base by benchmark, against controls."""
    variant: str
    reference: str
    task: str | None
    """None for all items of all benchmarks, each item with the same weight."""
    n: int
    """Items, which both answered."""
    runs: tuple[int, int]
    """Number of runs of the variant and of the reference."""
    only_base: int | None = None
    """Items that only the reference has right; None if a side has several runs. So for the next field."""
    only_variant: int | None = None
    """Items that only the variant has right."""
    difference: float
    """In -1..1."""
    low: float
    high: float
    """95% interval: Tango's for one run on each side; over items and seeds if a side has several runs."""
    clustered: tuple[float, float] | None = None
    """95% interval with subjects as the sample; None if there are too few subjects."""
    bootstrap: tuple[float, float] | None = None
    """95% percentile interval over resampled items, or subjects if there are enough; the runs are not resampled."""
    seed_sd: tuple[float | None, float | None] = (None, None)
    """Standard deviation between the seeds of the variant and of the reference, without the residual's share; None for
    a side with one run."""
    test: Literal["mcnemar", "seeds"]
    subjects: int | None = None
    """Number of subjects that were also tested as the sample (the larger p-value counts); None if under twenty."""
    p: float
    """Two-sided p-value of the exact McNemar test, or of the test with seeds as a random effect. Not adjusted."""
    adjusted: float
    """p-value adjusted by Holm within the family."""
    detectable: float
    """The smallest difference that this test detects with 80% power, at the first step of Holm's procedure."""

    @property
    def detected(self) -> bool:
        """Whether a difference was detected at 5%."""
        return self.adjusted < SIGNIFICANT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a study. They hold no path and no date, so that two runs with one seed give the same file."""

    name: str
    model: str
    revision: str | None = None
    limit: int | None = None
    """Most items per benchmark; None if all were asked."""
    protocol: str = "generative"
    """How the benchmarks were asked."""
    corpora: tuple[str, ...]
    """Corpora of the profile; perplexity is measured on the first one."""
    tasks: tuple[str, ...]
    caution: str | None = None
    """What to know about the super experts that do not stand out; None if all do, and in older files."""
    subjects: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Benchmark -> how many subjects its asked items have, for benchmarks with subjects; empty in older files."""
    variants: tuple[VariantResult, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def base(self) -> VariantResult:
        """The unchanged model, which the other variants are compared with."""
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
        """The benchmarks that were run, in the order of the columns of result.csv, the others last."""
        known = result_columns()
        return tuple(sorted(self.tasks, key=lambda task: known.index(task) if task in known else len(known)))

    def variant(self, name: str) -> VariantResult:
        """The variant with this name, which must exist."""
        return next(variant for variant in self.variants if variant.name == name)

    def family(self, name: Family) -> tuple[Comparison, ...]:
        """The comparisons of a family, in order."""
        return tuple(row for row in self.comparisons if row.family == name)

    def to_base(self, variant: str, task: str | None = None) -> Comparison | None:
        """The comparison of a variant with base, on a benchmark or over all items; None for base itself."""
        rows = self.family("base" if task is None else "benchmark")
        return next((row for row in rows if (row.variant, row.task) == (variant, task)), None)

    @classmethod
    def from_json(cls, value: Any) -> Results:
        """Reads results.json's value; `DataError` for anything else, and unless exactly one variant is the base."""
        check_schema(value, RESULTS_SCHEMA, "results", "run the study again")
        results = validated(cls, value, "results", "run the study again")
        bases = sum(variant.kind == "base" for variant in results.variants)
        if bases != 1:
            raise DataError(f"{bases} variants are the base, one is needed; run the study again", field="results")
        names = {variant.name for variant in results.variants}
        for row in results.comparisons:
            if not {row.variant, row.reference} <= names:
                raise DataError(
                    f"{row.variant} or {row.reference} is compared but not a variant; run the study again",
                    field="results",
                )
        for variant in results.others:
            for task in (None, *results.tasks):
                if results.to_base(variant.name, task) is None:
                    raise DataError(f"{variant.name} has no test against base; run the study again", field="results")
        return results

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Reads `results.json` of a study's folder."""
        return cls.from_json(read_json(folder / "results.json", "results"))


def signed_points(difference: float, digits: int = 1) -> str:
    """0.0123 -> `+1.2`, with a real minus sign; a difference that rounds to nothing has no sign."""
    text = f"{100 * abs(difference):.{digits}f}"
    return text if float(text) == 0 else f"{MINUS if difference < 0 else '+'}{text}"
