"""The command line: a list of names. A command is a module with its settings, `run`, and `show` for its result."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from rich.markup import escape

from superexperts import __version__
from superexperts.core.arguments import read_arguments, speller
from superexperts.core.console import is_main_process, stdout
from superexperts.core.errors import OptionError, SuperExpertsError
from superexperts.core.full_disk import full_disk
from superexperts.core.process import importing_once, keep_memory, no_interrupt_lost

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """Where a command is. Its module is imported when it is called, so that --help does not wait for torch."""

    summary: str
    module: str
    """In it: the settings class, `run`, `show`, and what `defaults` and `rewrite` name. `check`, if there is one, finds
    wrong paths before the heavy imports."""
    settings: str
    work: str | None = None
    """The module with the heavy imports of `run`, imported before it; None for commands that need none."""
    defaults: str | None = None
    """A function from the arguments to settings that take the place of the defaults, such as those of a recipe."""
    rewrite: str | None = None
    """A function that changes the arguments before they are parsed."""


COMMANDS = {
    "profile": Command(
        "measure what every expert writes", "profiling.profile", "ProfileConfig", work="profiling.streamed"
    ),
    "select": Command("choose experts from a profile", "profiling.select", "SelectConfig"),
    "prune": Command("write a checkpoint without the chosen experts", "surgery.prune", "PruneConfig"),
    "restore": Command("undo what prune did", "surgery.restore", "RestoreConfig"),
    "compare": Command(
        "show what differs between two checkpoints", "surgery.compare", "CompareConfig", work="models.parts"
    ),
    "train": Command(
        "train LoRA on chosen experts, on attention, or on both",
        "training.train",
        "TrainConfig",
        work="training.loop",
        defaults="defaults",
    ),
    "export": Command("write an adapter for other programs", "adapters.export", "ExportConfig", work="adapters.merge"),
    "import": Command("read an adapter of another program", "adapters.import_", "ImportConfig", work="adapters.fused"),
    "check-adapter": Command(
        "check that an adapter fits and has an effect",
        "evaluation.check_adapter",
        "CheckAdapterConfig",
        work="adapters.effect",
    ),
    "evaluate": Command(
        "ask a model the questions of benchmarks",
        "evaluation.evaluate",
        "EvaluateConfig",
        work="evaluation.ask",
        rewrite="rewrite_arguments",
    ),
    "extract": Command("read which answer each response commits to", "extraction.extract", "ExtractConfig"),
    "study": Command(
        "run everything, from the checkpoint to the report",
        "studies.study",
        "StudyConfig",
        work="studies.workflow",
        rewrite="rewrite_arguments",
    ),
    "status": Command("show how far a study is", "studies.status", "StatusConfig"),
    "report": Command("write the report of a study again", "reports.report", "ReportConfig", work="reports.page"),
    "push": Command("put an adapter or a study on the Hub", "hub.push", "PushConfig"),
    "pocket": Command("write the built-in model as a checkpoint folder", "pocket", "PocketConfig"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 without effect or not as expected, 2 wrong input, 130
    interrupted."""
    keep_memory()
    own_process = arguments is None
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        with _printing():
            _help()
        return 0
    if name in ("-V", "--version"):
        with _printing():
            print(f"superexperts {__version__}")
        return 0
    spell: Callable[[str], str] = str
    try:
        stopping = f"superexperts: stopping {name}, after what cannot be left half done; Ctrl-C again ends it at once"
        with no_interrupt_lost(stopping if own_process and is_main_process else ""):
            command = _command(name)
            with importing_once() if own_process else nullcontext():
                module = _imported(command.module)
                spell = speller(getattr(module, command.settings))
                settings = _settings(name, command, module, words[1:])
                if hasattr(module, "check"):
                    module.check(settings)  # a wrong path is an error at once, not after the imports below
                if command.work is not None:
                    _imported(command.work)
            return _run(module, settings)
    except SuperExpertsError as error:
        print(f"superexperts: {error.line(spell)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("superexperts: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            line = f"{str(error.filename)[:60]!r}... is too long for a name; give a shorter one"
        elif (full := full_disk(error)) is not None:
            line = full.line(spell)
        else:
            raise
        print(f"superexperts: {line}", file=sys.stderr)
        return 2


def _help() -> None:
    stdout.print("usage: superexperts COMMAND ...\n")
    stdout.print("Profile, prune, LoRA-train and evaluate the super experts of Mixture-of-Experts models.\n")
    for name, command in COMMANDS.items():
        stdout.print(f"  {name:14} {escape(command.summary)}", soft_wrap=True)
    stdout.print("\n`superexperts COMMAND --help` shows the options of a command, with an example.")
    stdout.print("`superexperts --version` shows the version.")


def _command(name: str) -> Command:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(f"there is no command {name!r}; {hint}see superexperts --help")
    return COMMANDS[name]


def _settings(name: str, command: Command, module: Any, words: Sequence[str]) -> Any:
    default = getattr(module, command.defaults)(words) if command.defaults else None
    if command.rewrite:
        words = getattr(module, command.rewrite)(words)
    with _printing():  # --help
        return read_arguments(getattr(module, command.settings), f"superexperts {name}", words, default)


def _run(module: Any, settings: Any) -> int:
    result = module.run(settings)
    if not is_main_process:
        return 0
    with _printing():
        if settings.json:
            print(json.dumps(result, ensure_ascii=False))
        else:
            module.show(result)
    return int(result.get("exit_code", 0))


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Ends the process quietly if whatever reads standard output, such as `head`, stops before the end of the block.

    Only for printing: any other broken pipe, such as that of a worker, is an error.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        raise SystemExit(1) from None


def _imported(name: str) -> Any:
    return importlib.import_module(f"superexperts.{name}")
