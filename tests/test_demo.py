"""`make demo`'s study, whole, as a user runs it: its verdicts are right, and a second run does no work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from superexperts.config import TASKS


def run(folder: Path) -> str:
    """Runs the demo in a process of its own, without anybody's data, and returns what it says while it works."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SUPEREXPERTS_DATA", None)
    command = [sys.executable, "-m", "superexperts", "study", "--demo", "--out", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stderr


def test_the_demo(tmp_path: Path) -> None:
    said = run(tmp_path / "demo")
    assert "up to date" not in said
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    rows = {row["name"]: row for row in results["variants"]}
    assert set(rows["prune-super"]["experts"]) == {"L1E11", "L3E54"}
    pruned, control = rows["prune-super"]["pooled"], rows["prune-random"]["pooled"]
    assert pruned["difference"] < -0.03
    assert pruned["p"] < 0.001
    assert abs(control["difference"]) < 0.02
    assert control["p"] > 0.05
    assert rows["prune-super"]["perplexity"] > 1.5 * rows["base"]["perplexity"]
    assert {score["task"] for score in rows["base"]["scores"]} == set(TASKS)
    assert all(score["items"] == results["limit"] for row in results["variants"] for score in row["scores"])
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "L1E11" in page
    before = (tmp_path / "demo" / "results.json").stat().st_mtime_ns
    assert "is up to date, nothing to do" in run(tmp_path / "demo")
    assert (tmp_path / "demo" / "results.json").stat().st_mtime_ns == before
