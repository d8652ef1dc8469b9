"""From a study's files to results.json: every number against the files that it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superexperts.core.errors import DataError
from superexperts.core.runs import write_json, write_text
from superexperts.core.types import Answer, ExpertSet, Extraction
from superexperts.results.conclude import conclude
from superexperts.results.results import Results
from superexperts.results.statistics.paired import compare
from superexperts.results.statistics.single_run import detectable, holm, mcnemar, score
from superexperts.results.variants import Run
from superexperts.results.verdict import against_base

TASKS = {"mmlu": 120, "boolq": 40}
FACTS: dict[str, Any] = {
    "name": "x",
    "model": "pocket",
    "revision": None,
    "limit": 120,
    "protocol": "generative",
    "corpora": ["pocket"],
    "tasks": list(TASKS),
}


def run(variant: str, number: int = 0, experts: str | None = None, *, drawn: bool = False) -> Run:
    kind, _, target = variant.partition("-")
    return Run(
        name=variant if number == 0 else f"{variant}-s{number}",
        variant=variant,
        kind=kind,  # type: ignore[arg-type]
        target=target or None,
        seed=number,
        experts=experts,
        drawn=drawn,
    )


RUNS = (
    run("base"),
    run("prune-super", experts="super"),
    *(run("prune-random", k, "random" if k == 0 else f"random-s{k}", drawn=True) for k in range(3)),
    run("prune-mine", experts="mine"),
    *(run("lora-super", k, "super") for k in range(2)),
    run("lora-attention"),
)
SHARES = {
    "base": 0.7,
    "prune-super": 0.3,
    "prune-random": 0.7,
    "prune-mine": 0.6,
    "lora-super": 0.8,
    "lora-attention": 0.75,
}


def right(one: Run, task: str) -> Any:
    """Right or wrong; most items alike in all runs."""
    shared = np.random.default_rng([1, len(task)]).random(TASKS[task])
    own = np.random.default_rng([len(one.variant), one.seed, len(task)]).random(TASKS[task])
    return np.where(own < 0.2, own / 0.2, shared) < SHARES[one.variant]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    for number, stem in enumerate(("super", "random", "random-s1", "random-s2", "mine")):
        chosen = ExpertSet(model="pocket", rule={"name": "x"}, experts=((1, number), (2, 7)), scores=(None, None))
        write_json(out / "experts" / f"{stem}.json", chosen.to_json())
    for place, one in enumerate(RUNS):
        where, scores = out / "variants" / one.name, []
        for task in TASKS:
            names = [f"{task}-{number}" for number in range(TASKS[task])]
            rows = [
                Extraction(id=name, extracted="A" if found else None, how="rule:label", correct=bool(found))
                for name, found in zip(names, right(one, task), strict=True)
            ]
            answers = [
                Answer(id=name, prompt="?", response="A", gold="A", choices=(), kind="yesno", task=task,
                       variant=one.name, seed=0, subject=f"subject {number % 24}" if task == "mmlu" else None)
                for number, name in enumerate(names)
            ]  # fmt: skip
            if place % 2:  # the order of a file's lines means nothing
                rows.reverse()
            for kind, lines in (("extractions", rows), ("answers", answers)):
                text = "".join(json.dumps(line.to_json()) + "\n" for line in lines)  # type: ignore[attr-defined]
                write_text(where / kind / f"{task}.jsonl", text)
            scores.append(score(task, one.name, rows).to_json())
        write_json(where / "scores.json", {"scores": scores})
        write_json(where / "perplexity.json", {"perplexity": 5.0 + place, "interval": [4.0, 20.0]})
        if one.kind == "lora":
            write_json(where / "train" / "training.json", {"trainable_parameters": 99, "exposure": {"L1E0": 5 + place}})
    return out


@pytest.fixture(scope="module")
def value(folder: Path) -> dict[str, Any]:
    return conclude(folder, RUNS, **FACTS)


def table(variant: str, task: str | None = None) -> Any:
    tasks = list(TASKS) if task is None else [task]
    rows = [np.concatenate([right(one, name) for name in tasks]) for one in RUNS if one.variant == variant]
    return np.array(rows, dtype=float)


def test_variants_hold_their_runs(value: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in value["variants"]}
    assert list(rows) == list(SHARES)
    assert [one["name"] for one in rows["prune-random"]["runs"]] == [
        "prune-random",
        "prune-random-s1",
        "prune-random-s2",
    ]
    assert [one["experts"] for one in rows["prune-random"]["runs"]] == [[f"L1E{k}", "L2E7"] for k in (1, 2, 3)]
    assert {name for name, row in rows.items() if row["random"]} == {"prune-random", "lora-super", "lora-attention"}
    assert rows["lora-super"]["runs"][1]["exposure"] == {"L1E0": 12}
    assert rows["lora-super"]["perplexity"] == pytest.approx((11 + 12) / 2)
    assert rows["base"]["runs"][0]["experts"] is None
    for name, row in rows.items():
        for found in row["scores"]:
            answers = table(name, found["task"])
            assert (found["items"], found["runs"]) == (answers.shape[1], len(answers))
            assert found["correct"] == answers.sum() == found["items"] * found["runs"] - found["unparsed"]
            assert found["accuracy"] == pytest.approx(answers.mean())
            assert found["low"] < found["accuracy"] < found["high"]
            assert (found["clustered"] is None) == (found["task"] == "boolq")
        assert row["mean"] == pytest.approx(np.mean([found["accuracy"] for found in row["scores"]]))


def test_comparisons_and_families(value: dict[str, Any]) -> None:
    families: dict[str, list[dict[str, Any]]] = {}
    for row in value["comparisons"]:
        families.setdefault(row["family"], []).append(row)
        one, other = table(row["variant"], row["task"]), table(row["reference"], row["task"])
        assert row["n"] == one.shape[1]
        assert row["runs"] == [len(one), len(other)]
        assert row["difference"] == pytest.approx(one.mean() - other.mean())
        assert row["low"] < row["difference"] < row["high"]
        assert row["subjects"] == (None if row["task"] == "boolq" else 24)
        if row["runs"] == [1, 1] and row["task"] == "boolq":
            pair = mcnemar(list(other[0] > 0), list(one[0] > 0))
            assert (row["only_base"], row["only_variant"], row["p"]) == (pair.only_base, pair.only_variant, pair.p)
    assert [(row["variant"], row["reference"]) for row in families["control"]] == [
        ("prune-super", "prune-random"),
        ("prune-super", "prune-mine"),
        ("prune-mine", "prune-random"),
        ("lora-super", "lora-attention"),
    ]
    assert (len(families["base"]), len(families["benchmark"])) == (5, 10)
    for rows in families.values():
        assert [row["adjusted"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]))
    # base is the same whatever the seed; the only run of attention is not
    lone = next(row for row in families["control"] if row["reference"] == "lora-attention")
    taken = compare(table("lora-super"), table("lora-attention"), random=(True, False))
    assert lone["high"] - lone["low"] > 1.1 * (taken["high"] - taken["low"])


def test_the_value_is_readable_and_the_same_again(value: dict[str, Any], folder: Path) -> None:
    text = json.dumps(value, allow_nan=False)
    results = Results.from_json(json.loads(text))
    assert json.dumps(conclude(folder, RUNS, **FACTS)) == text
    assert str(folder) not in text
    said = {one.name: one.seeds for one in against_base(results)}
    assert [name for name, words in said.items() if words] == ["lora-attention"]


def test_a_study_without_super_experts_compares_its_own_set(folder: Path) -> None:
    runs = [one for one in RUNS if one.variant in ("base", "prune-random", "prune-mine")]
    found = conclude(folder, runs, **FACTS)["comparisons"]
    pairs = [(row["variant"], row["reference"]) for row in found if row["family"] == "control"]
    assert pairs == [("prune-mine", "prune-random")]
    assert conclude(folder, RUNS[:1], **FACTS)["comparisons"] == []


def test_answers_without_subjects_are_no_error(folder: Path, tmp_path: Path) -> None:
    for part in ("experts", "variants/base"):
        for file in (folder / part).rglob("*.json*"):
            if "answers" not in file.parts:
                write_text(tmp_path / file.relative_to(folder), file.read_text())
    found = conclude(tmp_path, RUNS[:1], **FACTS)
    assert [row["clustered"] for row in found["variants"][0]["scores"]] == [None, None]


def test_errors_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"boolq\.jsonl is missing|mmlu\.jsonl is missing"):
        conclude(tmp_path, RUNS[:1], **FACTS)
    with pytest.raises(DataError, match="are not listed one after another"):
        conclude(folder, [RUNS[0], RUNS[2], RUNS[1], RUNS[3]], **FACTS)
    for file in folder.rglob("*.json*"):
        write_text(tmp_path / file.relative_to(folder), file.read_text())
    lines = tmp_path / "variants" / "prune-super" / "extractions" / "boolq.jsonl"
    whole = lines.read_text().splitlines(keepends=True)
    write_text(lines, "".join(whole[1:]))
    with pytest.raises(DataError, match="boolq: 1 items are in base or in prune-super only, first 'boolq-39'"):
        conclude(tmp_path, RUNS, **FACTS)
    write_text(lines, "".join([*whole, whole[0]]))
    with pytest.raises(DataError, match="1 ids of prune-super occur twice"):
        conclude(tmp_path, RUNS, **FACTS)


def test_runs_that_hardly_differ_from_base_would_have_shown_a_small_difference() -> None:
    """Two made-up items keep the variance from 0; they must not stand for the items that a real difference needs."""
    base_RN = np.zeros((1, 600))
    base_RN[:, :350] = 1
    variant_RN = np.repeat(base_RN, 5, axis=0)
    variant_RN[0, 0] = 0
    variant_RN[3, 599] = 1
    row = compare(variant_RN, base_RN, None, tests=5, random=(True, False))
    single = detectable(2, 600, 5)
    assert row["difference"] == pytest.approx(0)
    assert single / 2 < row["detectable"] < 2 * single
