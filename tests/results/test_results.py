"""results.json and its three tables, against numbers worked out by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from superexperts.core.errors import DataError
from superexperts.results.results import Results, signed_points
from superexperts.results.statistics.single_run import holm
from superexperts.results.tables import markdown_table, print_table, write_csv
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
    with pytest.raises(
        DataError, match="expected a file of schema 'superexperts/results/2', found 'list'; run the study again"
    ):
        Results.from_json([])
    value = results_json()
    del value["variants"][0]["mean"]
    with pytest.raises(DataError, match=r"results: variants\.0\.mean is missing; run the study again"):
        Results.from_json(value)
    value = results_json()
    value["variants"][0]["kind"] = "prune"
    with pytest.raises(DataError, match="0 variants are the base"):
        Results.from_json(value)
    value = results_json()
    del value["comparisons"][0]
    with pytest.raises(DataError, match="prune-super has no test against base"):
        Results.from_json(value)


WRITTEN_BY_0_1_0 = """{
 "schema": "superexperts/results/2", "name": "demo", "model": "pocket", "revision": null, "limit": 100,
 "protocol": "generative", "corpora": ["pocket"], "tasks": ["mmlu"],
 "variants": [
  {"name": "base", "title": "baseline", "kind": "base", "target": null, "random": false, "runs": [
    {"name": "base", "seed": 0, "experts": null, "trainable_parameters": null, "exposure": null,
     "perplexity": 2.0822561736721212, "perplexity_interval": [2.0462863059903005, 2.1188583240297634], "scores": [
      {"task": "mmlu", "variant": "base", "items": 100, "correct": 59, "unparsed": 20, "accuracy": 0.59,
       "low": 0.4920143005341078, "high": 0.6813268697886348}]}],
   "mean": 0.59, "perplexity": 2.0822561736721212, "scores": [
    {"task": "mmlu", "items": 100, "runs": 1, "correct": 59, "unparsed": 20, "accuracy": 0.59,
     "low": 0.4920143005341078, "high": 0.6813268697886348, "clustered": [0.0, 0.3851454782474236]}]},
  {"name": "prune-super", "title": "prune super experts", "kind": "prune", "target": "super", "random": false, "runs": [
    {"name": "prune-super", "seed": 0, "experts": ["L3E54"], "trainable_parameters": null, "exposure": null,
     "perplexity": 4.89, "perplexity_interval": null, "scores": []}],
   "mean": 0.19, "perplexity": 4.89, "scores": []}],
 "comparisons": [
  {"family": "base", "variant": "prune-super", "reference": "base", "task": null, "n": 100, "runs": [1, 1],
   "only_base": 45, "only_variant": 5, "difference": -0.4, "low": -0.5254009082960244, "high": -0.2,
   "clustered": [-0.56, -0.2], "seed_sd": [null, null], "test": "mcnemar", "subjects": null, "p": 1.9e-15,
   "bootstrap": [-0.55, -0.25], "detectable": 0.1, "adjusted": 1.9e-15},
  {"family": "benchmark", "variant": "prune-super", "reference": "base", "task": "mmlu", "n": 100, "runs": [1, 1],
   "only_base": 45, "only_variant": 5, "difference": -0.4, "low": -0.5254009082960244, "high": -0.2,
   "clustered": null, "seed_sd": [null, 0.01], "test": "seeds", "subjects": 21, "p": 1.9e-15,
   "bootstrap": null, "detectable": 0.1, "adjusted": 1.9e-15}]
}"""


def test_a_file_of_the_version_before_is_read() -> None:
    value = json.loads(WRITTEN_BY_0_1_0)
    results = Results.from_json(value)
    value |= {"subjects": {}, "caution": None}
    value["variants"][0]["runs"][0]["scores"][0] |= {"cut": 0, "empty": 0, "refused": 0}
    for variant in value["variants"]:
        for score in variant["scores"]:
            score["chance"] = None
    assert json.loads(json.dumps({"schema": value["schema"], **dataclasses.asdict(results)})) == value
    assert results.base.runs[0].perplexity_interval == (2.0462863059903005, 2.1188583240297634)
    assert results.family("benchmark")[0].seed_sd == (None, 0.01)
    # Later versions may add fields, and fields that an earlier one did not have take their defaults.
    value["added_later"] = value["variants"][0]["added_later"] = 1
    for row in value["comparisons"]:
        del row["bootstrap"]
    assert Results.from_json(value).comparisons[0].bootstrap is None
