"""The whole workflow: profile, select, then per variant and seed train or silence, evaluate, extract; then conclude.

A study is its commands' settings, worked off cell by cell. Every command knows by its inputs' hashes whether it is
done, so a killed study goes on where it was, and a finished one does no work.
"""

from __future__ import annotations

import dataclasses
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from superexperts.benchmarks import Benchmark, load_benchmarks
from superexperts.checkpoints.source import resolve
from superexperts.core.config_study import StudyConfig
from superexperts.core.console import note, stderr
from superexperts.core.errors import DataError, Field, OptionError, OutputError
from superexperts.core.runs import (
    completed,
    fingerprint,
    prepare_folder,
    read_json,
    write_json,
    write_manifest,
    write_text,
)
from superexperts.data.corpora import local_data, local_file, named_corpus
from superexperts.reports.report import write_report
from superexperts.results.conclude import conclude
from superexperts.results.tables import write_csv
from superexperts.studies import workers
from superexperts.studies.cells import cells
from superexperts.studies.check import check, given_experts, row_files
from superexperts.studies.estimate import estimate
from superexperts.studies.plan import Plan, parse

__all__ = ["STUDY", "read_study", "run"]

STUDY = "study.yaml"
"""The study file, as it was run, in the study's folder."""


def run(config: StudyConfig) -> dict[str, Any]:
    """The command: runs what is not done yet, then writes results.json, result.csv and report.html."""
    if config.init:
        assert config.study is not None
        return {"written": str(_write_template(config.study))}
    started = time.monotonic()
    text, plan = read_study(config.study)
    out = config.out or Path("runs") / plan.name
    check(plan, text, str(config.study or "STUDY"), device=config.device, here=config.ray is None)
    if config.dry_run:
        return {"plan": estimate(plan, out, config), "out": str(out)}
    inputs = _inputs(plan)  # fetches the model, before there is a folder
    prepare_folder(out)
    with workers.locked(out):
        if not (out / STUDY).is_file() or (out / STUDY).read_text(encoding="utf-8") != text:
            write_text(out / STUDY, text)
        if completed(out, "study", inputs):
            note(f"study: {out} is up to date, nothing to do")
        else:
            _work(plan, out, config)
            results = conclude(out, plan.runs, **_facts(plan))
            write_json(out / "results.json", results)
            write_csv(results, out / "result.csv")
            scores = [f"variants/{found.name}/scores.json" for found in plan.runs]
            outputs = [STUDY, "results.json", "result.csv", "profile/profile.json", *scores]
            (out / "report.html").unlink(missing_ok=True)
            write_manifest(out, "study", inputs, outputs, time.monotonic() - started)
        if not (out / "report.html").is_file():
            write_report(out)  # after the manifest, which it shows
    return {"out": str(out), "report": str(out / "report.html"), "results": read_json(out / "results.json", "study")}


def read_study(path: Path | None) -> tuple[str, Plan]:
    """The text of a study file, of the demo's by default, and what it says."""
    if path is None:
        text = (files("superexperts.pocket") / STUDY).read_text(encoding="utf-8")
        return text, parse(text)
    if not path.is_file():
        raise OptionError(
            f"{str(path)!r} is no file; give a YAML file, write one with ",
            Field("init"),
            ", or take ",
            Field("demo"),
            field="study",
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    return text, parse(text, str(path))


def _write_template(path: Path) -> Path:
    if path.exists():
        raise OutputError(f"{path} exists; choose another name", field="init")
    write_text(path, (files(__package__) / "templates" / STUDY).read_text(encoding="utf-8"))
    return path


def _work(plan: Plan, out: Path, config: StudyConfig) -> None:
    """Runs every cell; one error that names all that failed, and nothing is concluded from the rest."""
    todo = cells(plan)
    where = out.resolve() if config.ray is not None else out

    def said(cell: Any, number: int) -> None:
        stderr.rule(f"{cell.name} ({number + 1} of {len(todo)})")

    with workers.open_crew(plan, where, device=config.device, workers=config.workers, ray=config.ray) as crew:
        outcomes = workers.schedule(todo, crew, said)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        told = "; ".join(f"{outcome.cell}: {outcome.error}" for outcome in failed if not outcome.skipped)
        raise DataError(f"{len(failed)} of {len(todo)} cells failed or were not run. {told}", field="study")


def _inputs(plan: Plan) -> dict[str, Any]:
    """What a finished study depends on."""
    return {
        "plan": {name: str(value) for name, value in dataclasses.asdict(plan).items()},
        "model": resolve(plan.model, plan.revision).fingerprint,
        "rows": {option: fingerprint(file) for option, file in row_files(plan)},
        "experts": {name: experts.to_json() for name, experts in given_experts(plan).items()},
        "data": _data_identity(plan),
    }


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "model": plan.model,
        "revision": plan.revision,
        "limit": plan.limit,
        "protocol": plan.evaluation.get("protocol", "generative"),
        "corpora": plan.corpus,
        "tasks": plan.tasks,
    }


def _benchmarks(plan: Plan, data_dir: Path | None) -> dict[str, Benchmark]:
    asked = {name: plan.evaluation[name] for name in ("protocol", "num_fewshot") if name in plan.evaluation}
    return load_benchmarks(plan.tasks, data_dir, **asked)


def _data_identity(plan: Plan) -> dict[str, str]:
    """Digests of what is asked and of corpora that are files; what comes from the Hub has its revision instead."""
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir else None)
    # The pocket world is made by the package's own sources, which every stage's key holds.
    local = data_dir is not None and str(data_dir) != "pocket"
    benchmarks = _benchmarks(plan, data_dir) if local else {}
    digests = {name: benchmark.sha for name, benchmark in benchmarks.items()}
    for name in dict.fromkeys([*plan.corpus, plan.perplexity or plan.corpus[0]]):
        corpus = named_corpus(name)
        if corpus is not None and corpus.stem is not None:
            if data_dir is not None:
                digests[f"corpus {name}"] = fingerprint(local_file(data_dir, corpus.stem))
        elif Path(name).is_file():
            digests[f"corpus {name}"] = fingerprint(Path(name))
    return digests
