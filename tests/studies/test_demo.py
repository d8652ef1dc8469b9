"""`make demo`'s study, whole, as a user runs it: its verdicts are right, a second run does no work, and the notebook
reads its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superexperts.benchmarks import default_benchmarks

TASKS = default_benchmarks()


def run(folder: Path) -> str:
    """Runs the demo in a separate process, without a data folder, and returns what it says while it works."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SUPEREXPERTS_DATA", None)
    command = [sys.executable, "-m", "superexperts", "study", "--demo", "--out", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stderr


def against_base(results: Any, variant: str) -> Any:
    """The comparison over all items."""
    found = [row for row in results["comparisons"] if (row["family"], row["variant"]) == ("base", variant)]
    assert len(found) == 1
    return found[0]


def _run_notebook(folder: Path, results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the cells of the notebook on a study; its figures are the study's."""
    monkeypatch.setenv("SUPEREXPERTS_STUDY", str(folder))
    notebook = json.loads((Path(__file__).parents[2] / "notebooks" / "explore.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    runs = [run for row in results["variants"] for run in row["runs"]]
    scores = {(run["name"], score["task"]): score for run in runs for score in run["scores"]}
    assert len(names["items"]) == sum(score["items"] for score in scores.values())
    for (variant, task), score in scores.items():
        assert names["accuracy"].loc[variant, task] == pytest.approx(100 * score["accuracy"], abs=0.05)
    assert names["how"].sum().sum() == len(names["items"])
    (folder / "rows").write_text('{"response": "one\u2028two\x85"}\n{}\n', encoding="utf-8")
    assert names["lines"](folder / "rows") == [{"response": "one\u2028two\x85"}, {}]
    assert len(names["unparsed"]) == sum(score["unparsed"] for score in scores.values())
    pair = against_base(results, names["OTHER"])
    assert names["pairs"].lost.sum() == pair["only_base"]
    assert names["pairs"].won.sum() == pair["only_variant"]


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run(tmp_path / "demo")
    assert "up to date" not in said
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    rows = {row["name"]: row for row in results["variants"]}
    assert set(rows["prune-super"]["runs"][0]["experts"]) == {"L1E11", "L3E54"}
    pruned, control = against_base(results, "prune-super"), against_base(results, "prune-random")
    assert pruned["difference"] < -0.03
    assert pruned["p"] < 0.001
    assert abs(control["difference"]) < 0.02
    assert control["p"] > 0.05
    assert rows["prune-super"]["perplexity"] > 1.5 * rows["base"]["perplexity"]
    assert {score["task"] for score in rows["base"]["scores"]} == set(TASKS)
    assert all(score["items"] == results["limit"] for row in results["variants"] for score in row["scores"])
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "L1E11" in page
    _run_notebook(tmp_path / "demo", results, monkeypatch)
    before = (tmp_path / "demo" / "results.json").stat().st_mtime_ns
    assert "is up to date, nothing to do" in run(tmp_path / "demo")
    assert (tmp_path / "demo" / "results.json").stat().st_mtime_ns == before
