"""Model cards for the Hub: an adapter's, with the results of its study, and a study's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import ModelCard

from superexperts.core.errors import DataError
from superexperts.core.types import ExpertSet, key_name
from superexperts.hub.files import Bundle
from superexperts.results.tables import markdown_table
from superexperts.training.card import front_matter

__all__ = ["adapter_card", "study_card"]

CARD = "README.md"
MANIFEST = "manifest.json"


def adapter_card(bundle: Bundle, adapter: str, facts: Mapping[str, Any]) -> str:
    """The README.md of the folder `adapter` of the repository, with the `facts` that are not None in its YAML, the
    table of the study in which it was trained, if any, and versions."""
    path = str(PurePosixPath(adapter) / CARD)
    try:
        card = ModelCard(bundle.text(path))
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"the YAML of {path} cannot be read ({type(error).__name__}); fix it", field="folder"
        ) from error
    for name, value in facts.items():
        if value is not None:
            setattr(card.data, name, value)
    beside = str(PurePosixPath(adapter).parent / MANIFEST)
    manifest = json.loads(bundle.text(beside if bundle.study else MANIFEST))
    parts = [str(card).rstrip("\n"), *_table(bundle), *_versions([manifest])]
    return "\n".join(parts) + "\n"


def study_card(bundle: Bundle, facts: Mapping[str, Any]) -> str:
    """README.md of a study's repository: its table, expert sets, adapters, seeds and versions."""
    assert bundle.results is not None
    table = _table(bundle)
    cards = {adapter: ModelCard(bundle.text(f"{adapter}/{CARD}")) for adapter in bundle.adapters}
    bases = {card.data.get("base_model") for card in cards.values()}
    front = {
        **(
            {"library_name": "peft"} if cards else {"viewer": False}
        ),  # the CSV is a report; the Hub's viewer would show it as a data set
        **({"base_model": next(iter(bases))} if len(bases) == 1 and None not in bases else {}),
        "tags": [*(["lora"] if cards else []), "superexperts", "mixture-of-experts"],
        # The data that adapters were trained on; a repository of results alone has no model trained on them.
        **{name: value for name, value in facts.items() if value is not None and (cards or name == "license")},
    }
    manifests = {file.path: json.loads(bundle.text(file.path)) for file in bundle.files if _is_manifest(file.path)}
    name, model = (_text(bundle.results.get(field)) for field in ("name", "model"))
    lines = [
        *front_matter(front),
        f"# {name}: a study of {model}",
        "",
        "`report.html` has the verdict, intervals, pictures and answers: download it, it opens from disk.",
        *table,
        *_expert_sets(bundle),
    ]
    if cards:
        lines += ["", "## Adapters", "", "| folder | what | seed |", "| --- | --- | --- |"]
        for adapter, card in cards.items():
            title = next((line[2:] for line in card.text.splitlines() if line.startswith("# ")), "")
            inputs = manifests[str(PurePosixPath(adapter).parent / MANIFEST)].get("inputs", {})
            seed = inputs.get("options", {}).get("seed", "")
            lines.append(f"| `{adapter}` | {_text(title)} | {_text(seed)} |")
        lines += [
            "",
            "Load one with `superexperts.adapters.lora.load_adapter(model, folder)`, or `superexperts export` it.",
        ]
    return "\n".join([*lines, *_versions(list(manifests.values()))]) + "\n"


def _is_manifest(path: str) -> bool:
    return PurePosixPath(path).name == MANIFEST


def _table(bundle: Bundle) -> list[str]:
    if bundle.results is None:
        return []
    table = markdown_table(bundle.results).rstrip("\n")  # which refuses anything but a results.json
    name, model = (_text(bundle.results.get(field)) for field in ("name", "model"))
    caption = f"Study {name} on {model}: accuracy in %; a star marks a difference from the base model (5%, Holm)."
    return ["", "## Results", "", table, "", caption]


def _expert_sets(bundle: Bundle) -> list[str]:
    found = {
        PurePosixPath(file.path).stem: ExpertSet.from_json(json.loads(bundle.text(file.path)))
        for file in bundle.files
        if file.path.startswith("experts/")
    }
    rows = [
        f"| {_text(name)} | {_text(chosen.rule.get('name'))} | {_text(chosen.rule.get('seed', ''))} "
        f"| {', '.join(map(key_name, chosen.experts))} |"
        for name, chosen in found.items()
    ]
    return ["", "## Experts", "", "| set | rule | seed | experts |", "| --- | --- | --- | --- |", *rows] if rows else []


def _versions(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the versions in the manifests; a package has several if the stages ran with different ones."""
    found: dict[str, set[str]] = {}
    for manifest in manifests:
        for name, version in manifest.get("versions", {}).items():
            found.setdefault(name, set()).add(str(version))
    rows = [f"| {_text(name)} | {_text(', '.join(sorted(versions)))} |" for name, versions in found.items()]
    return ["", "## Versions", "", "| package | version |", "| --- | --- |", *rows] if rows else []


def _text(value: object) -> str:
    """A value from a file as text for one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
