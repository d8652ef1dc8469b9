"""The result table: built once, from `Results`, and drawn as CSV, Markdown and terminal text here, and as HTML by
`reports`. A new column or figure is added to `result_table`; how it looks is up to each of the four.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from superexperts.benchmarks import result_columns, title_of
from superexperts.core.runs import write_text
from superexperts.results.results import (
    Comparison,
    Results,
    RunResult,
    VariantResult,
    signed_points,
)

__all__ = [
    "Cell",
    "Column",
    "Effect",
    "ResultTable",
    "Row",
    "count",
    "effect_of",
    "expert_names",
    "markdown_table",
    "mean_accuracy",
    "percent",
    "print_table",
    "result_table",
    "write_csv",
]

Effect = Literal["none", "down", "up"]
"""Direction of a detected difference from the base; "none" where none was detected."""

MANY_UNPARSED = 0.05
"""The page colours an unparsed share from here on: such an accuracy mostly measures the format."""
MANY_EXPERTS = 8
"""A longer list of experts is given as a count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A benchmark."""

    task: str
    title: str
    asked: int | Literal["?"]
    """Items that the base was asked; "?" where it was not run."""
    subjects: str = ""
    """`57 subjects`, of the asked items; empty for a benchmark without subjects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A variant on one benchmark; all text is in percent or points."""

    share: float
    """Accuracy in 0..1."""
    interval: str
    """95% interval of the accuracy."""
    clustered: str
    """The same with items of one subject as one cluster; empty where there are too few subjects."""
    runs: str
    """Accuracy of each run; empty for one run."""
    difference: str
    """To the base; empty for the base itself."""
    effect: Effect
    unparsed: str
    many_unparsed: bool

    @property
    def accuracy(self) -> str:
        """In percent."""
        return percent(self.share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A variant."""

    title: str
    experts: str
    """The first run's experts, and how many other sets were drawn."""
    runs: int
    cells: Mapping[str, Cell | None]
    """Benchmark -> cell, in the order of the columns; None where the benchmark was not run."""
    mean: str
    mean_effect: Effect
    """Of the test over all items."""
    mean_runs: str
    perplexity: str
    """Empty where it was not measured."""
    perplexity_interval: str
    """95% interval for one run, each run's perplexity for several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultTable:
    """A row for each variant, a column for each benchmark."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def result_table(results: Results) -> ResultTable:
    """The table of a study's results."""
    columns = []
    for task in results.columns:
        score = results.base.score(task)
        subjects = count(results.subjects[task], "subject") if task in results.subjects else ""
        columns.append(Column(task=task, title=title_of(task), asked=score.items if score else "?", subjects=subjects))
    return ResultTable(columns=tuple(columns), rows=tuple(_row(results, variant) for variant in results.variants))


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Writes `result.csv` in the original project's columns: accuracy in percent, empty where a benchmark was not run.

    `results` is the content of results.json, as for `markdown_table` and `print_table`.
    """
    table = result_table(Results.from_json(results))
    buffer = io.StringIO()
    # The csv module's default is \r\n, which would make the file differ from one written by hand.
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["Model Variant", *map(title_of, result_columns())])
    for row in table.rows:
        cells = [row.cells.get(task) for task in result_columns()]
        writer.writerow([row.title, *("" if cell is None else percent(cell.share, 2) for cell in cells)])
    write_text(path, buffer.getvalue())


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table for a README: accuracy in percent, with a star where it differs from the base (Holm, 5%)."""
    table = result_table(Results.from_json(results))
    header = ["variant", *(column.title for column in table.columns), "mean", "perplexity"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(_starred, table.rows)]
    # 92 is the backslash, which an f-string expression of Python 3.11 cannot hold.
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def print_table(results: Mapping[str, Any], console: Console) -> None:
    """Prints the table; titles are text, never markup."""
    table = result_table(Results.from_json(results))
    caption = "accuracy in %; * differs from base (paired test, Holm, 5%; at the mean: over all items)"
    caption += "".join(f"\n{one.title}: {one.asked} items of {one.subjects}" for one in table.columns if one.subjects)
    drawn = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        caption=caption,
        caption_justify="left",
    )
    drawn.add_column("variant")
    for title in (*(column.title for column in table.columns), "mean", "ppl"):
        drawn.add_column(title, justify="right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*map(Text, _starred(row)))
    console.print(drawn)


def _starred(row: Row) -> list[str]:
    """Title, accuracies, mean and perplexity, with a star at each detected difference."""
    accuracies = ["" if cell is None else cell.accuracy + _star(cell.effect) for cell in row.cells.values()]
    return [row.title, *accuracies, row.mean + _star(row.mean_effect), row.perplexity]


def _star(effect: Effect) -> str:
    return "" if effect == "none" else "*"


def _row(results: Results, variant: VariantResult) -> Row:
    if len(variant.runs) == 1:
        interval = "–".join(f"{end:.2f}" for end in variant.runs[0].perplexity_interval or ())
    else:
        interval = _each((run.perplexity for run in variant.runs), scale=1, digits=2)
    return Row(
        title=variant.title,
        experts=_experts_of(variant),
        runs=len(variant.runs),
        cells={task: _cell(variant, task, results.to_base(variant.name, task)) for task in results.columns},
        mean=percent(variant.mean),
        mean_effect=effect_of(results.to_base(variant.name)),
        mean_runs=_each(mean_accuracy(run) for run in variant.runs) if len(variant.runs) > 1 else "",
        perplexity="" if variant.perplexity is None else f"{variant.perplexity:.2f}",
        perplexity_interval=interval,
    )


def _cell(variant: VariantResult, task: str, to_base: Comparison | None) -> Cell | None:
    score = variant.score(task)
    if score is None:
        return None
    of_runs = [one.accuracy for run in variant.runs for one in run.scores if one.task == task]
    return Cell(
        share=score.accuracy,
        interval=f"{percent(score.low)}–{percent(score.high)}",
        clustered="" if score.clustered is None else "–".join(map(percent, score.clustered)),
        runs=_each(of_runs) if len(of_runs) > 1 else "",
        difference=signed_points(to_base.difference) if to_base is not None else "",
        effect=effect_of(to_base),
        unparsed=f"{percent(score.unparsed_share)}% unparsed" if score.unparsed else "all parsed",
        many_unparsed=score.unparsed_share >= MANY_UNPARSED,
    )


def _experts_of(variant: VariantResult) -> str:
    first, *more = [run.experts for run in variant.runs]
    others = sum(one != first for one in more)
    return expert_names(first) + (f" and {count(others, 'other draw')}" if others else "")


def expert_names(experts: Sequence[str] | None) -> str:
    """`L2E54, L3E38`, or how many there are; empty for None."""
    if experts is None:
        return ""
    return ", ".join(experts) if len(experts) <= MANY_EXPERTS else f"{len(experts):,} experts"


def mean_accuracy(run: RunResult) -> float:
    """Mean over a run's benchmarks, each counting once, in 0..1."""
    return statistics.fmean(score.accuracy for score in run.scores)


def effect_of(row: Comparison | None) -> Effect:
    """The direction of a comparison's difference, if one was detected."""
    return "none" if row is None or not row.detected else "down" if row.difference < 0 else "up"


def percent(share: float, digits: int = 1) -> str:
    """0.5912 -> `59.1`."""
    return f"{100 * share:.{digits}f}"


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _each(values: Iterable[float | None], scale: float = 100, digits: int = 1) -> str:
    return ", ".join("–" if value is None else f"{scale * value:.{digits}f}" for value in values)
