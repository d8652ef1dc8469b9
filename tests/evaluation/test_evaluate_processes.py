"""Evaluation in two processes against one: the same answers, also after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from superexperts.cli import main

# Two processes on a CPU: with `--cpu` accelerate starts a single one, whatever --num_processes says.
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_processes=2",
    "--mixed_precision=no",
    "--multi_gpu",
]
# Ends a process in the middle of its second batch, and says how many prompts each process was given.
SCRIPT = """
import os, sys
from superexperts import cli
from superexperts.engines.harness import TransformersModel
stock, seen = TransformersModel._model_generate, 0
def counted(self, context, *arguments, **more):
    global seen
    seen += len(context)
    if os.environ["KILLED"] == os.environ["RANK"] and seen > 4:
        os._exit(9)
    return stock(self, context, *arguments, **more)
TransformersModel._model_generate = counted
code = cli.main(sys.argv[1:])
open(os.environ["SEEN"] + os.environ["RANK"], "w").write(str(seen))
sys.exit(code)
"""


def _two(script: Path, command: list[str], out: Path, killed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, str(script), *command, "--json", f"--out={out}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "KILLED": killed, "SEEN": f"{script}.seen"},
    )


def _read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted((folder / "answers").iterdir())
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_two_processes_answer_as_one_does_and_go_on_after_a_kill(tmp_path: Path, data: Path) -> None:
    command = ["evaluate", "pocket", "--data-dir", str(data), "--limit=11", "--max-new-tokens=8", "--batch-size=3"]
    command += ["--tasks=boolq,arc_easy", "--perplexity=pocket", "--tokens=1536"]
    assert main([*command, "--device=cpu", f"--out={tmp_path / 'one'}"]) == 0
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    killed = _two(script, command, tmp_path / "two", killed="1")
    assert killed.returncode != 0
    partial = tmp_path / "two" / "answers" / ".boolq.1.partial"
    assert len(partial.read_text().splitlines()) == 2  # its key and the first batch of the second process
    assert not (tmp_path / "two" / "manifest.json").exists()

    done = _two(script, command, tmp_path / "two", killed="none")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"] == {"boolq": 11, "arc_easy": 11}  # printed once
    seen = [int(Path(f"{script}.seen{rank}").read_text()) for rank in (0, 1)]
    assert seen[1] == 2 + 5  # the rest of five of boolq, five of arc_easy
    assert 6 <= seen[0] <= 12
    one, two = _read(tmp_path / "one"), _read(tmp_path / "two")
    assert list(two) == ["arc_easy.jsonl", "boolq.jsonl"]
    assert one == two
    perplexities = [json.loads((tmp_path / name / "perplexity.json").read_text()) for name in ("one", "two")]
    assert abs(perplexities[0].pop("perplexity") - perplexities[1].pop("perplexity")) < 1e-5
    assert max(abs(a - b) for a, b in zip(*(p.pop("interval") for p in perplexities), strict=True)) < 1e-5
    assert perplexities[0] == perplexities[1]
    assert not list((tmp_path / "two" / "answers").glob(".*"))

    again = _two(script, command, tmp_path / "two", killed="none")
    assert again.returncode == 0, again.stderr
    assert "is up to date, nothing to do" in again.stderr
