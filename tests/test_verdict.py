"""The words of the verdict follow the tests, and nothing but the tests."""

from __future__ import annotations

import pytest

from study_folder import CORRECT, TITLES, extractions, results_json
from superexperts.results import Results
from superexperts.stats import detectable, holm, mcnemar
from superexperts.verdict import against_base, against_controls, format_p, headline

CHOSEN = ("L1E2", "L2E5")


def test_against_base_words_and_intervals() -> None:
    found = {one.name: one for one in against_base(Results.from_json(results_json()))}
    assert found["prune-super"].effect == "down"
    assert found["prune-super"].words == "costs 43.3 points"  # 26 of 60 items lost
    assert found["prune-random"].effect == "none"
    assert found["prune-random"].words == "makes no detectable difference"
    assert found["lora-super"].words == "gains 21.7 points"  # 13 of 60 won
    assert found["prune-random"].interval.startswith("−")


def test_controls_are_compared_item_by_item() -> None:
    results = Results.from_json(results_json())
    found = against_controls(results, CHOSEN, {name: extractions(name) for name in TITLES})
    assert [(one.name, one.reference) for one in found] == [
        ("prune-super", "prune random experts"),
        ("lora-super", TITLES["lora-attention"]),
    ]

    def right(name: str) -> list[bool]:
        return [c == "+" for task in ("mmlu", "boolq") for c in CORRECT[name][task]]

    first = mcnemar(right("prune-random"), right("prune-super"))
    second = mcnemar(right("lora-attention"), right("lora-super"))
    assert [one.paired for one in found] == [first, second]
    assert [one.p for one in found] == holm([first.p, second.p])
    assert against_controls(results, ("L9E9",), {}) == []


def test_headline() -> None:
    results = Results.from_json(results_json())
    controls = against_controls(results, CHOSEN, {name: extractions(name) for name in TITLES})
    assert headline(results, controls) == [
        "Pruning super experts costs 43.3 points of accuracy; pruning random experts makes no detectable difference.",
        "LoRA gains 21.7 points; what it adapts makes no detectable difference.",
    ]
    assert headline(Results.from_json(results_json({"base": "baseline"})), []) == []


def test_headline_when_lora_changes_nothing() -> None:
    value = results_json({"base": "baseline", "lora-super": "LoRA on super experts"})
    base = next(iter(value["variants"]))
    same = mcnemar([True] * 60, [True] * 60).to_json()
    value["variants"][1] |= {"scores": base["scores"], "pooled": same, "paired": {"mmlu": same, "boolq": same}}
    assert headline(Results.from_json(value), []) == ["No LoRA variant differs detectably from the base model."]


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "p = 1"), (0.0004, "p < 0.001"), (0.0123, "p = 0.012"), (0.5, "p = 0.5"), (0.001, "p = 0.001")],
)
def test_format_p(p: float, text: str) -> None:
    assert format_p(p) == text


def test_headline_says_at_once_which_adapters_do_nothing() -> None:
    value = results_json()
    base = value["variants"][0]
    same = mcnemar([True] * 60, [True] * 60).to_json()
    for row in value["variants"]:
        if row["name"] in ("lora-super", "lora-random"):
            row |= {"scores": base["scores"], "pooled": same, "paired": {"mmlu": same, "boolq": same}}
    quiet = [row["title"] for row in value["variants"] if row["name"] in ("lora-super", "lora-random")]
    said = headline(Results.from_json(value), [])[1]
    assert said.startswith(f"{' and '.join(quiet)} make{'s' * (len(quiet) == 1)} no detectable difference; LoRA on")
    assert said.count("no detectable difference") == 1


def test_the_smallest_difference_that_would_have_been_seen() -> None:
    found = {one.name: one for one in against_base(Results.from_json(results_json()))}
    one = found["prune-random"].paired
    wanted = 100 * detectable(one.only_base + one.only_variant, one.n, len(found))
    assert float(found["prune-random"].detectable) == pytest.approx(wanted, abs=0.05)
