"""What a reader needs to do a study again: versions, hashes, and the commands as one would type them."""

from __future__ import annotations

import ast
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from superexperts.core.config import EvaluateConfig, ProfileConfig
from superexperts.core.config_surgery import PruneConfig
from superexperts.core.runs import read_json
from superexperts.core.types import key_name
from superexperts.results.results import Results, task_title
from superexperts.training.train import TrainConfig

__all__ = ["Stage", "facts", "read_manifests", "stages", "study_file", "versions"]

Manifests = Sequence[tuple[Path, Mapping[str, Any]]]
"""Each stage's folder and its manifest, in the order in which they were finished."""

CONFIGS: dict[str, type[Any]] = {
    "profile": ProfileConfig,
    "prune": PruneConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a study."""

    command: str
    folder: str
    """Below the study's."""
    seconds: str
    typed: str
    """As one would type it in the study's folder; empty for a stage that has no command of its own."""
    json: str
    """Hashes of what it read and wrote."""


def read_manifests(folder: Path) -> Manifests:
    """Every stage's manifest below a study's folder; the pictures' own is left out."""
    found = [(path.parent, read_json(path, "manifest")) for path in sorted(folder.rglob("manifest.json"))]
    found = [(where, manifest) for where, manifest in found if manifest.get("command") != "report"]
    order = ["pocket-data", "profile", "prune", "train", "export", "evaluate", "extract", "study"]
    rank = {name: number for number, name in enumerate(order)}  # of stages that were finished in the same second
    return sorted(found, key=lambda pair: (str(pair[1]["finished"]), rank.get(str(pair[1]["command"]), len(order))))


def facts(results: Results, manifests: Manifests) -> list[tuple[str, str]]:
    """What was run, as (name, value)."""
    found = [
        ("Model", results.model),
        ("Revision", results.revision or "none given"),
        ("Benchmarks", ", ".join(task_title(task) for task in results.columns)),
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
    """Versions that the stages ran with; all of them where a study went on after an upgrade."""
    found: dict[str, set[str]] = {}
    for _, manifest in manifests:
        for name, version in manifest["versions"].items():
            found.setdefault(name, set()).add(str(version))
    return [
        (name, " / ".join(sorted(found[name])))
        for name in sorted(found, key=lambda name: (name != "superexperts", name))
    ]


def study_file(folder: Path) -> str | None:
    """The study file as it was given."""
    path = folder / "study.yaml"
    return path.read_text(encoding="utf-8", errors="backslashreplace") if path.is_file() else None


def stages(folder: Path, results: Results, manifests: Manifests) -> list[Stage]:
    """Every stage with its command and hashes, in the order in which they were finished."""
    return [
        Stage(
            command=str(manifest["command"]),
            folder=str(where.relative_to(folder)),
            seconds=f"{manifest['seconds']} s",
            typed=_typed(folder, results, where, manifest),
            json=json.dumps(
                {name: manifest[name] for name in ("key", "inputs", "outputs")}, indent=1, ensure_ascii=False
            ),
        )
        for where, manifest in manifests
    ]


def _typed(folder: Path, results: Results, where: Path, manifest: Mapping[str, Any]) -> str:
    command, inputs = str(manifest["command"]), manifest["inputs"]
    place = str(where.relative_to(folder))
    if command == "study":
        return "superexperts study study.yaml --out ."
    if command == "extract":
        judge = inputs.get("judge")  # a judge's settings are in the study file
        return shlex.join(["superexperts", command, str(where.parent.relative_to(folder))]) if not judge else ""
    if command not in CONFIGS or not isinstance(inputs.get("options"), dict):
        return ""
    built = where / "model"
    model = str(built.relative_to(folder)) if command == "evaluate" and built.is_dir() else results.model
    words = ["superexperts", command, model, *_paths(folder, command, where, inputs)]
    for name, text in inputs["options"].items():
        words += _option(CONFIGS[command], name, str(text))
    return shlex.join([*words, "--out", place])


def _paths(folder: Path, command: str, where: Path, inputs: Mapping[str, Any]) -> list[str]:
    """The options that lead to files, which a manifest knows by their contents."""
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


def _option(config: type[Any], name: str, text: str) -> list[str]:
    """An option that is not as the command has it by itself; values are texts, as manifests keep them."""
    field = next((field for field in dataclasses.fields(config) if field.name == name), None)
    if field is None or text in ("None", "", str(field.default)):
        return []
    flag = f"--{name.replace('_', '-')}"
    if text in ("True", "False"):
        return [flag] if text == "True" else [f"--no-{flag[2:]}"]
    if text.startswith(("(", "[")):
        return [word for value in ast.literal_eval(text) for word in (flag, str(value))]
    return [flag, text]
