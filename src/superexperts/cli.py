"""The command line: one command per stage, no logic. What a command returns is shown, or printed with --json."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from superexperts.core import config, config_adapters, config_study, config_surgery, config_train
from superexperts.core.allocator import keep_memory
from superexperts.core.console import speaks
from superexperts.core.errors import OptionError, SuperExpertsError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["main"]

# Modules are imported when their command runs, so that --help does not wait for torch.
COMMANDS: dict[str, Callable[..., Any]] = {
    "profile": config.ProfileConfig,
    "select": config.SelectConfig,
    "prune": config_surgery.PruneConfig,
    "restore": config_surgery.RestoreConfig,
    "compare": config_surgery.CompareConfig,
    "train": config_train.TrainConfig,
    "export": config_adapters.ExportConfig,
    "import": config_adapters.ImportConfig,
    "check-adapter": config_adapters.CheckAdapterConfig,
    "evaluate": config.EvaluateConfig,
    "extract": config.ExtractConfig,
    "study": config_study.StudyConfig,
    "status": config_study.StatusConfig,
    "report": config_study.ReportConfig,
    "push": config_adapters.PushConfig,
    "pocket": config.PocketConfig,
}


MODULES = {
    "profile": "profiling.profile",
    "select": "profiling.select",
    "prune": "surgery.prune",
    "restore": "surgery.restore",
    "compare": "surgery.compare",
    "train": "training.train",
    "export": "adapters.export",
    "import": "adapters.import_",
    "check-adapter": "evaluation.check_adapter",
    "evaluate": "evaluation.evaluate",
    "extract": "extraction.extract",
    "study": "studies.study",
    "status": "studies.status",
    "report": "reports.report",
    "push": "hub.push",
    "pocket": "pocket",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 without effect or not as expected, 2 wrong input, 130
    interrupted."""
    keep_memory()
    try:
        with _no_interrupt_lost():
            return _run(sys.argv[1:], _imported_once) if arguments is None else _run(arguments, _imported)
    except SuperExpertsError as error:
        print(f"superexperts: {error}", file=sys.stderr)
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


def _run(arguments: Sequence[str], imported: Callable[[str], Any]) -> int:
    settings = _parse(arguments)
    command = next(name for name, kind in COMMANDS.items() if type(settings) is kind)
    result = imported(MODULES[command]).run(settings)
    if not speaks:
        return 0
    if "json" in vars(settings) and settings.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        importlib.import_module(".core.show", __package__).show(command, result)
    return int(result.get("exit_code", 0)) if command == "compare" else 0


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Within the block, an interrupt that falls into a callback, where Python would print it and go on, comes again: a
    moment later, for one that has come cannot wake what waits after it; at the latest at the block's end."""
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def hook(unraisable: UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            again.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
            again[-1].start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        coming = [timer for timer in again if timer.is_alive()]
        for timer in coming:
            timer.cancel()
    if coming:
        raise KeyboardInterrupt


def _imported(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _imported_once(name: str) -> Any:
    """As `_imported`, in a process that runs this command and ends. The collector of cycles, which finds next to none
    in what is imported, never looks at it: that is a fifth of the time that torch and transformers take."""
    gc.disable()
    try:
        return _imported(name)
    finally:
        gc.freeze()
        gc.enable()


def _parse(arguments: Sequence[str]) -> Any:
    """The settings of the command that the arguments name; what tyro says of wrong ones becomes one line."""
    said = io.StringIO()
    arguments = _with_address(arguments)
    recipe = _recipe(arguments)
    try:
        with contextlib.redirect_stderr(said):
            if recipe is not None:
                return tyro.cli(
                    config_train.TrainConfig, default=recipe, prog="superexperts train", args=list(arguments[1:])
                )
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="superexperts",
                description="Profile, prune, LoRA-train and evaluate the super experts of Mixture-of-Experts models.",
                args=list(arguments),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # Lines are drawn with these, or with others where standard output is not UTF-8.
        text = " ".join(re.sub(r"[╭╮╰╯│─]+|-{5,}", " ", said.getvalue()).split())
        text = re.sub(
            r"^.*?Error parsing \w+Config: |^[A-Z][a-z]+ [a-z]+ | (Argument helptext|For full helptext).*", "", text
        )
        text = _NO_NUMBER.sub(_no_number, text)
        raise OptionError(text + ("" if ";" in text else "; see --help")) from None


# What tyro says of a text where a number should be, of an option that may be left out in four lines.
_NO_NUMBER = re.compile(r"^Error parsing (--[\w-]+): .*?(?:(invalid literal for int)|could not convert)[^']*('.*')$")


def _no_number(found: re.Match[str]) -> str:
    return f"{found[1]}: {found[3]} is not {'a whole number' if found[2] else 'a number'}; give one"


def _with_address(arguments: Sequence[str]) -> list[str]:
    """`study --ray` without an address gets the empty one; a study file that follows is no address."""
    words = list(arguments)
    if words[:1] == ["study"] and "--ray" in words:
        after = words.index("--ray") + 1
        if after == len(words) or words[after].startswith("-") or words[after].endswith((".yaml", ".yml")):
            words.insert(after, "")
    return words


def _recipe(arguments: Sequence[str]) -> config_train.TrainConfig | None:
    """The settings of the file that `train --recipe FILE` names, which take the place of train's defaults."""
    if list(arguments[:1]) != ["train"] or {"-h", "--help"} & set(arguments):
        return None
    files = [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == "--recipe"]
    files += [word.removeprefix("--recipe=") for word in arguments if word.startswith("--recipe=")]
    if not files:
        return None
    settings = config_train.read_recipe(Path(files[-1]))
    # Checked when the arguments have replaced some, and not before: what is to be adapted may come from either.
    unchecked = object.__new__(config_train.TrainConfig)
    for field in dataclasses.fields(config_train.TrainConfig):
        default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(unchecked, field.name, settings.get(field.name, default))
    return unchecked
