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
    Score(
        task="mmlu",
        variant="base",
        items=4,
        correct=2,
        unparsed=1,
        accuracy=0.5,
        low=0.15,
        high=0.85,
        cut=1,
        empty=1,
        refused=1,
    ),
]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: type(noun).__name__)
def test_json_round_trip(noun: Any) -> None:
    value = json.loads(json.dumps(noun.to_json()))
    assert type(noun).from_json(value) == noun
    assert type(noun).from_json({**value, "added_later": 1}) == noun
    del value[next(iter(value))]
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


@pytest.mark.parametrize("text", ["L2", "L2E", "2", "L2E54 L3E38 x", "L2E5,3,4", "LxE1", "", "8,-2", "L2Eshared"])
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
        ([{"layer_index": 1}], "expert_index is missing"),
        ([{"layer_index": 1, "expert_index": "x", "output_max": 1}], "'x' is not an expert"),
        ([{"layer_index": 1, "expert_index": 2, "output_max": 1}] * 2, "L1E2 is named twice"),
        ({"schema": "superexperts/profile/1"}, "expected a file of schema"),
        ("text", "expected a file of schema"),
        ({}, "found none"),
    ],
)
def test_expert_files_that_cannot_be_read(value: Any, message: str) -> None:
    with pytest.raises((ExpertsError, DataError), match=message):
        ExpertSet.from_json(value)


def test_a_missing_expert_file_is_named() -> None:
    with pytest.raises(DataError, match=r"experts: 'nothing\.json' does not exist"):
        ExpertSet.parse("nothing.json")


def test_key_names() -> None:
    assert [key_name((2, 54)), key_name((8, "shared"))] == ["L2E54", "L8shared"]


WRITTEN_BY_0_1_0: dict[type[Any], str] = {
    Profile: """{"schema": "superexperts/profile/1", "model": "pocket", "num_layers": 5, "depth": 0.75,
 "statistic": "all", "corpora": {"pocket": {"tokens": 16384, "experts": [{"layer": 1, "expert": 0, "tokens": 1248,
 "output_max": 13.653791427612305, "channel": 15, "position": 123, "token_id": 324,
 "first_token_output_max": 8.983195304870605, "input_max": 25.254169464111328, "input_channel": 3,
 "input_position": 123, "input_token_id": 324, "gate_sum": 297.71563822589815, "reap": 2.7726173656771564,
 "token_share": 0.0126953125, "gate_share": 0.01148428507317516}, {"layer": 1, "expert": "shared", "tokens": 0,
 "output_max": 0.0, "channel": null, "position": null, "token_id": null, "first_token_output_max": 0.0,
 "input_max": 0.0, "input_channel": null, "input_position": null, "input_token_id": null, "gate_sum": 0.0,
 "reap": 0.0, "token_share": null, "gate_share": null}], "stable": null}}}""",
    ExpertSet: """{"schema": "superexperts/experts/1", "model": "pocket", "rule": {"name": "super", "depth": 0.75,
 "corpora": ["pocket"]}, "experts": [{"layer": 3, "expert": 54, "score": 1502.715576171875},
 {"layer": 1, "expert": "shared", "score": null}]}""",
    Answer: """{"id": "mmlu-0", "prompt": "Question: Is it?\\nAnswer:", "response": " A", "gold": "A",
 "choices": [["A", "yes"], ["B", "no"]], "kind": "choice", "task": "mmlu", "variant": "base", "seed": 0,
 "subject": "anatomy", "num_fewshot": 5, "loglikelihoods": [["A", -1.5, 3], ["B", -2.0, 2]]}""",
    Extraction: '{"id": "mmlu-0", "extracted": "A", "how": "rule:statement", "correct": true}',
    Score: """{"task": "mmlu", "variant": "base", "items": 100, "correct": 59, "unparsed": 20, "accuracy": 0.59,
 "low": 0.4920143005341078, "high": 0.6813268697886348}""",
}


@pytest.mark.parametrize("kind", WRITTEN_BY_0_1_0, ids=lambda kind: kind.__name__)
def test_a_file_of_the_version_before_is_read_and_written_the_same(kind: Any) -> None:
    text = json.dumps(json.loads(WRITTEN_BY_0_1_0[kind]))
    assert json.dumps(kind.from_json(json.loads(text)).to_json()) == text


def answer(response: str, **more: Any) -> Answer:
    given: dict[str, Any] = {"prompt": "p", "gold": "A", "choices": (("A", "tin"),), "kind": "choice", "task": "mmlu"}
    return Answer(id="1", response=response, variant="base", seed=0, **(given | more))


@pytest.mark.parametrize(
    ("given", "parts", "ended"),
    [
        (answer("A"), ("", "A", True), None),
        (answer("<think>Tin?</think>A"), ("Tin?", "A", True), None),  # written before thoughts were split
        (answer("<think>Tin?"), ("Tin?", "", False), "cut"),
        (answer("Tin?", prompt="Which?\n<think>\n"), ("Tin?", "", False), "cut"),
        (answer("A", thoughts="Tin?", text="A", finish_reason="stop"), ("Tin?", "A", True), None),
        (answer("A, as", finish_reason="length"), ("", "A, as", True), "cut"),
        (answer("", thoughts="Tin?", text="", finish_reason="length"), ("Tin?", "", False), "cut"),
        (answer("", thoughts="It is tin.", text="", finish_reason="stop"), ("It is tin.", "", True), None),
        (answer("<think>Tin", thoughts="Tin", text="", finish_reason="stop"), ("Tin", "", False), "cut"),
        (answer(" \n"), ("", " \n", True), "empty"),
        (answer("", finish_reason="content_filter"), ("", "", True), "refused"),
    ],
)
def test_the_parts_of_a_response_and_how_it_ended(
    given: Answer, parts: tuple[str, str, bool], ended: str | None
) -> None:
    assert given.parts == parts
    assert given.ended(given.parts) == ended
    assert Answer.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_newer_fields_that_are_missing_take_their_defaults() -> None:
    value = json.loads(WRITTEN_BY_0_1_0[Profile])
    del value["depth"], value["corpora"]["pocket"]["stable"], value["corpora"]["pocket"]["experts"][0]["reap"]
    found = Profile.from_json(value)
    assert (found.depth, found.corpora["pocket"].stable, found.corpora["pocket"].experts[0].reap) == (1.0, None, 0.0)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Answer, {"kind": "essay"}, "answers: kind: 'essay' should be 'choice', 'number' or 'yesno'; evaluate again"),
        (Answer, {"response": 5}, "answers: response: 5 should be a valid string; evaluate again"),
        (Answer, {"gold": 3}, "answers: gold: 3 should be a valid string; evaluate again"),
        (Answer, {"choices": [["A"]]}, "answers: choices.0.1 is missing; evaluate again"),
        (Answer, {"task": "a\nb"}, "answers: 'a\\nb' is not a name of a benchmark or variant; rename it"),
        (Extraction, {"correct": "perhaps"}, "extractions: correct: 'perhaps' should be a valid boolean"),
        (Profile, {"corpora": {}}, "profile: it has no corpus; profile again"),
        (Profile, {"corpora": {"a": 1}}, "profile: corpora.a: 1 should be an object; profile again"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_a_field(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        kind.from_json(json.loads(WRITTEN_BY_0_1_0[kind]) | change)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="should be an object|found 'list'"):
        kind.from_json([])
