"""The whole workflow on the pocket model: right numbers, no work done twice, and a kill that costs nothing."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from superexperts import pocket
from superexperts.cli import main
from superexperts.core.errors import DataError, OptionError, OutputError
from superexperts.core.jsonl import read_rows
from superexperts.core.types import Extraction
from superexperts.studies import study, workflow
from superexperts.studies.cell_list import Cell, cells
from superexperts.studies.progress import LOG
from superexperts.studies.status import StatusConfig
from superexperts.studies.status import run as status
from superexperts.studies.study import StudyConfig
from superexperts.studies.study_file import parse
from superexperts.studies.workers import Outcome, locked, schedule
from superexperts.surgery import compare
from superexperts.surgery.compare import CompareConfig
from tests.support.local_engines import BUILT, installed

TASKS = ["gsm8k", "boolq"]
VARIANTS = ["base", "prune-super", "prune-random", "prune-mine", "lora-super", "lora-random", "lora-attention"]


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
variants: [base, prune-super, prune-random: {{seeds: 2}}, prune-mine, lora-super, lora-random, lora-attention: {{r: 4}}]
experts: {{mine: L2E3}}
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
    assert [row["name"] for row in results["variants"]] == VARIANTS
    assert [len(row["runs"]) for row in results["variants"]] == [1, 1, 2, 1, 1, 1, 1]
    rights: dict[str, dict[str, list[bool]]] = {}
    for row in (run for variant in results["variants"] for run in variant["runs"]):
        for score in row["scores"]:
            file = finished / "variants" / row["name"] / "extractions" / f"{score['task']}.jsonl"
            found = [Extraction.from_json(value) for _, value in read_rows(file, "x")]
            rights.setdefault(row["name"], {})[score["task"]] = [extraction.correct for extraction in found]
            assert score["items"] == len(found) == 12
            assert score["correct"] == sum(extraction.correct for extraction in found)
            assert score["unparsed"] == sum(extraction.extracted is None for extraction in found)
            assert score["accuracy"] == pytest.approx(score["correct"] / 12)
            assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    for row in results["variants"]:
        every = [score["accuracy"] for run in row["runs"] for score in run["scores"]]
        assert row["mean"] == pytest.approx(sum(every) / len(every))
    single = [row for row in results["comparisons"] if row["runs"] == [1, 1]]
    assert single
    for row in single:
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
    assert rows["prune-mine"]["experts"] == ["L2E3"]
    draws = [set(run["experts"]) for run in rows["prune-random"]["runs"]]
    assert draws[0] != draws[1]
    recipe = (finished / "variants" / "lora-attention" / "train" / "recipe.yaml").read_text()
    assert "\nr: 4\n" in recipe
    assert rows["prune-super"]["perplexity"] >= 1.5 * rows["base"]["perplexity"]
    assert rows["prune-random"]["perplexity"] <= 1.1 * rows["base"]["perplexity"]


def test_csv_has_the_originals_columns(finished: Path) -> None:
    with (finished / "result.csv").open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["Model Variant", "MMLU", "ARC-E", "GSM8K", "BoolQ", "MedicalQA", "VMLU"]
    results = json.loads((finished / "results.json").read_text())
    assert len(table) == 1 + len(VARIANTS)
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


def test_changed_benchmark_files_make_a_finished_study_old(plan: Path, finished: Path) -> None:
    file = plan.parent / "data" / "gsm8k_main_test.jsonl"
    text = file.read_text(encoding="utf-8")
    loaded = parse(plan.read_text(encoding="utf-8"))
    before = workflow._data_identity(loaded)
    file.write_text(text.replace("#### ", "#### 9", 1), encoding="utf-8")
    try:
        after = workflow._data_identity(loaded)
    finally:
        file.write_text(text, encoding="utf-8")
    assert after["gsm8k"] != before["gsm8k"]
    assert after["boolq"] == before["boolq"]


def test_a_lost_cell_is_made_again_and_the_others_are_kept(finished: Path, plan: Path) -> None:
    expected = (finished / "results.json").read_bytes()
    before = stamps(finished / "variants" / "base" / "answers")
    (finished / "variants" / "prune-super" / "answers" / "boolq.jsonl").unlink()
    (finished / "results.json").unlink()
    study.run(StudyConfig(study=plan, out=finished))
    assert (finished / "results.json").read_bytes() == expected
    assert stamps(finished / "variants" / "base" / "answers") == before


# ---- kills ----------------------------------------------------------------------------------------------------------


def start(plan: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "superexperts", "study", str(plan), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )


def started(out: Path, cell: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits until a cell has begun; its line of the log."""
    while process.poll() is None:
        for line in (out / LOG).read_text().splitlines() if (out / LOG).is_file() else ():
            event: dict[str, Any] = json.loads(line)
            if event["cell"] == cell and event["event"] == "start":
                return event
        time.sleep(0.02)
    raise AssertionError(process.stderr.read() if process.stderr else "")


def test_a_study_killed_twice_ends_in_the_same_results(finished: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for cell in ("evaluate prune-super", "train lora-super"):
        with start(plan, out) as process:
            started(out, cell, process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        states = {row["cell"]: row["state"] for row in status(StatusConfig(folder=out))["cells"]}
        assert states["evaluate base"] == "done"
        assert states[cell] == "interrupted"
        assert states["evaluate lora-attention"] == "waiting"
    assert not (out / "results.json").exists()
    study.run(StudyConfig(study=plan, out=out))
    assert (out / "results.json").read_bytes() == (finished / "results.json").read_bytes()


@pytest.mark.parametrize("options", [["--workers", "2"], ["--ray", "--workers", "2"]], ids=["processes", "ray"])
def test_a_worker_that_is_killed_takes_nothing_with_it(
    finished: Path, plan: Path, tmp_path: Path, options: Sequence[str]
) -> None:
    if "--ray" in options:
        pytest.importorskip("ray")
    out = tmp_path / "out"
    with start(plan, out, *options) as process:
        killed = started(out, "evaluate prune-super", process)
        os.kill(killed["pid"], signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0, said
    events = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    pids = {event["pid"] for event in events if event["event"] == "start"}
    assert len(pids) >= 3  # two workers, and one in the place of the dead
    assert sum(event["cell"] == "evaluate prune-super" and event["event"] == "start" for event in events) == 2
    assert (out / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_workers_end_with_the_study_that_is_killed(finished: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(plan, out, "--workers", "2") as process:
        worker = started(out, "evaluate base", process)["pid"]
        assert worker != process.pid
        os.kill(worker, signal.SIGSTOP)  # so that it is in its cell when the study dies
        process.kill()
        process.wait()
        os.kill(worker, signal.SIGCONT)
        process.communicate()  # the workers hold its pipe until they end
    events = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert not any(event["cell"] == "evaluate base" for event in events if event["event"] == "end")


def test_an_interrupted_study_ends_its_workers_in_peace(finished: Path, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(plan, out, "--workers", "2") as process:
        worker = started(out, "evaluate base", process)["pid"]
        for each in (worker, process.pid):  # as a terminal does it, to every process
            os.kill(each, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.rstrip().endswith("interrupted; what was finished is kept")
    assert "Traceback" not in said
    events = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert not any(event["cell"] == "evaluate base" and event["event"] == "end" for event in events)


def test_two_studies_do_not_work_in_one_folder(finished: Path, plan: Path) -> None:
    with locked(finished), pytest.raises(OutputError, match="another study is running"):
        study.run(StudyConfig(study=plan, out=finished))


# ---- cells ----------------------------------------------------------------------------------------------------------


class Told:
    """Two workers that record which cells run at the same time, and fail where the test says so."""

    size = 2

    def __init__(self, failing: str) -> None:
        self.failing, self.running, self.order = failing, list[Cell](), list[str]()

    def start(self, cell: Cell) -> None:
        self.running.append(cell)
        assert len(self.running) <= self.size
        self.order.append(cell.name)

    def next(self) -> Outcome:
        cell = self.running.pop()  # the latest first: the order of ends is not that of starts
        return Outcome(cell=cell.name, seconds=0, error="bad" if cell.name == self.failing else None)


def test_cells_run_when_what_they_need_is_done_and_not_after_a_failure(plan: Path) -> None:
    todo = cells(parse(plan.read_text(encoding="utf-8")))
    crew = Told("train lora-super")
    outcomes = {outcome.cell: outcome.error for outcome in schedule(todo, crew)}
    assert set(outcomes) == {cell.name for cell in todo}
    bad = {name for name, error in outcomes.items() if error}
    assert bad == {"train lora-super", "evaluate lora-super", "extract lora-super"}
    assert outcomes["extract lora-super"] == "not run: what it needs failed"
    place = {name: i for i, name in enumerate(crew.order)}
    for cell in todo:
        assert all(place[need] < place[cell.name] for need in cell.needs if cell.name in place)


def test_a_failed_cell_is_told_and_the_others_are_kept(plan: Path, tmp_path: Path) -> None:
    text = plan.read_text(encoding="utf-8").replace("learning_rate: 1.0e-3", "learning_rate: 1.0e-30")
    text = text.split("variants:")[0] + "variants: [base, lora-super, prune-super]\n"
    (tmp_path / "s.yaml").write_text(text)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="3 of 9 cells failed or were not run. train lora-super: experts: the adapter"):
        study.run(StudyConfig(study=tmp_path / "s.yaml", out=out))
    assert (out / "variants" / "prune-super" / "scores.json").is_file()
    assert not (out / "results.json").exists()
    row = next(row for row in status(StatusConfig(folder=out))["cells"] if row["cell"] == "train lora-super")
    assert (row["state"], "changes no logit" in row["error"]) == ("failed", True)


def test_a_study_on_an_engine_gives_it_every_variant_as_a_checkpoint(
    finished: Path, plan: Path, tmp_path: Path
) -> None:
    """A stand-in for vLLM, which knows of no silent experts or adapters and loads the folder that it is given. A study
    that starts it on another folder, or writes a wrong one, has other answers than in one model."""
    # What needs no engine is there already.
    names = ["base", "prune-super", "lora-super"]
    for folder in ("profile", "experts", "variants/lora-super/train"):
        shutil.copytree(finished / folder, tmp_path / "out" / folder)
    text = re.sub("variants: .*", f"variants: [{', '.join(names)}]", plan.read_text(encoding="utf-8"))
    (tmp_path / "served.yaml").write_text(text + "evaluation: {engine: vllm}\n")
    BUILT.clear()
    with installed("vllm"):
        study.run(StudyConfig(study=tmp_path / "served.yaml", out=tmp_path / "out"))

    models = {name: tmp_path / "out" / "variants" / name / "model" for name in names[1:]}
    assert [built["model"] for built in BUILT] == list(map(str, [pocket.checkpoint_dir(), *models.values()]))
    for name in names:
        for task in TASKS:
            files = [
                folder / "variants" / name / "answers" / f"{task}.jsonl" for folder in (finished, tmp_path / "out")
            ]
            ours, theirs = ([row["response"] for _, row in read_rows(file, "answers")] for file in files)
            assert ours == theirs, (name, task)
    for folder in models.values():
        settings = CompareConfig(a="pocket", b=str(folder), expect_only=str(finished / "experts" / "super.json"))
        assert compare.run(settings)["exit_code"] == 0
        assert compare.run(CompareConfig(a="pocket", b=str(folder), expect_identical=True))["exit_code"] == 1


def test_a_dry_run_counts_and_writes_nothing(finished: Path, plan: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["study", str(plan), "--dry-run", "--out", str(tmp_path / "new"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["plan"]
    assert not (tmp_path / "new").exists()
    todo = cells(parse(plan.read_text(encoding="utf-8")))
    assert [row["cell"] for row in planned["cells"]] == [cell.name for cell in todo]
    assert {row["state"] for row in planned["cells"]} == {"waiting"}
    weights = sum(file.stat().st_size for file in pocket.checkpoint_dir().glob("*.safetensors"))
    assert planned["gib"] > 2 * weights / 2**30 * 0.9  # bfloat16 on disk, float32 on a CPU
    assert main(["study", str(plan), "--dry-run", "--out", str(finished)]) == 0
    assert "measured" in capsys.readouterr().out


def test_status_of_a_finished_study(finished: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["status", str(finished)]) == 0
    said = capsys.readouterr().out
    total = len(cells(parse((finished / "study.yaml").read_text(encoding="utf-8"))))
    assert f"{total} of {total} cells are done; no study is running" in said
    found = status(StatusConfig(folder=finished))
    assert {row["answers"] for row in found["cells"] if row["cell"].startswith("evaluate")} == {24}
    results = json.loads((finished / "results.json").read_text())
    scores = {run["name"]: run["scores"] for row in results["variants"] for run in row["runs"]}
    assert found["scores"] == scores
    with pytest.raises(DataError, match="has no study.yaml"):
        status(StatusConfig(folder=tmp_path))


def test_ray_is_asked_for_by_its_own_word(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="study: .* is not a file"):
        study.run(StudyConfig(study=tmp_path / "none.yaml", ray=""))
    assert main(["study", "--ray", str(tmp_path / "none.yaml")]) == 2
