"""A study's folder -> report.html: one file that opens from disk, loads nothing and runs no script but its own.

What a model generated is text here and stays text: the template escapes everything, the answers travel as JSON whose
`<` are escaped, the page's script only writes `textContent`, and the page's policy forbids every other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import __version__
from .artifacts import Answer, ExpertSet, Extraction, Profile, key_name
from .config import ReportConfig
from .corpora import read_rows
from .disagreements import disagreements
from .drawing import DARK, LIGHT, PAGE, Theme
from .errors import DataError
from .plots import plot_differences, plot_heatmap, plot_layers, plot_training
from .results import (
    Comparison,
    Results,
    VariantResult,
    markdown_table,
    print_table,
    run_title,
    signed_points,
    task_title,
    write_csv,
)
from .rundir import read_json, write_text
from .select import super_experts
from .verdict import against_base, against_controls, format_p, headline

__all__ = ["markdown_table", "print_table", "run", "write_csv", "write_report"]

T = TypeVar("T")

TEMPLATES = Path(__file__).parent / "templates"
MANY_UNPARSED = 0.05  # from this share on it is coloured: an accuracy that mostly measures the format misleads
MAX_CORPORA = 3  # pictures of more would make the file large


def run(config: ReportConfig) -> dict[str, Any]:
    """The command: writes report.html into a study's folder again."""
    return {"out": str(config.folder), "report": str(write_report(config.folder))}


def write_report(folder: Path) -> Path:
    """Writes `report.html` from what the study left in `folder`; returns its path.

    results.json must be there (`DataError` otherwise); the profile, expert sets, answers, training logs and manifests
    are shown where they are there.
    """
    if not (folder / "results.json").is_file():
        raise DataError(f"DIR: {folder} has no results.json; give the folder of a finished study")
    results = Results.load(folder)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    extractions = _load_lines(folder, results, "extractions", Extraction.from_json)
    answers = _load_lines(folder, results, "answers", Answer.from_json)
    super_file = folder / "experts" / "super.json"
    chosen = ExpertSet.from_json(read_json(super_file, "experts")) if super_file.is_file() else None
    browser = disagreements(results, answers, extractions) if answers and extractions else None
    pictures = _pictures(folder, results, chosen)
    manifests = [(path.parent, read_json(path, "manifest")) for path in sorted(folder.rglob("manifest.json"))]
    any_perplexity = any(variant.perplexity is not None for variant in results.variants)
    sections = [
        ("results", "Results"),
        ("experts", "Experts") if pictures["corpora"] else None,
        ("training", "Training") if pictures["training"] else None,
        ("answers", "Answers") if browser else None,
        ("run", "What was run"),
    ]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        results=results,
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=[section for section in sections if section is not None],
        headline=headline(results),
        lede=_lede(results),
        against_base=against_base(results),
        controls=against_controls(results),
        perplexity=_perplexity_changes(results),
        columns=[
            {"title": task_title(task), "asked": score.items if (score := results.base.score(task)) else "?"}
            for task in results.columns
        ],
        rows=_rows(results),
        any_perplexity=any_perplexity,
        pictures=pictures,
        chosen=[key_name(key) for key in chosen.experts] if chosen is not None else [],
        rule=_rule(chosen),
        browser=browser,
        facts=_facts(results, manifests),
        versions=_versions(manifests),
        stages=_stages(folder, manifests),
        experts_of=experts_of,
        version=__version__,
        points=signed_points,
        format_p=format_p,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _load_lines(folder: Path, results: Results, kind: str, parse: Callable[[Any], T]) -> dict[str, dict[str, list[T]]]:
    """run -> benchmark -> lines of `variants/<name>/<kind>/<task>.jsonl`; empty if the study kept none at all."""
    files = {
        run.name: {task: folder / "variants" / run.name / kind / f"{task}.jsonl" for task in results.tasks}
        for _, run in results.runs
    }
    there = [file.is_file() for by_task in files.values() for file in by_task.values()]
    if not any(there):
        return {}
    if not all(there):
        lost = next(file for by_task in files.values() for file in by_task.values() if not file.is_file())
        raise DataError(f"DIR: {lost} is missing; run the study again")
    return {
        name: {task: [parse(row) for _, row in read_rows(file, kind)] for task, file in by_task.items()}
        for name, by_task in files.items()
    }


def _lede(results: Results) -> str:
    items = sum(score.items for score in results.base.scores)
    benchmarks = f"{len(results.tasks)} benchmark{'s' if len(results.tasks) != 1 else ''}"
    return (
        f"{results.model} on {items:,} items of {benchmarks}. Differences are over all items "
        f" against {results.base.title}, by paired tests; “detected” means p under 5% after Holm's adjustment."
    )


def _perplexity_changes(results: Results) -> dict[str, str]:
    before = results.base.perplexity
    changes = {}
    for variant in results.others:
        if before is not None and variant.perplexity is not None:
            factor = variant.perplexity / before
            times = f" (×{factor:.{1 if factor < 10 else 0}f})" if factor >= 1.1 or factor <= 0.9 else ""
            changes[variant.name] = f"{before:.2f} → {variant.perplexity:.2f}{times}"
        else:
            changes[variant.name] = ""
    return changes


def _rows(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "title": variant.title,
            "what": experts_of(variant),
            "cells": [_cell(variant, task, results.to_base(variant.name, task)) for task in results.columns],
            "mean": f"{100 * variant.mean:.1f}",
            "perplexity": None if variant.perplexity is None else f"{variant.perplexity:.2f}",
            "perplexity_interval": "–".join(f"{end:.2f}" for end in variant.runs[0].perplexity_interval or ())
            if len(variant.runs) == 1
            else "",
        }
        for variant in results.variants
    ]


def _cell(variant: VariantResult, task: str, row: Comparison | None) -> dict[str, Any] | None:
    score = variant.score(task)
    if score is None:
        return None
    share = score.unparsed_share
    return {
        "accuracy": f"{100 * score.accuracy:.1f}",
        "interval": f"{100 * score.low:.1f}–{100 * score.high:.1f}",
        "difference": signed_points(row.difference) if row is not None else "",
        "effect": "none" if row is None or not row.sure else "down" if row.difference < 0 else "up",
        "unparsed": f"{100 * share:.1f}% unparsed" if score.unparsed else "all parsed",
        "many_unparsed": share >= MANY_UNPARSED,
    }


def experts_of(variant: VariantResult) -> str:
    """The first run's experts, and how many other draws there are."""
    first, *more = [run.experts for run in variant.runs]
    draws = f" and {len(more)} other draws" if more and any(one != first for one in more) else ""
    return ", ".join(first or ()) + draws


def _rule(chosen: ExpertSet | None) -> dict[str, Any]:
    rule = {"percentile": 99.5, "ratio": 10.0, "depth": 0.75} | (dict(chosen.rule) if chosen is not None else {})
    return rule | {"ratio_words": "tenth" if rule["ratio"] == 10 else f"{rule['ratio']:g}th part"}


def _pictures(folder: Path, results: Results, chosen: ExpertSet | None) -> dict[str, Any]:
    differences = None
    if results.others:
        alt = "; ".join(
            f"{one.title}: {signed_points(one.row.difference)} points, {one.interval}" for one in against_base(results)
        )
        differences = _picture(
            lambda path, theme: plot_differences(results, path, theme=theme),
            title="Differences to base",
            alt=f"Forest plot over all items and by benchmark. Over all items, {alt}.",
            caption="Filled marks differ from base after Holm's adjustment; lines are 95% intervals.",
        )
    corpora = []
    if (folder / "profile" / "profile.json").is_file():
        profile = Profile.load(folder / "profile")
        for name in list(profile.corpora)[:MAX_CORPORA]:
            corpora.append(_profile_pictures(profile, name, chosen))
    curves = {
        run_title(variant, run): [(float(step), float(loss)) for step, loss in read_json(log, "training")["loss"]]
        for variant, run in results.runs
        if (log := folder / "variants" / run.name / "train" / "training.json").is_file()
    }
    training = None
    if any(curves.values()):
        ends = "; ".join(
            f"{title} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}" for title, curve in curves.items() if curve
        )
        training = _picture(
            lambda path, theme: plot_training(curves, path, theme=theme),
            title="Training loss",
            alt=f"Training loss by optimiser step: {ends}.",
            caption="Loss on the response tokens of the training rows, as logged.",
        )
    return {"differences": differences, "corpora": corpora, "training": training}


def _profile_pictures(profile: Profile, name: str, chosen: ExpertSet | None) -> dict[str, Any]:
    rule = _rule(chosen)
    section = profile.corpora[name]
    if chosen is not None:
        keys = list(chosen.experts)
    else:
        keys = [
            row.key
            for row in super_experts(
                section.experts, profile.num_layers, depth=rule["depth"], statistic=profile.statistic
            )
        ]
    top = sorted(section.experts, key=lambda row: -row.output_max)[:5]
    largest = ", ".join(f"{key_name(row.key)} {row.output_max:.3g}" for row in top)
    heatmap = _picture(
        lambda path, theme: plot_heatmap(profile, name, keys, path, depth=rule["depth"], width=PAGE, theme=theme),
        title=f"Peaks of every expert on {name}",
        alt=f"Heatmap of every expert's peak on {name}, a row per layer. Largest: {largest}.",
        caption="Each cell is one expert's largest |down_proj output| over all tokens of the corpus, on a log scale.",
    )
    layers = _picture(
        lambda path, theme: plot_layers(
            profile,
            name,
            keys,
            path,
            depth=rule["depth"],
            percentile=rule["percentile"],
            ratio=rule["ratio"],
            width=PAGE,
            theme=theme,
        ),
        title=f"Peaks by layer on {name}",
        alt=f"Peaks of the experts by layer on {name}, and the criterion's two bounds. Largest: {largest}.",
        caption="The same peaks by layer; a super expert lies over both dashed lines.",
    )
    return {"heatmap": heatmap, "layers": layers}


def _picture(draw: Callable[[Path, Theme], None], *, title: str, alt: str, caption: str) -> dict[str, str]:
    """Draws for light and for dark pages, as `data:` addresses of SVG."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, theme in (("light", LIGHT), ("dark", DARK)):
            path = Path(folder) / f"{name}.svg"
            draw(path, theme)
            found[name] = "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    return found | {"title": title, "alt": alt, "caption": caption}


def _facts(results: Results, manifests: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    facts = [
        ("Model", results.model),
        ("Benchmarks", ", ".join(task_title(task) for task in results.columns)),
        ("Items per benchmark", "all" if results.limit is None else f"at most {results.limit}"),
        ("Corpora", ", ".join(results.corpora)),
        ("Seeds", ", ".join(str(seed) for seed in sorted({run.seed for _, run in results.runs}))),
    ]
    if manifests:
        commits = sorted({str(manifest.get("git_commit") or "not a git checkout") for _, manifest in manifests})
        facts.append(("Finished", max(str(manifest["finished"]) for _, manifest in manifests)))
        facts.append(("Commit", ", ".join(commits)))
    return facts


def _versions(manifests: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """Versions that the stages ran with; all of them where a study went on after an upgrade."""
    found: dict[str, set[str]] = {}
    for _, manifest in manifests:
        for name, version in manifest["versions"].items():
            found.setdefault(name, set()).add(str(version))
    return [
        (name, " / ".join(sorted(found[name])))
        for name in sorted(found, key=lambda name: (name != "superexperts", name))
    ]


def _stages(folder: Path, manifests: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[dict[str, str]]:
    return [
        {
            "command": str(manifest["command"]),
            "folder": str(where.relative_to(folder)),
            "seconds": f"{manifest['seconds']} s",
            "json": json.dumps(
                {name: manifest[name] for name in ("key", "inputs", "outputs")}, indent=1, ensure_ascii=False
            ),
        }
        for where, manifest in sorted(manifests, key=lambda pair: str(pair[1]["finished"]))
    ]
