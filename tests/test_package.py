"""Rules of the house that no linter checks."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from tyro import _errors as refusals

from superexperts.cli import COMMANDS
from superexperts.engines import ENGINES
from superexperts.evaluation import evaluate
from superexperts.extraction import extract
from superexperts.profiling.rules import RULES
from superexperts.results.variants import DEFAULT_SETS, SETS

SOURCES = Path(__file__).parents[1] / "src" / "superexperts"


def test_no_source_file_reaches_400_lines() -> None:
    long = [str(file) for file in SOURCES.rglob("*.py") if len(file.read_text(encoding="utf-8").splitlines()) >= 400]
    assert not long


def test_settings_stay_above_the_rooms_that_work_without_commands() -> None:
    """A settings class is named `...Config`; what lies below the commands takes plain arguments."""
    low = ("models", "checkpoints", "data", "engines", "results", "benchmarks")
    found = [
        f"{file}: {line}"
        for room in low
        for file in (SOURCES / room).rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("from superexperts") and line.endswith("Config")
    ]
    assert not found


def test_only_models_knows_how_a_family_lays_out_its_experts() -> None:
    """What transformers writes on a bank of experts is read in models/; other rooms ask the functions there."""
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    found = [
        f"{file}:{node.lineno}"
        for file in SOURCES.rglob("*.py")
        if file.relative_to(SOURCES).parts[0] != "models"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in marks
    ]
    assert not found


def test_only_command_files_hold_settings() -> None:
    """`core.settings` and classes named `...Config` are for the files of commands; below them are plain arguments."""
    commands = {f"superexperts.{command.module}" for command in COMMANDS.values()}
    # These read settings as a whole: the recipe of a training, and a study file, with its sections for commands.
    commands |= {"superexperts.training.recipe", "superexperts.studies.study_file"}
    # What checks the settings of a command, in a file beside it.
    commands |= {"superexperts.training.checks", "superexperts.evaluation.checks"}
    found = []
    for file in SOURCES.rglob("*.py"):
        module = ".".join(["superexperts", *file.relative_to(SOURCES).with_suffix("").parts]).removesuffix(".__init__")
        if module in commands or module.startswith("superexperts.core."):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module == "superexperts.core.settings":
                found.append(f"{file}:{node.lineno}: core.settings")
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and "(" not in node.name:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                found += [] if "LoraConfig" in bases else [f"{file}:{node.lineno}: {node.name}"]
    assert not found


def test_the_hook_of_tyro_is_where_arguments_look_for_it() -> None:
    """If this fails after an upgrade of tyro: core/arguments.py turns what tyro refuses into an `OptionError` through
    `tyro._errors.on_parse_error`, which is private. Look at what took its place and at the fields of its events, change
    `_refusal`, then the bound on tyro in pyproject.toml."""
    fields = {
        "UnrecognizedArgs": {"tokens"},
        "MissingArgs": {"missing_arguments", "unrecognized_tokens"},
        "InvalidChoice": {"argument", "value", "choices"},
        "BadValue": {"argument"},
        "InstantiationFailure": {"argument", "message"},
    }
    assert callable(refusals.on_parse_error)
    for name, needed in fields.items():
        event = getattr(refusals, name)
        assert issubclass(event, refusals.ParseErrorEvent)
        assert needed <= {field.name for field in dataclasses.fields(event)}


def test_the_sets_of_every_study_are_rules_of_the_registry() -> None:
    assert SETS.keys() == DEFAULT_SETS.keys()
    for name, settings in DEFAULT_SETS.items():
        rule = RULES[settings["rule"]]
        assert settings.keys() - {"rule"} <= set(rule.settings), name


def test_commands_offer_the_engines_of_the_registry() -> None:
    assert set(evaluate.EngineName.__args__) == set(ENGINES)
    assert set(extract.JudgeEngine.__args__) == {name for name, engine in ENGINES.items() if not engine.server}
