"""Writes the report of a study: report.html, report.md with the same conclusions as text, and figures/ for a paper.

report.html is one file. It opens from disk, loads nothing else, and runs only its own script. Text that a model
generated is untrusted: the template escapes it, the answers are embedded as JSON with every `<` escaped, the script
only writes `textContent`, and the content security policy of the page forbids all other scripts.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from superexperts import __version__
from superexperts.core.errors import DataError
from superexperts.core.jsonl import read_rows
from superexperts.core.paths import require_inside
from superexperts.core.runs import fingerprint, new_folder, read_json, write_manifest, write_text
from superexperts.core.types import Answer, ExpertSet, Extraction, key_name
from superexperts.reports.answers import disagreements, script_safe, visible
from superexperts.reports.pictures import drawn, pictures, rule_of
from superexperts.reports.reproduce import facts, read_manifests, stages, study_file, versions
from superexperts.reports.tables import budgets, comparison_rows, lede, verdict_rows
from superexperts.results.results import Results
from superexperts.results.tables import result_table
from superexperts.results.verdict import headline

__all__ = ["write_report"]

T = TypeVar("T")

TEMPLATES = Path(__file__).parent / "templates"
FIGURES = "figures"
FINISHED = "the folder of a finished study"
"""What to give instead, for errors."""
MAX_PAGE, MAX_ANSWERS = 4_900_000, 2_000_000
"""Most bytes of the page, which must stay under 5 MB, and of the answers in it."""


def write_report(folder: Path, settings: Mapping[str, type]) -> Path:
    """Writes `report.html`, `report.md` and `figures/` into a study's folder; returns the path of report.html.

    Needs results.json (`DataError` if it is missing). Shows the profile, expert sets, answers, training logs, adapters
    and manifests if the folder has them. `settings` are the settings classes of the commands that the report shows as
    one would type them.
    """
    started = time.monotonic()
    require_inside(folder, "results.json", "folder", FINISHED)
    results = Results.load(folder)
    extractions = _load_lines(folder, results, "extractions", Extraction.from_json)
    answers = _load_lines(folder, results, "answers", Answer.from_json)
    super_file = folder / "experts" / "super.json"
    chosen = ExpertSet.from_json(read_json(super_file, "experts")) if super_file.is_file() else None
    manifests = read_manifests(folder)
    rule = rule_of(chosen)
    content: dict[str, Any] = {
        "results": results,
        "headline": headline(results),
        "lede": lede(results),
        "against_base": verdict_rows(results, "base"),
        "against_controls": verdict_rows(results, "control"),
        "table": result_table(results),
        "any_perplexity": any(variant.perplexity is not None for variant in results.variants),
        "any_subjects": any(score.clustered for variant in results.variants for score in variant.scores),
        "comparisons": comparison_rows(results),
        "budgets": budgets(results),
        "chosen": [key_name(key) for key in chosen.experts] if chosen is not None else [],
        "rule": rule | {"ratio_words": "tenth" if rule["ratio"] == 10 else f"{rule['ratio']:g}th part"},
        "facts": facts(results, manifests),
        "versions": versions(manifests),
        "stages": stages(folder, results, manifests, settings),
        "study_file": study_file(folder),
        "prompts": _prompts(folder, results),
        "version": __version__,
    }
    with new_folder(folder / FIGURES, "report", "folder") as figures:
        shown = [drawn(picture, figures) for picture in pictures(folder, results, chosen)]
        outputs = sorted(file.name for file in figures.iterdir())
        inputs = {"results": fingerprint(folder / "results.json")}
        write_manifest(figures, "report", inputs, outputs, time.monotonic() - started)
    page = _page(content, shown, None)
    if answers and extractions:
        room = min(MAX_ANSWERS, max(0, MAX_PAGE - len(page.encode("utf-8", errors="backslashreplace"))))
        page = _page(content, shown, disagreements(results, answers, extractions, room))
    write_text(folder / "report.md", _markdown(content, shown))
    path = folder / "report.html"
    write_text(path, page)
    return path


def _prompts(folder: Path, results: Results) -> list[tuple[str, str]]:
    """(benchmark, all that was sent to ask its first item), which is the same for every variant; empty for answers of
    an earlier version."""
    manifest = folder / "variants" / results.base.runs[0].name / "manifest.json"
    sent = read_json(manifest, "manifest").get("prompts", {}) if manifest.is_file() else {}
    return [(task, visible(str(sent[task]))) for task in results.columns if task in sent]


def _page(content: dict[str, Any], shown: list[dict[str, Any]], browser: Any) -> str:
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    by_section = {
        name: [one for one in shown if one["section"] == name and one["on_page"]]
        for name in ("results", "controls", "experts", "sinks", "weights", "training")
    }
    sections = [
        ("results", "Results", True),
        ("budget", "Budget", bool(content["budgets"])),
        ("experts", "Experts", bool(by_section["experts"] or by_section["sinks"])),
        ("weights", "Weights", bool(by_section["weights"])),
        ("training", "Training", bool(by_section["training"])),
        ("answers", "Answers", browser is not None),
        ("run", "Reproduce", True),
    ]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_safe"] = script_safe
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["groupby_order"] = _groups
    return environment.get_template("report.html.j2").render(
        **content,
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        # The content security policy allows only the script with this hash.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=[(name, title) for name, title, present in sections if present],
        pictures=by_section,
        left_out=sum(not picture["on_page"] for picture in shown),
        browser=browser,
    )


def _markdown(content: dict[str, Any], shown: list[dict[str, Any]]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # `finalize` escapes everything, for Markdown
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fenced"] = _fenced
    environment.filters["quoted"] = lambda text: _Verbatim(quote(text))
    return environment.get_template("report.md.j2").render(**content, shown=shown, figures=FIGURES)


def _groups(rows: Iterable[Any], name: str) -> list[tuple[str, list[Any]]]:
    """Groups of consecutive rows; unlike jinja's `groupby` it keeps their order."""
    return [(key, list(own)) for key, own in itertools.groupby(rows, key=lambda row: getattr(row, name))]


class _Verbatim(str):
    """Text that is already Markdown and must not be escaped."""


def _plain(value: Any) -> str:
    """The value on one line, escaped for Markdown and for the HTML in it."""
    if isinstance(value, _Verbatim):
        return value
    text = " ".join(visible(str(value)).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|#~!])", r"\\\1", text)
    # Some renderers turn these into links.
    return text.replace("://", ":&#47;/").replace("@", "&#64;").replace("www.", "www&#46;")


def _fenced(text: str, language: str = "") -> _Verbatim:
    """A code block, with a fence longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return _Verbatim(f"{fence}{language}\n{visible(text).rstrip()}\n{fence}")


def _load_lines(folder: Path, results: Results, kind: str, parse: Callable[[Any], T]) -> dict[str, dict[str, list[T]]]:
    """Run -> benchmark -> lines of `variants/<run>/<kind>/<task>.jsonl`; empty if the folder has no such files."""
    files = {
        run.name: {task: folder / "variants" / run.name / kind / f"{task}.jsonl" for task in results.tasks}
        for _, run in results.runs
    }
    present = [file.is_file() for by_task in files.values() for file in by_task.values()]
    if not any(present):
        return {}
    if not all(present):
        missing = next(file for by_task in files.values() for file in by_task.values() if not file.is_file())
        raise DataError(f"{missing} is missing; run the study again", field="folder")
    return {
        name: {task: [parse(row) for _, row in read_rows(file, kind)] for task, file in by_task.items()}
        for name, by_task in files.items()
    }
