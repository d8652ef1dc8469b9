"""The words of the verdict follow the tests, and nothing but the tests."""

from __future__ import annotations

from typing import Any

import pytest

from superexperts.core.types import Answer
from superexperts.reports.tables import verdict_rows
from superexperts.results.edges import chance_of, edge_sentences, edges
from superexperts.results.results import Results
from superexperts.results.statistics.single_run import detectable, holm, mcnemar
from superexperts.results.variants import title_of
from superexperts.results.verdict import SINGLE_SEED, against_base, against_controls, format_p, headline, verdict
from tests.support.study_folder import CORRECT, TITLES, results_json


def test_against_base_words_and_intervals() -> None:
    found = {one.name: one for one in against_base(Results.from_json(results_json()))}
    assert found["prune-super"].effect == "down"
    assert found["prune-super"].predicate == "costs 43.3 points"  # 26 of 60 items lost
    assert found["prune-random"].effect == "none"
    assert found["prune-random"].predicate == "makes no detectable difference"
    assert found["lora-super"].predicate == "gains 21.7 points"  # 13 of 60 won
    assert found["prune-random"].interval.startswith("−")


def test_controls_are_compared_item_by_item() -> None:
    found = against_controls(Results.from_json(results_json()))
    assert [(one.name, one.reference) for one in found] == [
        ("prune-super", "prune random experts"),
        ("lora-super", TITLES["lora-attention"]),
    ]

    def right(name: str) -> list[bool]:
        return [c == "+" for task in ("mmlu", "boolq") for c in CORRECT[name][task]]

    first = mcnemar(right("prune-random"), right("prune-super"))
    second = mcnemar(right("lora-attention"), right("lora-super"))
    assert [(one.row.only_base, one.row.only_variant, one.row.p) for one in found] == [
        (pair.only_base, pair.only_variant, pair.p) for pair in (first, second)
    ]
    assert [one.p for one in found] == holm([first.p, second.p])


def test_headline() -> None:
    results = Results.from_json(results_json())
    attention = TITLES["lora-attention"]
    assert headline(results) == [
        "Pruning super experts costs 43.3 points of accuracy; pruning random experts makes no detectable difference.",
        f"LoRA gains 21.7 points; no difference between LoRA on super experts and {attention} is detected.",
        f"Prune random experts, LoRA on super experts and {attention} were run with {SINGLE_SEED}.",
    ]
    assert headline(Results.from_json(results_json({"base": "baseline"}))) == []


def test_headline_when_lora_changes_nothing() -> None:
    value = results_json({"base": "baseline", "lora-super": "LoRA on super experts"})
    for row in value["comparisons"]:
        row |= {"difference": 0.0, "p": 1.0, "adjusted": 1.0}
    assert headline(Results.from_json(value)) == [
        "No LoRA variant differs detectably from the base model.",
        f"LoRA on super experts was run with {SINGLE_SEED}.",
    ]


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "p = 1"), (0.0004, "p < 0.001"), (0.0123, "p = 0.012"), (0.5, "p = 0.5"), (0.001, "p = 0.001")],
)
def test_format_p(p: float, text: str) -> None:
    assert format_p(p) == text


def test_headline_says_at_once_which_adapters_do_nothing() -> None:
    value = results_json()
    for row in value["comparisons"]:
        if row["variant"] == "lora-super" and row["family"] != "control":
            row |= {"difference": 0.0, "p": 1.0, "adjusted": 1.0}
    value["comparisons"] = [row for row in value["comparisons"] if row["family"] != "control"]
    quiet = ["LoRA on super experts"]
    said = headline(Results.from_json(value))[1]
    assert said.startswith(f"{' and '.join(quiet)} make{'s' * (len(quiet) == 1)} no detectable difference; LoRA on")
    assert said.count("no detectable difference") == 1


def test_the_smallest_difference_that_would_have_been_seen() -> None:
    found = {one.name: one for one in against_base(Results.from_json(results_json()))}
    one = found["prune-random"].row
    expected = 100 * detectable(one.only_base + one.only_variant, one.n, len(found))
    assert float(found["prune-random"].detectable) == pytest.approx(expected, abs=0.05)


def with_rows(changes: dict[tuple[str, str], tuple[float, float]]) -> Results:
    """The study made by hand, in which some comparisons over all items came out otherwise: (difference, adjusted p)."""
    value = results_json()
    for row in value["comparisons"]:
        key = (row["variant"], row["reference"])
        if key in changes and row["task"] is None:
            row["difference"], row["adjusted"] = changes[key]
            row["detectable"] = 0.1
    return Results.from_json(value)


def test_headline_when_super_experts_are_the_better_ones() -> None:
    said = headline(
        with_rows(
            {
                ("prune-super", "base"): (0.02, 0.01),
                ("prune-random", "base"): (-0.03, 0.01),
                ("prune-super", "prune-random"): (0.05, 0.001),
                ("lora-super", "lora-attention"): (0.04, 0.001),
            }
        )
    )
    assert said[0] == "Pruning super experts gains 2.0 points of accuracy; pruning random experts costs 3.0 points."
    assert said[1].endswith('LoRA on super experts is 4.0 points above LoRA on <b>"attention"</b>.')


def test_headline_does_not_let_two_tests_against_base_stand_for_one_against_the_control() -> None:
    said = headline(with_rows({("prune-super", "base"): (-0.03, 0.04), ("prune-super", "prune-random"): (-0.03, 0.2)}))
    assert said[0] == (
        "Pruning super experts costs 3.0 points of accuracy; pruning random experts makes no detectable difference; "
        "compared directly, no difference between pruning super experts and pruning random experts is detected."
    )
    both = with_rows({("prune-random", "base"): (-0.02, 0.01), ("prune-super", "prune-random"): (-0.4, 0.001)})
    assert headline(both)[0].endswith("pruning super experts is 40.0 points below pruning random experts.")


def test_sentences() -> None:
    found = {one.name: one for one in against_base(Results.from_json(results_json()))}
    assert found["prune-super"].sentence.startswith("43.3 points lower, ")
    assert "seed" not in found["prune-super"].sentence  # nothing in it is random
    assert found["prune-random"].sentence == (
        f"no difference detected; one over 17.7 points would probably have been; {SINGLE_SEED}"
    )
    value = results_json()
    for row in value["comparisons"]:
        row |= {"adjusted": 1.0, "detectable": 1.0}
    assert (
        "with 60 items, no difference would probably have been detected"
        in against_base(Results.from_json(value))[0].sentence
    )
    tiny = against_base(with_rows({("prune-super", "base"): (-0.0004, 0.01)}))[0]
    assert tiny.predicate == "costs 0.040 points"


def blinded(**changes: object) -> Results:
    """The study made by hand, in which nothing over all items was detected."""
    value = results_json()
    for row in value["comparisons"]:
        if row["task"] is None:
            row |= {"difference": 0.004, "adjusted": 1.0, "detectable": 0.354} | changes
    return Results.from_json(value)


def test_a_study_that_could_have_seen_nothing_says_that_it_cannot_tell() -> None:
    few = blinded(test="seeds", runs=[2, 1])
    attention = TITLES["lora-attention"]
    assert against_base(few)[0].sentence == (
        "inconclusive: with 2 runs against 1, only a difference over 35.4 points would probably have been detected; "
        "use more seeds"
    )
    assert headline(few)[:2] == [
        "This study has too few seeds to tell what pruning super experts and pruning random experts do.",
        f"This study has too few seeds to tell what LoRA on super experts and {attention} do; this study cannot tell "
        f"whether LoRA on super experts differs from {attention}.",
    ]
    assert "use more items" in against_controls(blinded())[0].sentence
    assert "detect" not in " ".join(headline(blinded()))
    seen = blinded(detectable=0.2)
    assert headline(seen)[0] == "Pruning super experts or random experts makes no detectable difference."
    assert against_base(seen)[0].sentence.startswith("no difference detected; one over 20.0 points would")


def test_a_set_of_the_users_is_called_a_set() -> None:
    assert title_of("prune", "mine") == "prune set 'mine'"
    assert title_of("lora", "busy") == "LoRA on set 'busy'"
    assert title_of("lora", "attention") == "LoRA on attention"
    assert title_of("prune", "routed") == "prune most routed experts"


def test_what_a_control_was_not_given_alike_stands_beside_the_comparison() -> None:
    value = results_json()
    pruned, adapted = (row["test"] for row in verdict_rows(Results.from_json(value), "control"))
    assert "against" not in pruned + adapted
    runs = {row["name"]: row["runs"][0] for row in value["variants"]}
    runs["prune-random"]["experts"] = ["L1E0", "L3E1"]
    runs["lora-attention"]["trainable_parameters"] = 99_000
    pruned, adapted = (row["test"] for row in verdict_rows(Results.from_json(value), "control"))
    assert pruned.endswith(", experts in other layers")
    assert adapted.endswith(", 12,345 against 99,000 trainable parameters")
    runs["prune-random"]["experts"] = ["L1E0"]
    assert verdict_rows(Results.from_json(value), "control")[0]["test"].endswith(", 2 against 1 expert")
    assert "expert" not in verdict_rows(Results.from_json(value), "base")[0]["test"]


def at(value: dict[str, Any], task: str, **changes: Any) -> dict[str, Any]:
    """The results with other numbers of the base on a benchmark, and no difference anywhere."""
    [score] = [score for score in value["variants"][0]["scores"] if score["task"] == task]
    score |= {"chance": 0.25, **changes}
    for row in value["comparisons"]:
        row |= {"difference": 0.0, "p": 1.0, "adjusted": 1.0, "detectable": 0.09}
    return value


FLOOR: dict[str, Any] = {"accuracy": 0.0, "correct": 0, "low": 0.0, "high": 0.06}


def test_a_base_at_the_floor_everywhere_concludes_nothing() -> None:
    value = at(at(results_json(), "mmlu", **FLOOR, unparsed=29), "boolq", **FLOOR, unparsed=29)
    results = Results.from_json(value)
    assert all(one.inconclusive and "at the floor" in one.sentence for one in against_base(results))
    said = headline(results)
    assert "this study cannot tell what pruning super experts" in said[0].lower()
    assert "because the base is at the floor everywhere" in said[0]
    assert not any(
        "no detectable difference" in sentence or "would probably have been" in sentence for sentence in said
    )
    assert any(
        sentence.startswith("The base is at the floor on MMLU (0.0% right, guessing gives 25.0%") for sentence in said
    )


def test_one_benchmark_at_the_floor_leaves_the_others_standing() -> None:
    results = Results.from_json(at(results_json(), "mmlu", **FLOOR))
    said = headline(results)
    assert "makes no detectable difference" in said[0] or "make no detectable difference" in said[0]
    assert sum("at the floor on MMLU" in sentence for sentence in said) == 1
    rows = {row.task: verdict(results, row) for row in results.family("benchmark") if row.variant == "prune-super"}
    assert rows["mmlu"].blind
    assert not rows["boolq"].blind


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"accuracy": 0.3, "low": 0.2, "high": 0.4}, "floor"),  # no better than guessing
        ({"accuracy": 0.26, "low": 0.255, "high": 0.265}, "floor"),  # better by next to nothing
        ({"accuracy": 0.5, "low": 0.4, "high": 0.6, "unparsed": 30}, "floor"),  # 30 of 30 answers were not read
        ({"accuracy": 0.01, "low": 0.004, "high": 0.02, "chance": 0.0}, "floor"),
        ({"accuracy": 0.12, "low": 0.1, "high": 0.14, "chance": 0.0}, None),
        ({"accuracy": 0.5, "low": 0.4, "high": 0.6}, None),
        ({"accuracy": 0.99, "low": 0.97, "high": 1.0}, "ceiling"),
        ({"accuracy": 0.3, "low": 0.2, "high": 0.4, "chance": None}, None),  # results of an earlier version
    ],
)
def test_where_the_base_is(changes: dict[str, Any], where: str | None) -> None:
    results = Results.from_json(at(results_json(), "mmlu", **{"unparsed": 0, **changes}))
    assert edges(results).get("mmlu") == where
    assert len(edge_sentences(results)) == (where is not None)


def test_chance() -> None:
    def answer(kind: Any, gold: str | None, choices: int = 0) -> Answer:
        labels = tuple((label, "x") for label in "ABCDE"[:choices])
        more: dict[str, Any] = {"prompt": "", "response": "", "task": "t", "variant": "base", "seed": 0}
        return Answer(id="i", gold=gold, choices=labels, kind=kind, **more)

    assert chance_of([answer("choice", "A", 4), answer("choice", "B", 5)]) == pytest.approx((1 / 4 + 1 / 5) / 2)
    assert chance_of([answer("yesno", gold) for gold in ("yes", "yes", "no")]) == pytest.approx(2 / 3)
    assert chance_of([answer("number", "5")]) == 0
    assert chance_of([answer("choice", None, 4)]) is None
