"""The command `extract`: which answer each raw response commits to, by rules and, if asked for, by a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from superexperts.checkpoints.source import JUDGE, local_folder
from superexperts.core.console import stdout
from superexperts.core.errors import Field, OptionError
from superexperts.core.jsonl import require_text
from superexperts.core.paths import require_file, require_folder
from superexperts.core.runs import read_json
from superexperts.core.settings import SERVER_OPTIONS, ServerConfig, Switch, require, require_unused, require_url
from superexperts.engines import ENGINES

if TYPE_CHECKING:
    from superexperts.extraction.judge import Judge

    JudgeEngine = str
else:
    # A server is named by its URL instead.
    JudgeEngine = Literal[tuple(name for name, engine in ENGINES.items() if not engine.server)]

__all__ = ["DEFAULT_JUDGE", "ExtractConfig", "judge_of", "run", "show"]

DEFAULT_JUDGE = "Qwen/Qwen2.5-32B-Instruct"
"""The judge of the original project."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig(ServerConfig):
    """Read which answer each raw response commits to. Answers that cannot be read are counted as wrong, and shown.

    Example: superexperts extract runs/base

    Example: superexperts extract runs/base --judge all --judge-base-url http://localhost:8000/v1
    """

    folder: Positional[Annotated[Path | None, tyro.conf.arg(metavar="DIR")]] = None
    """Folder with answers/. extractions/ and scores.json are written there."""
    audit: Path | None = None
    """Measure the extraction itself instead, on labelled generations (JSONL)."""
    judge: str = "off"
    """Model that reads what the rules cannot: checkpoint folder, Hub name, or its name on the server. `left` and `all`
    mean Qwen/Qwen2.5-32B-Instruct with that scope. The judge never sees the right answer."""
    judge_scope: Literal["left", "all"] | None = None
    """judge: `left` reads what the rules could not; `all` reads every answer, and the rules are only compared with it.
    Default: left."""
    judge_base_url: str | None = None
    """judge: URL of an OpenAI-compatible server, such as http://localhost:8000/v1; default: a model in this process."""
    judge_engine: JudgeEngine = "hf"
    """judge in this process: what runs it, as for evaluate."""
    judge_max_tokens: int = 256
    """judge: tokens of a reply at most. A judge that thinks first needs some thousands."""
    batch_size: int = 8
    """judge in this process: answers per batch."""
    device: str = "auto"
    """judge in this process: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """judge in this process: weights in memory, as for evaluate."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is None and self.audit is None:
            raise OptionError("missing; give the folder with answers, or ", Field("audit"), " FILE", field="folder")
        both = self.folder is not None and self.audit is not None
        require(not both, "audit", str(self.audit), "excludes ", Field("folder"), "; give one of the two")
        require(self.batch_size > 0, "batch_size", self.batch_size, "is not positive; give at least 1")
        most = self.judge_max_tokens
        require(most > 0, "judge_max_tokens", most, "is not positive; give at least 1")
        require(bool(self.judge), "judge", self.judge, "is empty; name a model, or give off")
        if self.judge in ("left", "all"):
            why = ("is not that of ", Field("judge"), f" {self.judge}; leave one of the two out")
            require(self.judge_scope in (None, self.judge), "judge_scope", self.judge_scope, *why)
            object.__setattr__(self, "judge_scope", self.judge)
            object.__setattr__(self, "judge", DEFAULT_JUDGE)
        for option, value, default in (
            ("judge_scope", self.judge_scope, None),
            ("judge_base_url", self.judge_base_url, None),
            ("judge_engine", self.judge_engine, "hf"),
            ("judge_max_tokens", self.judge_max_tokens, 256),
        ):
            require(
                self.judge != "off" or value == default,
                option,
                value,
                "needs a judge; name one with ",
                Field("judge"),
            )
        if self.judge == "off":
            require_unused(self, ["batch_size", "dtype"], "without ", Field("judge"))
        if self.judge_base_url is None:
            require_unused(self, SERVER_OPTIONS, "without ", Field("judge_base_url"))
        else:
            of_loading = ["batch_size", "dtype"]
            require_unused(self, of_loading, "with ", Field("judge_base_url"), ", where the server decides")
            require_url("judge_base_url", self.judge_base_url)
            why = ("excludes ", Field("judge_base_url"), ", the server that runs the judge; leave one of the two out")
            require(self.judge_engine == "hf", "judge_engine", self.judge_engine, *why)


def check(config: ExtractConfig) -> None:
    """What is wrong without reading the files, before any library is imported."""
    if config.audit is not None:
        require_file(config.audit, "audit", "a JSONL file of labelled generations")
        require_text(config.audit, "audit")
    if config.folder is not None:
        require_folder(config.folder, "folder", "the folder that `evaluate` wrote")
    if config.judge != "off" and config.judge_base_url is None:
        local_folder(config.judge, field="judge", what=JUDGE)


def run(config: ExtractConfig, judge: Judge | None = None) -> dict[str, Any]:
    """Extracts the answers of a folder and returns the scores, or audits the extraction itself.

    `judge` is the judge that the settings name, if it is open already.
    """
    # Imported here, so that --help and a wrong path do not wait for scipy.
    from superexperts.extraction.audit import audit_file
    from superexperts.extraction.scores import extract_folder

    if config.audit is not None:
        return audit_file(config.audit, judge_of(config, None))  # a labelled file has no folder to keep replies in
    assert config.folder is not None
    judge = judge or judge_of(config, config.folder / "judge.jsonl")
    extract_folder(config.folder, judge, config.judge_scope or "left")
    return {"out": str(config.folder), **read_json(config.folder / "scores.json", "folder")}


def judge_of(config: ExtractConfig, replies: Path | None) -> Judge | None:
    """The judge that the settings name, None for `off`; `replies` is the file that keeps its replies."""
    if config.judge == "off":
        return None
    from superexperts.extraction.judge import open_judge

    return open_judge(
        config.judge,
        replies,
        base_url=config.judge_base_url,
        engine=config.judge_engine,
        device=config.device,
        dtype=config.dtype,
        batch_size=config.batch_size,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
        max_tokens=config.judge_max_tokens,
    )


def show(result: dict[str, Any]) -> None:
    """Prints the scores, or the audit. Text of a model goes through `ascii` and `Text`: it is not markup."""
    if "scores" not in result:
        _show_audit(result)
        return
    _show_scores(result)
    if "judge" in result:
        _show_judge(result["judge"])
    stdout.print(f"in {result['out']}", soft_wrap=True)


def _show_audit(result: dict[str, Any]) -> None:
    table = Table(caption="accuracy: right, and rightly empty, over all", box=SIMPLE, padding=0)
    for column in ("", "items", "right", "empty", "wrong", "missed", "invented", "accuracy", "95% interval"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)  # a row fits into 80 columns
    sections = [("all", result["all"]), *result["kinds"].items(), *(result["rules"].items())]
    if result["judge"] is not None:
        judge = result["judge"]
        sections += [("judge", judge["all"]), *((f"judge {kind}", row) for kind, row in judge["kinds"].items())]
        sections.append(("rules + judge", judge["together"]))
    for name, row in sections:
        counts = [str(row[column]) for column in ("items", "right", "empty", "wrong", "missed", "invented")]
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        table.add_row(name, *counts, f"{100 * row['accuracy']:.2f}", interval)
    stdout.print(table)
    for row in result["not_right"]:
        stdout.print(Text(ascii(f"{row['id']}: {row['label']} read as {row['extracted']} ({row['rule']})")))
    if result["judge"] is not None:
        _show_judge(result["judge"])


def _show_judge(result: dict[str, Any]) -> None:
    line = [f"judge {result['model']!a}: asked {result['asked']:,}, named an answer in {result['committed']:,}"]
    line.append(f"none in {result['none']:,}, unreadable {result['unreadable']:,}")
    stdout.print(Text(", ".join(line)), soft_wrap=True)
    if result["unreadable"] == result["asked"] > 0:
        stdout.print("no reply of the judge held a verdict, so nothing is said about its agreement", soft_wrap=True)
        stdout.print("a judge that thinks first needs a larger limit of tokens (judge_max_tokens)", soft_wrap=True)
    found = result["agreement"]
    if found is not None:
        interval = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
        line = [f"{name.replace('_', ' ')} {found[name]}" for name in ("differ", "rules_only", "judge_only")]
        share = f"agrees with the rules on {100 * found['share']:.2f}% of {found['items']:,} ({interval})"
        stdout.print(Text(f"judge {share}; {', '.join(line)}"), soft_wrap=True)


def ended_line(score: Mapping[str, Any]) -> str:
    """How many responses did not end by themselves, "" if all did: "3 cut, 1 empty"."""
    said = {
        "cut": "cut at the limit of tokens or within thoughts",
        "empty": "empty",
        "refused": "refused or filtered by the server",
    }
    return ", ".join(f"{score[name]} {words}" for name, words in said.items() if score.get(name))


def _show_scores(result: dict[str, Any]) -> None:
    table = Table()
    for column in ("benchmark", "variant", "items", "accuracy", "95% interval", "unparsed"):
        table.add_column(column, justify="left" if column in ("benchmark", "variant") else "right")
    for row in result["scores"]:
        table.add_row(
            Text(row["task"]),
            Text(row["variant"]),
            str(row["items"]),
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['unparsed']} ({100 * row['unparsed'] / row['items']:.1f}%)",
        )
    if result["scores"]:
        stdout.print(table)
    for row in result["scores"]:
        if line := ended_line(row):
            stdout.print(Text(f"{row['task']}: {line}"), soft_wrap=True)
    for row in result.get("normalized", []):
        stdout.print(f"{row['task']}, by log-probability per character (acc_norm): {100 * row['accuracy']:.2f}")
    for row in result.get("subjects", []):
        groups = "".join(
            f"; {group} {100 * found['accuracy']:.2f} ({100 * found['macro']:.2f})"
            for group, found in row["groups"].items()
        )
        stdout.print(
            f"{row['task']}, {len(row['subjects'])} subjects, mean over items (over subjects): "
            f"{100 * row['accuracy']:.2f} ({100 * row['macro']:.2f}){groups}",
            soft_wrap=True,
            markup=False,
        )
    for row in result.get("ungraded", []):
        stdout.print(
            f"{row['task']}: {row['items']} answers without gold answers, no accuracy; {row['unparsed']} unparsed; "
            f"to submit: extractions/{row['submission']}",
            soft_wrap=True,
            markup=False,
        )
