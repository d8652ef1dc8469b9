"""The answers in an output folder: which of them are up to date, and which belong to other questions."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.core.console import is_main_process, note
from superexperts.core.errors import OutputError
from superexperts.core.runs import (
    MANIFEST,
    differing_inputs,
    fingerprint,
    input_key,
    made_from,
    other_result,
    prepare_folder,
    read_json,
    write_text,
)
from superexperts.core.types import Answer
from superexperts.engines.journal import Given, Journal, open_journals, remove_journals
from superexperts.engines.replies import Reply

__all__ = [
    "answers_key",
    "clear_away",
    "finished_answers",
    "open_folder",
    "require_own_answers",
    "require_replaceable",
    "write_answers",
]

NOT_OF_AN_ANSWER = ("tasks", "limit", "limit_first", "perplexity", "column", "tokens", "seq_len", "reference_windows")
"""Settings that decide which items are asked. They cannot change the answer to an item, so they are not in its key."""


EARLIER = ".earlier"
"""Folder in `out` that holds an earlier run's files until a new one is finished."""


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
        kept_names = {*finished, *(name for name, journal in journals.items() if journal.answers)}
        gone = sorted(file.stem for file in (out / "answers").glob("*.jsonl") if file.stem not in kept_names)
        if gone:
            note(f"evaluate: {', '.join(gone)}: an earlier run asked other questions; its answers are replaced")
        _put_aside(out)  # never mix the answers of two runs
    return journals


def _put_aside(out: Path) -> None:
    """Moves the files of an earlier, finished run into `EARLIER`, until `clear_away`; removes those of a run that
    was not finished, which the journals hold."""
    finished = (out / MANIFEST).is_file()
    if finished:
        shutil.rmtree(out / EARLIER, ignore_errors=True)
        (out / EARLIER).mkdir()
    # The manifest goes first: without it, a run that is killed here cannot look finished.
    for file in [out / MANIFEST, out / "perplexity.json", *sorted((out / "answers").glob("*.jsonl"))]:
        if finished and file.is_file():
            file.replace(out / EARLIER / file.name)
        file.unlink(missing_ok=True)


def clear_away(out: Path) -> None:
    """Removes the journals and the earlier run's files, once the answers and the manifest are written."""
    remove_journals(out / "answers")
    shutil.rmtree(out / EARLIER, ignore_errors=True)


def require_replaceable(out: Path, inputs: Mapping[str, Any], *, overwrite: bool) -> None:
    """`OutputError` if finished answers would be lost: of another model, to other questions, of a benchmark that is no
    longer asked, or of items beyond a smaller limit."""
    if overwrite or not (out / MANIFEST).is_file():
        return
    manifest = read_json(out / MANIFEST, "manifest")
    differing = differing_inputs(manifest, "evaluate", inputs)
    names = [name for name in differing if name not in (*NOT_OF_AN_ANSWER, "data", "harness")]
    old = manifest["inputs"] if differing else {}
    if any(inputs["data"].get(name) != sha for name, sha in old.get("data", {}).items()):
        names.append("tasks" if "tasks" in differing else "data")
    if "limit_first" in differing or ("limit" in differing and _items(inputs) < _items(old)):
        names.append("limit")
    if names:
        raise other_result(out, "evaluate", names)


def _items(inputs: Mapping[str, Any]) -> float:
    limit = str(inputs["options"]["limit"])
    return math.inf if limit == "None" else int(limit)


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
