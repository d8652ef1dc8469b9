"""results.json and its three tables, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from superexperts.core.errors import DataError
from superexperts.results.results import Results, markdown_table, print_table, signed_points, write_csv
from superexperts.results.statistics.single_run import holm
from tests.support.study_folder import results_json


def test_csv_has_the_original_columns(tmp_path: Path) -> None:
    write_csv(results_json(), tmp_path / "result.csv")
    lines = list(csv.reader((tmp_path / "result.csv").read_text(encoding="utf-8").splitlines()))
    assert lines[0] == ["Model Variant", "MMLU", "ARC-E", "GSM8K", "BoolQ", "MedicalQA", "VMLU"]
    assert lines[1] == ["baseline", "75.00", "", "", "70.00", "", ""]
    assert lines[2] == ["prune super experts", "25.00", "", "", "40.00", "", ""]
    assert len(lines) == 6


def test_adjusted_is_holm_in_three_families() -> None:
    results = Results.from_json(results_json())
    for name, size in (("base", 4), ("benchmark", 8), ("control", 2)):
        family = results.family(name)
        assert len(family) == size
        assert [row.adjusted for row in family] == holm([row.p for row in family])
    # 20 items lost, none won: p = 2 / 2**20, the smallest of the eight cells
    found = results.to_base("prune-super", "mmlu")
    assert found is not None
    assert found.adjusted == pytest.approx(8 * 2 / 2**20)


def test_markdown_marks_only_detected_differences() -> None:
    lines = markdown_table(results_json()).splitlines()
    assert lines[0] == "| variant | MMLU | BoolQ | mean | perplexity |"
    assert lines[2] == "| baseline | 75.0 | 70.0 | 72.5 | 6.00 |"
    assert lines[3] == "| prune super experts | 25.0* | 40.0 | 32.5* | 15.00 |"
    assert lines[4] == "| prune random experts | 75.0 | 70.0 | 72.5 | 6.03 |"


def test_print_table_takes_titles_as_text() -> None:
    console = Console(file=io.StringIO(), width=100)
    value = results_json({"base": "[red]baseline[/red] [/nothing]", "prune-super": "prune super experts"})
    print_table(value, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]baseline[/red] [/nothing]" in text
    assert "25.0*" in text


@pytest.mark.parametrize(
    ("difference", "text"), [(0.0123, "+1.2"), (-0.25, "−25.0"), (0.0, "0.0"), (-0.0004, "0.0"), (1.0, "+100.0")]
)
def test_signed_points(difference: float, text: str) -> None:
    assert signed_points(difference) == text


def test_from_json_refuses_what_it_cannot_use() -> None:
    with pytest.raises(DataError, match="expected schema"):
        Results.from_json([])
    value = results_json()
    del value["variants"][0]["mean"]
    with pytest.raises(DataError, match="'mean'"):
        Results.from_json(value)
    value = results_json()
    value["variants"][0]["kind"] = "prune"
    with pytest.raises(DataError, match="0 variants are the base"):
        Results.from_json(value)
    value = results_json()
    del value["comparisons"][0]
    with pytest.raises(DataError, match="prune-super has no test against base"):
        Results.from_json(value)
