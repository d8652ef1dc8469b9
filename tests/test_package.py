"""Rules of the house that no linter checks."""

from __future__ import annotations

import ast
from pathlib import Path

from superexperts.engines import ENGINES
from superexperts.evaluation import evaluate
from superexperts.extraction import extract

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


def test_commands_offer_the_engines_of_the_registry() -> None:
    assert set(evaluate.EngineName.__args__) == set(ENGINES)
    assert set(extract.JudgeEngine.__args__) == {name for name, engine in ENGINES.items() if not engine.server}
