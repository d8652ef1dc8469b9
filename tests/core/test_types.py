"""Files that other tools read: every noun survives JSON, and EXPERTS is read in each of its forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from superexperts.core.errors import DataError, ExpertsError
from superexperts.core.types import Answer, CorpusProfile, ExpertSet, ExpertStats, Extraction, Profile, Score, key_name

STATS = ExpertStats(layer=2, expert="shared", tokens=4, output_max=1.5, channel=3, position=0, token_id=1)
NOUNS: list[Any] = [
    Profile(model="m", num_layers=3, corpora={"pocket": CorpusProfile(tokens=9, experts=(STATS,))}),
    ExpertSet(model="m", rule={"name": "super"}, experts=((2, 54), (8, "shared")), scores=(1.0, None)),
    Answer(
        id="1",
        prompt="p",
        response="r\x00",
        gold="A",
        choices=(("A", "one"), ("B", "two")),
        kind="choice",
        task="mmlu",
        variant="base",
        seed=0,
    ),
    Extraction(id="1", extracted=None, how="unparsed", correct=False),
    Score(task="mmlu", variant="base", items=4, correct=2, unparsed=1, accuracy=0.5, low=0.15, high=0.85),
]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: type(noun).__name__)
def test_json_round_trip(noun: Any) -> None:
    value = json.loads(json.dumps(noun.to_json()))
    assert type(noun).from_json(value) == noun
    assert type(noun).from_json({**value, "added_later": 1}) == noun
    value.popitem()
    with pytest.raises((DataError, ExpertsError)):
        type(noun).from_json(value)


@pytest.mark.parametrize(
    ("text", "experts"),
    [
        ("L2E54,L3E38", ((2, 54), (3, 38))),
        ("L8shared,L12E190", ((8, "shared"), (12, 190))),
        ("2,54;3,38", ((2, 54), (3, 38))),
        ("2,54;3,38;", ((2, 54), (3, 38))),
        ("8,-1", ((8, "shared"),)),
    ],
)
def test_inline_experts(text: str, experts: Any) -> None:
    assert ExpertSet.parse(text).experts == experts


@pytest.mark.parametrize("text", ["L2", "L2E", "2", "L2E54 L3E38", "L2E5,3,4", "LxE1", "", "8,-2", "L2Eshared"])
def test_inline_experts_that_cannot_be_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ExpertsError, DataError)):
        ExpertSet.parse(text)


def test_upstream_report(tmp_path: Path) -> None:
    rows = [
        {"layer_index": "2", "expert_index": "54", "output_max": 1424.0, "rank": 1},
        {"layer_index": 8, "expert_index": "shared_experts", "output_max": "462", "rank": 2},
    ]
    (tmp_path / "Super Experts Report.json").write_text(json.dumps(rows))
    chosen = ExpertSet.parse(str(tmp_path / "Super Experts Report.json"))
    assert chosen.experts == ((2, 54), (8, "shared"))
    assert chosen.scores == (1424.0, 462.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the set is empty"),
        ([{"layer_index": 1}], "a field is missing"),
        ([{"layer_index": 1, "expert_index": "x", "output_max": 1}], "'x' is no expert"),
        ([{"layer_index": 1, "expert_index": 2, "output_max": 1}] * 2, "L1E2 is named twice"),
        ({"schema": "superexperts/profile/1"}, "expected a file of schema"),
        ("text", "expected a file of schema"),
    ],
)
def test_expert_files_that_cannot_be_read(value: Any, message: str) -> None:
    with pytest.raises((ExpertsError, DataError), match=message):
        ExpertSet.from_json(value)


def test_a_missing_expert_file_is_named() -> None:
    with pytest.raises(DataError, match=r"experts: cannot read nothing\.json"):
        ExpertSet.parse("nothing.json")


def test_key_names() -> None:
    assert [key_name((2, 54)), key_name((8, "shared"))] == ["L2E54", "L8shared"]
