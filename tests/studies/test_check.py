"""What a study names is looked for before anything runs, and makes a finished study old when it changes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from superexperts import pocket
from superexperts.core.errors import DataError, UserError
from superexperts.core.types import ExpertSet
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.studies import cells, check, study, workflow
from superexperts.studies.study import StudyConfig
from superexperts.studies.study_file import parse


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for a Hub that is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_missing_files_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("{name: x, data_dir: pocket, train_data: nowhere.json}")
    with pytest.raises(DataError, match=r"s.yaml: line 1: train_data: 'nowhere.json' does not exist"):
        study.run(StudyConfig(study=tmp_path / "s.yaml", out=tmp_path / "out"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "s.yaml"]


def test_everything_that_is_missing_is_reported_at_once_before_any_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("SUPEREXPERTS_DATA", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "rows.json").write_text('[{"question": "q", "explain": "e"}]')
    (tmp_path / "blank.txt").write_text("\n")
    file = tmp_path / "s.yaml"
    file.write_text(f"""
name: x
corpus: [nonsense, {tmp_path / "blank.txt"}, c4]
tasks: [mmlu, vmlu]
train_data: {tmp_path / "rows.json"}
training: {{eval_data: nowhere.json}}
experts: {{mine: L2E999, many: {{rule: routed, count: 9999}}}}
variants: [base, prune-mine, lora-super: {{load_in_4bit: true}}]
evaluation: {{engine: vllm}}
extraction: {{judge: no/judge, judge_engine: sglang}}
max_new_tokens: 2048
""")
    expected = [
        "line 5: train_data: .* row 1 has no 'answer'",
        "line 6: training.eval_data: 'nowhere.json' does not exist",
        "line 4: tasks: vmlu is not on the Hub",
        "line 3: corpus: 'nonsense' is neither a file nor one of",
        "line 3: corpus: .*blank.txt is empty",
        "line 11: max_new_tokens: 2048 exceeds the model's context; give at most 2047",
        "line 7: experts.mine: L2E999 is not in the model",
        "line 7: experts.many.count: the model has 288 routed experts, not 9999",
        "device: 'cuda:99' is not on this machine",
        "line 9: evaluation.engine: 'vllm' needs the package vllm",
        "line 8: load_in_4bit: bitsandbytes is not installed",
        "line 10: extraction.judge: 'no/judge' is neither a folder nor",
        "line 10: extraction.judge_engine: 'sglang' needs the package sglang",
    ]
    for dry_run in (False, True):
        with pytest.raises(DataError) as error:
            study.run(StudyConfig(study=file, out=tmp_path / "out", device="cuda:99", dry_run=dry_run))
        first, *reported = str(error.value).splitlines()
        assert first == f"{file}: {len(expected)} errors; nothing was run"
        assert len(reported) == len(expected), reported
        assert all(re.match(f"  {said}", line) for said, line in zip(expected, reported, strict=True)), reported
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("data_dir: nowhere", "line 1: data_dir: 'nowhere' does not exist"),
        ("model: nowhere/none", "line 1: model: 'nowhere/none' is neither a folder nor"),
        (
            "{data_dir: pocket, evaluation: {perplexity: nonsense}}",
            "line 1: perplexity: 'nonsense' is neither a file nor",
        ),
        ("data_dir: .", "data_dir: '.' has no gsm8k_main_test.jsonl"),
        (
            "{data_dir: pocket, corpus: MEDIUM}",
            "line 1: corpus: .*medium.txt has [0-9]* tokens, .* under tokens 16384; give tokens [0-9]*",
        ),
        (
            "{data_dir: pocket, corpus: SHORT}",
            "line 1: corpus: .*short.txt has .* tokens, under one sequence; give seq_len",
        ),
        ("{data_dir: pocket, seq_len: 4096}", "line 1: seq_len: 4096 exceeds the model's context; give at most 2048"),
        (
            '{data_dir: pocket, extraction: {judge: x, judge_base_url: "http://127.0.0.1:1/v1"}}',
            "line 1: extraction.judge_base_url: .* cannot be reached .ConnectionRefusedError.; start the server",
        ),
        (
            "{data_dir: pocket, extraction: {judge: all}}",
            "line 1: extraction.judge: 'Qwen/Qwen2.5-32B-Instruct' is neither a folder nor",
        ),
        ("{data_dir: pocket, corpus: c4}", "line 1: corpus: data_dir pocket has no 'c4'"),
    ],
)
def test_missing_data_are_reported_before_any_work(fields: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "medium.txt").write_text("The lamp is red. " * 800)
    fields = fields.replace("SHORT", str(tmp_path / "short.txt")).replace("MEDIUM", str(tmp_path / "medium.txt"))
    (tmp_path / "s.yaml").write_text(
        json.dumps({"name": "x", "variants": ["base"], "tasks": ["gsm8k"]} | yaml.safe_load(fields))
    )
    with pytest.raises(UserError, match=said):
        study.run(StudyConfig(study=tmp_path / "s.yaml", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "column"),
    [
        ("corpus: ROWS, profile: {column: body}", "body"),  # the perplexity's is the profile's
        ("evaluation: {perplexity: ROWS, column: body}", "body"),
        ("corpus: pocket, profile: {column: body}", None),
    ],
)
def test_the_perplexity_is_measured_on_the_corpus_own_column(
    fields: str, column: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "The lamp is red."}\n' * 40)
    fields = fields.replace("ROWS", str(tmp_path / "rows.jsonl"))
    plan = parse(f"{{name: x, data_dir: pocket, variants: [base], tokens: 64, seq_len: 32, {fields}}}")
    for _, check_field in check._data(plan):
        check_field()
    asked: list[EvaluateConfig] = []
    monkeypatch.setattr(cells.evaluate, "run", lambda config, load: asked.append(config))
    cells.Worker(plan, tmp_path / "out", "cpu")._evaluate(plan.runs[0])
    assert [config.column for config in asked] == [column]


def test_what_a_study_reads_makes_it_old_when_it_changes(tmp_path: Path) -> None:
    pocket.write_data(tmp_path)
    text = f"""
name: x
data_dir: pocket
corpus: {tmp_path / "a.txt"}
evaluation: {{perplexity: {tmp_path / "b.txt"}}}
train_data: {tmp_path / "train.json"}
training: {{eval_data: {tmp_path / "e.json"}}}
experts: {{mine: {tmp_path / "mine.json"}, busy: {{rule: gate, like: {tmp_path / "like.json"}}}}}
"""
    experts = [json.dumps(ExpertSet.parse(keys).to_json()) for keys in ("L2E3", "L2E4")]
    rows = (tmp_path / "train.json").read_text()
    contents = {
        "a.txt": ("a", "b"),
        "b.txt": ("a", "b"),
        "e.json": (rows, rows + " "),
        "train.json": (rows, rows + " "),
        "mine.json": experts,
        "like.json": experts,
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_text(content)
    plan = parse(text)
    before = workflow._inputs(plan)
    for name, (content, changed) in contents.items():
        (tmp_path / name).write_text(changed)
        assert workflow._inputs(plan) != before, name
        (tmp_path / name).write_text(content)
        assert workflow._inputs(plan) == before, name
