"""The command line: a list of names. A command is a module with its settings, `run`, and `show` for its result."""

from __future__ import annotations

import difflib
import errno
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from rich.markup import escape

from superexperts.core.arguments import read_arguments, speller
from superexperts.core.console import is_main_process, stdout
from superexperts.core.errors import OptionError, SuperExpertsError
from superexperts.core.process import importing_once, keep_memory, no_interrupt_lost

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """Where a command lies. Its module is imported when it runs, so that --help does not wait for torch."""

    summary: str
    module: str
    settings: str


COMMANDS = {
    "profile": Command(
        "what every expert writes, and which tokens it sees", "profiling.profile", "profiling.profile.ProfileConfig"
    ),
    "select": Command("choose experts from a profile", "profiling.select", "profiling.select.SelectConfig"),
    "prune": Command("a checkpoint without the chosen experts", "surgery.prune", "surgery.prune.PruneConfig"),
    "restore": Command("undo what prune did", "surgery.restore", "surgery.restore.RestoreConfig"),
    "compare": Command("what differs between two checkpoints", "surgery.compare", "surgery.compare.CompareConfig"),
    "train": Command("LoRA on chosen experts, on attention, or both", "training.train", "training.train.TrainConfig"),
    "export": Command("write an adapter for other programs", "adapters.export", "adapters.export.ExportConfig"),
    "import": Command("read an adapter of another program", "adapters.import_", "adapters.import_.ImportConfig"),
    "check-adapter": Command(
        "does an adapter fit, and does it change anything",
        "evaluation.check_adapter",
        "evaluation.check_adapter.CheckAdapterConfig",
    ),
    "evaluate": Command(
        "ask a model the questions of benchmarks", "evaluation.evaluate", "evaluation.evaluate.EvaluateConfig"
    ),
    "extract": Command("read what each answer commits to", "extraction.extract", "extraction.extract.ExtractConfig"),
    "study": Command("everything, from the checkpoint to the report", "studies.study", "studies.study.StudyConfig"),
    "status": Command("how far a study is", "studies.status", "studies.status.StatusConfig"),
    "report": Command("write the report of a study again", "reports.report", "reports.report.ReportConfig"),
    "push": Command("put an adapter or a study on the Hub", "hub.push", "hub.push.PushConfig"),
    "pocket": Command("the embedded model as a checkpoint folder", "pocket", "pocket.PocketConfig"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 without effect or not as expected, 2 wrong input, 130
    interrupted."""
    keep_memory()
    own_process = arguments is None
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        _help()
        return 0
    spell: Callable[[str], str] = str
    try:
        with no_interrupt_lost():
            command = _command(name)
            with importing_once() if own_process else nullcontext():
                kind = _attribute(command.settings)
                spell = speller(kind)
                settings = _settings(name, kind, words[1:])
                module = _imported(command.module)
            return _run(name, module, settings)
    except SuperExpertsError as error:
        print(f"superexperts: {error.line(spell)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(
            f"superexperts: {str(error.filename)[:60]!r}... is too long for a name; give a shorter one", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("superexperts: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def _help() -> None:
    stdout.print("usage: superexperts COMMAND ...\n")
    stdout.print("Profile, prune, LoRA-train and evaluate the super experts of Mixture-of-Experts models.\n")
    for name, command in COMMANDS.items():
        stdout.print(f"  {name:14} {escape(command.summary)}", soft_wrap=True)
    stdout.print("\n`superexperts COMMAND --help` shows the options of a command, with an example.")


def _command(name: str) -> Command:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(f"there is no command {name!r}; {hint}see superexperts --help")
    return COMMANDS[name]


def _settings(name: str, kind: type, words: Sequence[str]) -> Any:
    # Two hooks for what tyro cannot say: `defaults(words)` gives the values of options that are not given, and
    # `rewrite_arguments(words)` changes the words themselves.
    module = sys.modules[kind.__module__]
    default = getattr(module, "defaults", lambda _: None)(words)
    words = getattr(module, "rewrite_arguments", list)(words)
    return read_arguments(kind, f"superexperts {name}", words, default)


def _run(name: str, module: Any, settings: Any) -> int:
    result = module.run(settings)
    if not is_main_process:
        return 0
    if "json" in vars(settings) and settings.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        module.show(result)
    return int(result.get("exit_code", 0)) if name == "compare" else 0


def _imported(name: str) -> Any:
    return importlib.import_module(f"superexperts.{name}")


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(_imported(module), name)
