"""What a study names is looked for before anything runs, and makes a finished study old when it changes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from superexperts import pocket, study
from superexperts.artifacts import ExpertSet
from superexperts.config_study import StudyConfig
from superexperts.errors import DataError, UserError
from superexperts.study_file import parse


def test_missing_files_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("{name: x, data_dir: pocket, train_data: nowhere.json}")
    with pytest.raises(DataError, match="STUDY train_data: 'nowhere.json' is missing"):
        study.run(StudyConfig(study=tmp_path / "s.yaml", out=tmp_path / "out"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "s.yaml"]


def test_everything_that_is_missing_is_told_at_once_before_any_work(tmp_path: Path, monkeypatch: Any) -> None:
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
experts: {{mine: L2E999}}
variants: [base, prune-mine, lora-super]
evaluation: {{engine: vllm}}
""")
    expected = [
        "STUDY train_data: .* row 1 has no 'answer'",
        "STUDY training.eval_data: 'nowhere.json' is missing",
        "--tasks: vmlu is not on the Hub",
        "STUDY corpus: 'nonsense' is neither a file nor one of",
        "STUDY corpus: .*blank.txt is empty",
        "STUDY experts.mine: L2E999 is not in the model",
        "--device: 'cuda:99' is not on this machine",
        "STUDY evaluation.engine: 'vllm' needs the package vllm",
    ]
    for dry_run in (False, True):
        with pytest.raises(DataError) as error:
            study.run(StudyConfig(study=file, out=tmp_path / "out", device="cuda:99", dry_run=dry_run))
        first, *told = str(error.value).splitlines()
        assert first == f"STUDY: {len(expected)} errors; nothing was run"
        assert all(re.match(f"  {said}", line) for said, line in zip(expected, told, strict=True)), told
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("data_dir: nowhere", "STUDY data_dir: 'nowhere' is missing"),
        ("model: nowhere/none", "MODEL: 'nowhere/none' is neither a folder nor"),
        (
            "{data_dir: pocket, evaluation: {perplexity: nonsense}}",
            "STUDY perplexity: 'nonsense' is neither a file nor",
        ),
        ("data_dir: .", "--data-dir: . has no gsm8k_main_test.jsonl"),
        ("{data_dir: pocket, corpus: c4}", "STUDY corpus: data_dir pocket has no 'c4'"),
    ],
)
def test_missing_data_are_told_before_any_work(fields: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        json.dumps({"name": "x", "variants": ["base"], "tasks": ["gsm8k"]} | yaml.safe_load(fields))
    )
    with pytest.raises(UserError, match=said):
        study.run(StudyConfig(study=tmp_path / "s.yaml", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


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
    before = study._inputs(plan)
    for name, (content, changed) in contents.items():
        (tmp_path / name).write_text(changed)
        assert study._inputs(plan) != before, name
        (tmp_path / name).write_text(content)
        assert study._inputs(plan) == before, name
