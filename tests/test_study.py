"""The whole workflow on the pocket model: right numbers, no work done twice, and a kill that costs nothing."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superexperts import pocket, study
from superexperts.artifacts import Extraction
from superexperts.cli import main
from superexperts.config import StudyConfig
from superexperts.corpora import read_rows
from superexperts.errors import DataError, OptionError

TASKS = ["gsm8k", "boolq"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that takes seconds: two benchmarks of twelve items, one epoch over 48 rows."""
    folder = tmp_path_factory.mktemp("study")
    pocket.write_data(folder / "data")
    rows = json.loads((folder / "data" / "train.json").read_text(encoding="utf-8"))[:48]
    (folder / "rows.json").write_text(json.dumps(rows))
    text = f"""
name: small
corpus: pocket
tokens: 2048
seq_len: 128
tasks: [{", ".join(TASKS)}]
limit: 12
max_new_tokens: 32
data_dir: {folder / "data"}
train_data: {folder / "rows.json"}
training: {{epochs: 1, batch_size: 16, learning_rate: 1.0e-3}}
"""
    (folder / "small.yaml").write_text(text)
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def finished(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    study.run(StudyConfig(study=plan, out=out))
    return out


def test_results_are_what_the_files_of_the_stages_say(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["variants"]] == list(study.VARIANTS)
    rights: dict[str, dict[str, list[bool]]] = {}
    for row in results["variants"]:
        for score in row["scores"]:
            file = finished / "variants" / row["name"] / "extractions" / f"{score['task']}.jsonl"
            found = [Extraction.from_json(value) for _, value in read_rows(file, "x")]
            rights.setdefault(row["name"], {})[score["task"]] = [extraction.correct for extraction in found]
            assert score["items"] == len(found) == 12
            assert score["correct"] == sum(extraction.correct for extraction in found)
            assert score["unparsed"] == sum(extraction.extracted is None for extraction in found)
            assert score["accuracy"] == pytest.approx(score["correct"] / 12)
            assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
        assert row["mean"] == pytest.approx(sum(score["accuracy"] for score in row["scores"]) / 2)
    for row in results["comparisons"]:
        tasks = TASKS if row["task"] is None else [row["task"]]
        ours, other = (
            [right for task in tasks for right in rights[row[side]][task]] for side in ("variant", "reference")
        )
        assert row["only_variant"] == sum(a and not b for a, b in zip(ours, other, strict=True))
        assert row["only_base"] == sum(b and not a for a, b in zip(ours, other, strict=True))
        assert row["n"] == 12 * len(tasks)


def test_variants_are_what_they_say(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())["variants"]
    rows = {row["name"]: row | row["runs"][0] for row in found}
    planted = {f"L{layer}E{expert}" for layer, expert in pocket.PLANTED}
    assert set(rows["prune-super"]["experts"]) == set(rows["lora-super"]["experts"]) == planted
    assert rows["prune-random"]["experts"] == rows["lora-random"]["experts"]
    assert not planted & set(rows["prune-random"]["experts"])
    layers = sorted(name.split("E")[0] for name in rows["prune-random"]["experts"])
    assert layers == sorted(f"L{layer}" for layer, _ in pocket.PLANTED)
    assert rows["lora-super"]["trainable_parameters"] == rows["lora-random"]["trainable_parameters"] > 0
    assert rows["lora-attention"]["experts"] is None
    assert rows["prune-super"]["perplexity"] >= 1.5 * rows["base"]["perplexity"]
    assert rows["prune-random"]["perplexity"] <= 1.1 * rows["base"]["perplexity"]


def test_csv_has_the_originals_columns(finished: Path) -> None:
    with (finished / "result.csv").open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["Model Variant", "MMLU", "ARC-E", "GSM8K", "BoolQ", "MedicalQA", "VMLU"]
    results = json.loads((finished / "results.json").read_text())
    assert len(table) == 7
    for line, row in zip(table[1:], results["variants"], strict=True):
        accuracy = {score["task"]: f"{100 * score['accuracy']:.2f}" for score in row["scores"]}
        assert line[1:] == ["", "", accuracy["gsm8k"], accuracy["boolq"], "", ""]


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_second_run_does_no_work_and_says_so(finished: Path, plan: Path, capsys: Any) -> None:
    before = stamps(finished)
    assert main(["study", str(plan), "--out", str(finished)]) == 0
    assert "is up to date, nothing to do" in capsys.readouterr().err
    assert stamps(finished) == before


def test_numbers_may_be_written_as_yaml_reads_them() -> None:
    plan = study.Plan.load("{name: x, data_dir: pocket, tokens: 1e4, training: {learning_rate: 1e-3}}")
    assert (plan.tokens, plan.training["learning_rate"]) == (10_000, 0.001)


def test_changed_benchmark_files_make_a_finished_study_old(plan: Path, finished: Path) -> None:
    file = plan.parent / "data" / "gsm8k_main_test.jsonl"
    text = file.read_text(encoding="utf-8")
    loaded = study.Plan.load(plan.read_text(encoding="utf-8"))
    before = study._data_identity(loaded)
    file.write_text(text.replace("#### ", "#### 9", 1), encoding="utf-8")
    try:
        after = study._data_identity(loaded)
    finally:
        file.write_text(text, encoding="utf-8")
    assert after["gsm8k"] != before["gsm8k"]
    assert after["boolq"] == before["boolq"]


def test_missing_files_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("{name: x, data_dir: pocket, train_data: nowhere.json}")
    with pytest.raises(DataError, match="STUDY train_data: 'nowhere.json' is missing"):
        study.run(StudyConfig(study=tmp_path / "s.yaml", out=tmp_path / "out"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "s.yaml"]


def test_a_lost_cell_is_made_again_and_the_others_are_kept(finished: Path, plan: Path) -> None:
    expected = (finished / "results.json").read_bytes()
    before = stamps(finished / "variants" / "base" / "answers")
    (finished / "variants" / "prune-super" / "answers" / "boolq.jsonl").unlink()
    (finished / "results.json").unlink()
    study.run(StudyConfig(study=plan, out=finished))
    assert (finished / "results.json").read_bytes() == expected
    assert stamps(finished / "variants" / "base" / "answers") == before


@pytest.mark.parametrize("marker", ["prune-super", "lora-super"])
def test_a_killed_study_continues_to_the_same_results(finished: Path, plan: Path, tmp_path: Path, marker: str) -> None:
    command = [sys.executable, "-m", "superexperts", "study", str(plan), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if marker in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "results.json").exists()
    study.run(StudyConfig(study=plan, out=tmp_path / "out"))
    assert (tmp_path / "out" / "results.json").read_bytes() == (finished / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "has no `name:`"),
        ("name: [", "not valid YAML"),
        ("{name: x, colour: red}", "'colour' is no field of a study"),
        ("{name: x, data_dir: pocket, variants: [base, nope]}", "'nope' is unknown"),
        ("{name: x, data_dir: pocket, variants: [prune-super]}", "put base first"),
        ("{name: x, data_dir: pocket, training: {rank: 3}}", "'rank' is no option of train"),
        ("{name: x}", "train_data: None is missing"),
        ("{name: 5}", "STUDY name: 5 is not a text"),
        ("{name: ../x}", "STUDY name: '../x' is not a text"),
        ("{name: x, tasks: mmlu}", "STUDY tasks: 'mmlu' is not a list of names"),
        ("{name: x, data_dir: pocket, tasks: [nope]}", "--tasks: 'nope' is unknown"),
        ("{name: x, tokens: many}", "STUDY tokens: 'many' is not a whole number"),
        ("{name: x, tokens: 1.5}", "STUDY tokens: 1.5 is not a whole number"),
        ("{name: x, data_dir: pocket, depth: 2}", "--depth: 2.0 is out of range"),
        ("{name: x, variants: [base, base]}", "names one twice"),
        ("{name: x, data_dir: pocket, training: {r: -1}}", "--r: -1 is not positive"),
        ("{name: x, data_dir: pocket, training: {r: [1]}}", "a value has the wrong type"),
    ],
)
def test_a_wrong_study_file_is_named(text: str, said: str) -> None:
    with pytest.raises(OptionError) as error:
        study.Plan.load(text)
    assert said in str(error.value)
