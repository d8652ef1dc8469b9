"""What a reader needs to reproduce a study: versions, hashes, and the commands as one would type them."""

from __future__ import annotations

import ast
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from superexperts.benchmarks import title_of
from superexperts.core.runs import read_json
from superexperts.core.stages import STAGE_VERSIONS
from superexperts.core.types import key_name
from superexperts.results.results import Results

__all__ = ["Stage", "facts", "read_manifests", "stages", "study_file", "versions"]

Manifests = Sequence[tuple[Path, Mapping[str, Any]]]
"""(folder, manifest) of each stage, in the order in which the stages finished."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a study."""

    command: str
    folder: str
    """Relative to the study's folder."""
    seconds: str
    command_line: str
    """As one would type it in the study's folder; empty for a stage that is not a command."""
    json: str
    """Hashes of its inputs and outputs."""


def read_manifests(folder: Path) -> Manifests:
    """The manifests of all stages in a study's folder, without that of the report's figures."""
    found = [(path.parent, read_json(path, "manifest")) for path in sorted(folder.rglob("manifest.json"))]
    found = [(where, manifest) for where, manifest in found if manifest.get("command") != "report"]
    rank = {name: number for number, name in enumerate(STAGE_VERSIONS)}  # for stages that finished in the same second
    return sorted(found, key=lambda pair: (str(pair[1]["finished"]), rank.get(str(pair[1]["command"]), len(rank))))


def facts(results: Results, manifests: Manifests) -> list[tuple[str, str]]:
    """What was run, as (name, value)."""
    found = [
        ("Model", results.model),
        ("Revision", results.revision or "none given"),
        ("Benchmarks", ", ".join(title_of(task) for task in results.columns)),
        ("Items per benchmark", "all" if results.limit is None else f"at most {results.limit}"),
        ("Protocol", results.protocol),
        ("Corpora", ", ".join(results.corpora)),
        ("Seeds", ", ".join(map(str, sorted({run.seed for _, run in results.runs})))),
    ]
    if manifests:
        commits = sorted({str(manifest.get("git_commit") or "not a git checkout") for _, manifest in manifests})
        found.append(("Finished", max(str(manifest["finished"]) for _, manifest in manifests)))
        found.append(("Commit", ", ".join(commits)))
    return found


def versions(manifests: Manifests) -> list[tuple[str, str]]:
    """Versions that the stages ran with: several for one package if it was upgraded during the study."""
    found: dict[str, set[str]] = {}
    for _, manifest in manifests:
        for name, version in manifest["versions"].items():
            found.setdefault(name, set()).add(str(version))
    return [
        (name, " / ".join(sorted(found[name])))
        for name in sorted(found, key=lambda name: (name != "superexperts", name))
    ]


def study_file(folder: Path) -> str | None:
    """The text of the study file; None if there is none."""
    path = folder / "study.yaml"
    return path.read_text(encoding="utf-8", errors="backslashreplace") if path.is_file() else None


def stages(folder: Path, results: Results, manifests: Manifests, settings: Mapping[str, type]) -> list[Stage]:
    """Every stage with its command line and hashes, in the order in which they finished.

    `settings` are the settings classes of the commands; only they know the defaults, which are left out.
    """
    return [
        Stage(
            command=str(manifest["command"]),
            folder=str(where.relative_to(folder)),
            seconds=f"{manifest['seconds']} s",
            command_line=_command_line(folder, results, where, manifest, settings),
            json=json.dumps(
                {name: manifest[name] for name in ("key", "inputs", "outputs")}, indent=1, ensure_ascii=False
            ),
        )
        for where, manifest in manifests
    ]


def _command_line(
    folder: Path, results: Results, where: Path, manifest: Mapping[str, Any], settings: Mapping[str, type]
) -> str:
    command, inputs = str(manifest["command"]), manifest["inputs"]
    place = str(where.relative_to(folder))
    if command == "study":
        return "superexperts study study.yaml --out ."
    if command == "extract":
        judge = inputs.get("judge")  # the settings of a judge are in the study file only
        return shlex.join(["superexperts", command, str(where.parent.relative_to(folder))]) if not judge else ""
    if command not in settings or not isinstance(inputs.get("options"), dict):
        return ""
    built = where / "model"
    model = str(built.relative_to(folder)) if command == "evaluate" and built.is_dir() else results.model
    words = ["superexperts", command, model, *_paths(folder, command, where, inputs)]
    for name, text in inputs["options"].items():
        words += _option(settings[command], name, str(text))
    return shlex.join([*words, "--out", place])


def _paths(folder: Path, command: str, where: Path, inputs: Mapping[str, Any]) -> list[str]:
    """The options that name files; a manifest holds only hashes of the files."""
    words: list[str] = []
    if command == "train":
        words += ["--data", _train_data(folder)]
    if inputs.get("experts"):
        words += ["--experts", ",".join(key_name((layer, expert)) for layer, expert in inputs["experts"])]
    if inputs.get("silence"):
        words += ["--silence", ",".join(key_name((layer, expert)) for layer, expert in inputs["silence"])]
    if inputs.get("adapter"):
        words += ["--adapter", str((where / "train" / "adapter").relative_to(folder))]
    if command == "evaluate" and (folder / "data").is_dir():
        words += ["--data-dir", "data"]
    return words


def _train_data(folder: Path) -> str:
    text = study_file(folder)
    settings = yaml.safe_load(text) if text is not None else None
    named = settings.get("train_data") if isinstance(settings, dict) else None
    return str(named) if named else "data/train.json"


def _option(config: Any, name: str, text: str) -> list[str]:
    """The words for one option; none if it has its default. Manifests hold the values as text."""
    field = next((field for field in dataclasses.fields(config) if field.name == name), None)
    if field is None or text in ("None", "", str(field.default)):
        return []
    flag = f"--{name.replace('_', '-')}"
    if text in ("True", "False"):
        return [flag] if text == "True" else [f"--no-{flag[2:]}"]
    if text.startswith(("(", "[")):
        return [word for value in ast.literal_eval(text) for word in (flag, str(value))]
    return [flag, text]
