"""The command `study`: everything from the checkpoint to the report, in the cells of a study file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from superexperts.core.console import stdout
from superexperts.core.errors import Field, OptionError, OutputError
from superexperts.core.runs import write_text
from superexperts.core.settings import Switch, require, require_device, require_unused
from superexperts.results.tables import print_table
from superexperts.studies.progress import duration

__all__ = ["StudyConfig", "rewrite_arguments", "run", "show"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything from the checkpoint to the report; what is already done is not done again.

    Example: superexperts study --demo

    Example: superexperts study study.yaml --init

    Example: superexperts study recipes/deepseek-v2-lite.yaml --dry-run
    """

    study: Positional[Annotated[Path | None, tyro.conf.arg(metavar="STUDY")]] = None
    """Study file (YAML)."""
    demo: Switch = False
    """The built-in study of the pocket model."""
    init: Switch = False
    """Write a study file with comments to STUDY, and run nothing."""
    dry_run: Switch = False
    """Check the study file and show what would be run, how long it may take and how much memory it needs; run
    nothing."""
    out: Path | None = None
    """Folder of the study; default: runs/NAME."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes every GPU of this machine, with a process for each."""
    workers: int | None = None
    """Processes that run cells side by side; default: one for each GPU, or one."""
    ray: str | None = None
    """Run the cells on the Ray cluster at this ADDRESS, on machines that share the folder; without an address on the
    cluster that this machine belongs to, or on a new one of this machine alone."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        if self.study is not None and self.demo:
            excluded = "excludes ", Field("study"), f" {self.study}; give one of the two"
            raise OptionError(*excluded, field="demo")
        if self.study is None and not self.demo:
            raise OptionError("missing; give a study file, or ", Field("demo"), field="study")
        alone = not (self.init and (self.demo or self.dry_run))
        require(alone, "init", True, "excludes ", Field("demo"), " and ", Field("dry_run"), "; leave them out")
        if self.init:
            require_unused(self, ["out", "workers", "ray"], "with ", Field("init"), ", which runs nothing")
        if self.dry_run:
            require_unused(self, ["workers"], "with ", Field("dry_run"), ", which runs nothing")
        require_device(self.device)
        require(self.workers is None or self.workers > 0, "workers", self.workers, "is not positive; give at least 1")


def rewrite_arguments(words: Sequence[str]) -> list[str]:
    """Give `--ray` without an address the empty one, which tyro cannot leave out; a study file is not an address."""
    words = list(words)
    if "--ray" in words:
        after = words.index("--ray") + 1
        if after == len(words) or words[after].startswith("-") or words[after].endswith((".yaml", ".yml")):
            words.insert(after, "")
    return words


def check(config: StudyConfig) -> None:
    """What is wrong in the study file by itself, before any library is imported."""
    if not config.init:
        from superexperts.studies.study_file import read_study  # here, since --help needs no other command's settings

        read_study(config.study)


def run(config: StudyConfig) -> dict[str, Any]:
    """The command: runs the cells that are not done, then writes results.json, result.csv and the report."""
    # All commands and what they need take seconds to import; --help and --init do not need them.
    if config.init:
        assert config.study is not None
        return {"written": str(_write_template(config.study))}
    from superexperts.studies.check import check as check_plan
    from superexperts.studies.estimate import estimate
    from superexperts.studies.study_file import read_study
    from superexperts.studies.workflow import run_study

    text, plan = read_study(config.study)
    out = config.out or Path("runs") / plan.name
    check_plan(plan, text, str(config.study or "STUDY"), device=config.device, here=config.ray is None)
    if config.dry_run:
        return {"plan": estimate(plan, out, config.device), "out": str(out)}
    results = run_study(plan, text, out, device=config.device, workers=config.workers, ray=config.ray)
    return {"out": str(out), "report": str(out / "report.html"), "results": results}


def _write_template(path: Path) -> Path:
    if path.exists():
        raise OutputError(f"{path} exists; choose another name", field="init")
    write_text(path, (files(__package__) / "templates" / "study.yaml").read_text(encoding="utf-8"))
    return path


def show(result: dict[str, Any]) -> None:
    """Print the table of the results; of a dry run the cells with their times; or the new study file's name."""
    if "written" in result:
        stdout.print(f"wrote {result['written']}", soft_wrap=True, markup=False)
    elif "plan" in result:
        _show_plan(result["plan"])
    else:
        print_table(result["results"], stdout)
        stdout.print(f"report: {result['report']}", soft_wrap=True)


def _show_plan(plan: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title, side in (("cell", "left"), ("state", "left"), ("time", "right"), ("GiB", "right"), ("from", "left")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for row in plan["cells"]:
        gib = f"{row['gib']:.1f}" if row["gib"] else ""
        time = "" if row["state"] == "done" else duration(row["seconds"])
        table.add_row(Text(row["cell"]), row["state"], time, gib, row["basis"])
    stdout.print(table)
    stdout.print(
        f"about {duration(plan['seconds'])} on one {plan['device']}, up to {plan['gib']:.1f} GiB; model of "
        f"{plan['parameters'] / 1e6:,.1f} M parameters, {plan['active_parameters'] / 1e6:,.1f} M for each token",
        soft_wrap=True,
    )
    stdout.print(
        f"estimated from {plan['teraflops']:.3g} TFLOP/s and {plan['gigabytes_per_second']:.3g} GB/s, with every "
        "answer at its greatest length; nothing was run",
        soft_wrap=True,
    )
