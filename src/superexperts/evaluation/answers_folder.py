"""The answers in an output folder: which of them are up to date, and which belong to other questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.core.console import is_main_process, note
from superexperts.core.errors import OutputError
from superexperts.core.runs import MANIFEST, fingerprint, input_key, made_from, prepare_folder, read_json, write_text
from superexperts.core.types import Answer
from superexperts.engines.journal import Given, Journal, open_journals
from superexperts.engines.replies import Reply

__all__ = ["answers_key", "finished_answers", "open_folder", "require_own_answers", "write_answers"]

NOT_OF_AN_ANSWER = ("tasks", "limit", "shuffle", "perplexity", "column", "tokens", "seq_len", "reference_windows")
"""Settings that decide which items are asked. They cannot change the answer to an item, so they are not in its key."""


def require_own_answers(out: Path) -> None:
    """`OutputError` if the folder holds answers without a manifest or a journal, which no evaluation wrote."""
    folder = out / "answers"
    ours = (out / MANIFEST).is_file() or any(folder.glob(".*.partial"))
    if not ours and (strange := next(folder.glob("*.jsonl"), None)) is not None:
        raise OutputError(
            f"{strange} was not written by `evaluate`, which would remove it; choose another folder", field="out"
        )


def open_folder(out: Path, keys: Mapping[str, str]) -> dict[str, Journal]:
    """The journals of this process, with all answers that are still valid. Removes the files of an earlier run."""
    finished = {}
    if is_main_process:
        prepare_folder(out)
        finished = finished_answers(out, keys)
    journals = open_journals(out / "answers", keys, finished)
    if is_main_process:
        if kept := sum(len(journal.answers) for journal in journals.values()):
            note(f"evaluate: {kept} answers of an earlier run are kept")
        gone = sorted(file.stem for file in (out / "answers").glob("*.jsonl") if file.stem not in finished)
        if gone:
            note(f"evaluate: {', '.join(gone)}: an earlier run's answers are removed, because it asked other questions")
        # The manifest goes first: without it, a run that is killed here cannot look finished.
        for old in [out / MANIFEST, out / "perplexity.json", *(out / "answers").glob("*.jsonl")]:
            old.unlink(missing_ok=True)  # never mix the answers of two runs
    return journals


def answers_key(inputs: Mapping[str, Any], benchmark: str) -> str:
    """The key of one benchmark's answers: they are up to date if it is equal, whatever other benchmarks are asked.

    `inputs` are the inputs of the evaluation, as in its manifest.
    """
    options = {name: value for name, value in inputs["options"].items() if name not in NOT_OF_AN_ANSWER}
    more = {name: value for name, value in inputs.items() if name not in ("options", "data", "perplexity")}
    return input_key("evaluate", {"options": options, "data": inputs["data"][benchmark], **more})


def finished_answers(folder: Path, keys: Mapping[str, str]) -> dict[str, dict[str, Given]]:
    """benchmark -> id -> answer, from the files of a finished run, for the benchmarks that it asked with these keys.

    Files that have changed since are left out.
    """
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_json(folder / MANIFEST, "manifest")
    inputs = made_from(manifest, "evaluate")
    if inputs is None:
        return {}
    asked = {name: answers_key(inputs, name) for name in inputs.get("data", {})}
    outputs = manifest.get("outputs", {})
    found: dict[str, dict[str, Given]] = {}
    for name, key in keys.items():
        file = folder / "answers" / f"{name}.jsonl"
        if asked.get(name) != key or not file.is_file() or fingerprint(file) != outputs.get(f"answers/{name}.jsonl"):
            continue
        answers = [Answer.from_json(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line]
        # A prompt that a server refused is asked again.
        found[name] = {answer.id: _given(answer) for answer in answers if answer.finish_reason != "error"}
    return found


def _given(answer: Answer) -> Given:
    if answer.loglikelihoods is not None:
        return [nats for _, nats, _ in answer.loglikelihoods]
    fields = dataclasses.fields(Reply)
    return Reply(**{field.name: getattr(answer, field.name) for field in fields}).to_given()


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Writes a JSON line per answer, in the main process only."""
    lines = [json.dumps(answer.to_json(), ensure_ascii=False) + "\n" for answer in answers]
    if is_main_process:
        write_text(file, "".join(lines))
