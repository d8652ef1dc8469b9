"""`results.json`: every variant on every benchmark, and the same table for a spreadsheet, a README and a terminal.

The three writers take the file's JSON value, as `study` makes it, and check it first.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .artifacts import Score
from .errors import DataError
from .rundir import read_json, write_text
from .stats import Paired, holm

__all__ = [
    "COLUMNS",
    "SIGNIFICANT",
    "Results",
    "VariantResult",
    "adjusted",
    "markdown_table",
    "print_table",
    "signed_points",
    "task_title",
    "write_csv",
]

RESULTS_SCHEMA = "superexperts/results/1"
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
class VariantResult:
    """One row of the result table."""

    name: str
    """Folder of the variant below `variants/`."""
    title: str
    kind: Literal["base", "prune", "lora"]
    experts: tuple[str, ...] | None
    """Pruned or adapted experts, such as L2E54; None where the variant has none."""
    target: str | None
    """What LoRA adapts: "experts" or "attention"; None for other kinds."""
    trainable_parameters: int | None
    perplexity: float | None
    """On held-out text; None where it was not measured."""
    perplexity_interval: tuple[float, float] | None
    """95%, over the sequences; None also where there is only one."""
    mean: float
    """Mean accuracy of the benchmarks, each counting once, in 0..1."""
    scores: tuple[Score, ...]
    paired: Mapping[str, Paired] | None
    """Per benchmark against base; None for base itself, as `pooled`."""
    pooled: Paired | None
    """Against base over the items of all benchmarks, each item counting once."""

    def score(self, task: str) -> Score | None:
        """The variant's score on a benchmark, None where it was not run."""
        return next((score for score in self.scores if score.task == task), None)

    @classmethod
    def from_json(cls, value: Any) -> VariantResult:
        """Reads one entry of `variants`; KeyError or TypeError where a field is missing or wrong."""
        own = {field.name: value[field.name] for field in dataclasses.fields(cls)}
        paired, pooled = own["paired"], own["pooled"]
        interval = own["perplexity_interval"]
        own["perplexity_interval"] = None if interval is None else (interval[0], interval[1])
        own["experts"] = None if own["experts"] is None else tuple(own["experts"])
        own["scores"] = tuple(Score.from_json(score) for score in own["scores"])
        own["paired"] = None if paired is None else {task: Paired.from_json(row) for task, row in paired.items()}
        own["pooled"] = None if pooled is None else Paired.from_json(pooled)
        return cls(**own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a study found; holds no path and no date, so that two runs with one seed give the same file."""

    name: str
    model: str
    seed: int
    limit: int | None
    """Items per benchmark at most; None when all were asked."""
    corpus: str
    """Corpus of the profile and of the perplexity."""
    tasks: tuple[str, ...]
    variants: tuple[VariantResult, ...]

    @property
    def base(self) -> VariantResult:
        """The variant that the others are compared with."""
        return next(variant for variant in self.variants if variant.kind == "base")

    @property
    def others(self) -> tuple[VariantResult, ...]:
        """Every variant but the base, in order."""
        return tuple(variant for variant in self.variants if variant.kind != "base")

    @property
    def columns(self) -> tuple[str, ...]:
        """The benchmarks that were run, in the order of `COLUMNS`, unknown ones last."""
        known = list(COLUMNS)
        return tuple(sorted(self.tasks, key=lambda task: known.index(task) if task in COLUMNS else len(known)))

    @classmethod
    def from_json(cls, value: Any) -> Results:
        """Reads results.json's value; `DataError` for anything else, and unless exactly one variant is the base."""
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        if found != RESULTS_SCHEMA:
            raise DataError(f"results: expected schema {RESULTS_SCHEMA!r}, found {found!r}; run the study again")
        try:
            own = {field.name: value[field.name] for field in dataclasses.fields(cls)}
            own["tasks"] = tuple(own["tasks"])
            own["variants"] = tuple(VariantResult.from_json(row) for row in own["variants"])
        except (KeyError, TypeError) as error:
            raise DataError(f"results: a field is missing or wrong ({error}); run the study again") from error
        results = cls(**own)
        bases = sum(variant.kind == "base" for variant in results.variants)
        if bases != 1:
            raise DataError(f"results: {bases} variants are the base, one is needed; run the study again")
        for variant in results.others:
            if variant.paired is None or variant.pooled is None:
                raise DataError(f"results: {variant.name} has no paired test against base; run the study again")
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


def adjusted(results: Results) -> dict[tuple[str, str | None], float]:
    """(variant, benchmark or None for all items) -> p-value against base, adjusted by Holm.

    Two families: the variants over all items, and every variant on every benchmark.
    """
    pooled = {(variant.name, None): variant.pooled.p for variant in results.others if variant.pooled is not None}
    cells = {
        (variant.name, task): paired.p for variant in results.others for task, paired in (variant.paired or {}).items()
    }
    found: dict[tuple[str, str | None], float] = {}
    for family in (pooled, cells):
        found.update(zip(family, holm(list(family.values())), strict=True))
    return found


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Writes `result.csv` in the original's columns: accuracy in percent, empty where a benchmark was not run."""
    found = Results.from_json(results)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["Model Variant", *COLUMNS.values()])
    for variant in found.variants:
        scores = [variant.score(task) for task in COLUMNS]
        writer.writerow([variant.title, *("" if score is None else f"{100 * score.accuracy:.2f}" for score in scores)])
    write_text(path, buffer.getvalue())


def markdown_table(results: Mapping[str, Any]) -> str:
    """The result table for a README: accuracy in percent, a star where it differs from base (Holm, 5%)."""
    found = Results.from_json(results)
    header = ["variant", *(task_title(task) for task in found.columns), "mean", "perplexity"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *_cells(found)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def print_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints the result table; titles are text, never markup."""
    found = Results.from_json(results)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption="accuracy in %; * differs from base (McNemar, Holm, 5%; at the mean: over all items)",
        caption_justify="left",
    )
    table.add_column("variant", no_wrap=True)
    for title in (*(task_title(task) for task in found.columns), "mean", "ppl"):
        table.add_column(title, justify="right", no_wrap=True)
    for cells in _cells(found):
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _cells(results: Results) -> list[list[str]]:
    """Per variant: title, accuracies, mean, perplexity."""
    p_values = adjusted(results)
    lines = []
    for variant in results.variants:
        cells = [variant.title]
        for task in results.columns:
            score = variant.score(task)
            star = "*" if p_values.get((variant.name, task), 1.0) < SIGNIFICANT else ""
            cells.append("" if score is None else f"{100 * score.accuracy:.1f}{star}")
        star = "*" if p_values.get((variant.name, None), 1.0) < SIGNIFICANT else ""
        cells.append(f"{100 * variant.mean:.1f}{star}")
        cells.append("" if variant.perplexity is None else f"{variant.perplexity:.2f}")
        lines.append(cells)
    return lines
