"""The worked example of the docs: a benchmark of one short file is evaluated, extracted and shown in a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from superexperts.benchmarks import BENCHMARKS, title_of
from superexperts.cli import main
from superexperts.core.errors import DataError, OptionError
from superexperts.evaluation.evaluate import EvaluateConfig
from tests.benchmarks import example_benchmark
from tests.benchmarks.example_benchmark import SUMS

GUIDE = Path(__file__).parents[2] / "docs" / "contributing.md"


def test_a_new_benchmark_is_one_short_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = Path(example_benchmark.__file__).read_text()
    assert len(code.splitlines()) <= 40
    assert f"```python\n{code}```" in GUIDE.read_text(encoding="utf-8")
    monkeypatch.setitem(BENCHMARKS, SUMS.name, SUMS)
    rows = [
        {"question": "Which is 2 + 2?", "choices": ["3", "4"], "answer": 1},
        {"question": "Which is 3 + 3?", "choices": ["6", "7"], "answer": 0},
    ]
    (tmp_path / "sums_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "out")
    asked = ["--tasks", "sums", "--data-dir", str(tmp_path), "--max-new-tokens", "24", "--device", "cpu", "--out", out]
    assert main(["evaluate", "pocket", *asked]) == 0
    assert main(["extract", out]) == 0
    [score] = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert (score["task"], score["items"]) == ("sums", 2)
    assert 0 <= score["accuracy"] <= 1
    assert "sums" in capsys.readouterr().out
    assert title_of("sums") == "Sums"
    with pytest.raises(OptionError, match="tasks: 'sums' has no few-shot task"):
        EvaluateConfig(tasks="sums", protocol="loglikelihood")


def test_a_bad_row_names_the_row_and_the_field() -> None:
    with pytest.raises(DataError, match="sums: row 1: field 'answer' is missing"):
        SUMS.item({"question": "Which?", "choices": ["1", "2"]}, 0)
