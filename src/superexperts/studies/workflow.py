"""The whole workflow: profile, select, then train or silence, evaluate and extract each variant and seed; conclude.

Every command knows from the hashes of its inputs whether its result is up to date. So a killed study continues where
it stopped, and a finished one does no work.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from superexperts.benchmarks.loading import LoadedBenchmark, load_benchmarks
from superexperts.checkpoints.source import resolve
from superexperts.core.console import note, stderr
from superexperts.core.errors import DataError
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
from superexperts.studies.cell_list import Cell, cells
from superexperts.studies.check import given_experts, row_files
from superexperts.studies.plan import Plan
from superexperts.studies.workers import locked, open_workers, schedule

__all__ = ["STUDY", "run_study"]

STUDY = "study.yaml"
"""The study file, as it was run, in the study's folder."""


def run_study(
    plan: Plan, text: str, out: Path, *, device: str, workers: int | None = None, ray: str | None = None
) -> Any:
    """Run the cells that are not done, conclude, and write the report; returns the content of results.json.

    `text` is the study file, of which the folder gets a copy.
    """
    started = time.monotonic()
    inputs = _inputs(plan)  # downloads the model, before the folder is made
    prepare_folder(out)
    with locked(out):
        if not (out / STUDY).is_file() or (out / STUDY).read_text(encoding="utf-8") != text:
            write_text(out / STUDY, text)
        if completed(out, "study", inputs):
            note(f"study: {out} is up to date, nothing to do")
        else:
            _run_cells(plan, out, device, workers, ray)
            results = conclude(out, plan.runs, **_facts(plan))
            write_json(out / "results.json", results)
            write_csv(results, out / "result.csv")
            scores = [f"variants/{found.name}/scores.json" for found in plan.runs]
            outputs = [STUDY, "results.json", "result.csv", "profile/profile.json", *scores]
            (out / "report.html").unlink(missing_ok=True)
            write_manifest(out, "study", inputs, outputs, time.monotonic() - started)
        if not (out / "report.html").is_file():
            write_report(out)  # after the manifest, which it shows
    return read_json(out / "results.json", "study")


def _run_cells(plan: Plan, out: Path, device: str, workers: int | None, ray: str | None) -> None:
    """Run every cell; `DataError` names all that failed, and nothing is concluded from the rest."""
    todo = cells(plan)

    def announce(cell: Cell, number: int) -> None:
        stderr.rule(f"{cell.name} ({number + 1} of {len(todo)})")

    # A Ray worker has its own working directory.
    where = out.resolve() if ray is not None else out
    with open_workers(plan, where, device=device, count=workers, ray=ray) as pool:
        outcomes = schedule(todo, pool, announce)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        reasons = "; ".join(f"{outcome.cell}: {outcome.error}" for outcome in failed if not outcome.skipped)
        raise DataError(f"{len(failed)} of {len(todo)} cells failed or were not run. {reasons}", field="study")


def _inputs(plan: Plan) -> dict[str, Any]:
    """What the results of a study depend on; a finished study is up to date while all of it is the same."""
    return {
        "plan": {name: str(value) for name, value in plan.model_dump().items()},
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


def _benchmarks(plan: Plan, data_dir: Path | None) -> dict[str, LoadedBenchmark]:
    asked = {name: plan.evaluation[name] for name in ("protocol", "num_fewshot") if name in plan.evaluation}
    return load_benchmarks(plan.tasks, data_dir, **asked)


def _data_identity(plan: Plan) -> dict[str, str]:
    """Digests of local benchmarks and corpora; what comes from the Hub is identified by its revision instead."""
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir else None)
    # The pocket data ship with the package; the version of the stage `pocket-data` stands for them.
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
