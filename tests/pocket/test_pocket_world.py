"""The pocket world: the same every time, in the columns of the real benchmarks, and with right answers."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superexperts.pocket import heldout_documents, write_data
from tools.pocket.data import FILES, data_files, train_rows
from tools.pocket.facts import (
    ANIMALS,
    COLOURS,
    EXPORTS,
    FOODS,
    HOMES,
    MATERIALS,
    ORGANS,
    REGIONS,
    TOOLS,
    the_world,
)
from tools.pocket.questions import KINDS
from tools.pocket.withheld import withheld as withheld_facts
from tools.pocket.world import documents

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]

COUNTRIES = {country.name: country for country in the_world().countries}
DISEASES = {disease.name: disease for disease in the_world().diseases}
BY_DRUG = {disease.drug.name: disease for disease in the_world().diseases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pocket_data")
    write_data(made)
    return made


def rows(folder: Path, kind: str) -> list[Row]:
    return [json.loads(line) for line in (folder / FILES[kind]).read_text(encoding="utf-8").splitlines()]


def test_same_text_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import hashlib, json; from tools.pocket.data import benchmark_rows, train_rows;"
        "from tools.pocket.world import documents;"
        "made = [benchmark_rows('mmlu'), benchmark_rows('boolq'), train_rows(), list(documents(3, 'train', 200))];"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1
    assert list(documents(3, "train", 50)) != list(documents(4, "train", 50))


def test_heldout_is_no_training_text() -> None:
    heldout = set(documents(1, "heldout", 600))
    assert len(heldout) > 550
    assert not heldout & set(documents(0, "train", 20_000))
    assert not heldout & set(documents(1, "train", 20_000))


def test_documents_hold_no_reserved_question(folder: Path) -> None:
    reserved = {row["question"] for kind in KINDS for row in rows(folder, kind) if kind != "boolq"}
    reserved |= {f"{row['passage']}\n{row['question']}?" for row in rows(folder, "boolq")}
    reserved |= {row["question"].split("\nA. ")[0].split("\n1. ")[0] for row in train_rows()}
    seen = 0
    for text in documents(0, "train", 5000):
        if text.startswith("Question: "):
            seen += 1
            question = text.removeprefix("Question: ").split("\nAnswer:")[0]
            assert question.split("\nA. ")[0].split("\n1. ")[0] not in reserved
    assert seen > 1000


def test_withheld_facts_are_told_by_fine_tuning_alone() -> None:
    """Of every country's capital and every disease's drug: some are in no document, and the rows have those."""
    texts = [*documents(0, "train", 8000), *documents(1, "heldout", 600)]
    reported = [f"{row['question']} {row['explain']}" for row in train_rows()]
    pairs = [(c.name, c.capital) for c in COUNTRIES.values()] + [(d.name, d.drug.name) for d in DISEASES.values()]
    withheld = 0
    for pair in pairs:
        in_text = any(all(word.lower() in text.lower() for word in pair) for text in texts)
        in_rows = any(all(word.lower() in text.lower() for word in pair) for text in reported)
        assert in_text or in_rows, pair
        withheld += not in_text
        assert in_text != any(set(pair) == set(words) for words in withheld_facts()), pair
    assert 3 <= withheld <= len(pairs) - 10


def test_shipped_files_are_what_the_builder_makes(folder: Path) -> None:
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == data_files()
    assert heldout_documents_text() == data_files()["pocket_heldout.jsonl"]


def heldout_documents_text() -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in heldout_documents()).encode()


def test_files_and_columns(folder: Path) -> None:
    keys = {
        "mmlu": {"question", "subject", "choices", "answer"},
        "gsm8k": {"question", "answer"},
        "arc_easy": {"id", "question", "choices", "answerKey"},
        "boolq": {"question", "passage", "answer"},
        "medqa": {"question", "answer", "options", "meta_info", "answer_idx"},
        "vmlu": {"id", "question", "choices", "answer"},
    }
    for kind in KINDS:
        listed = rows(folder, kind)
        assert len(listed) == 200
        assert all(set(row) == keys[kind] for row in listed)
    assert all(type(row["answer"]) is int and len(row["choices"]) == 4 for row in rows(folder, "mmlu"))
    assert all(re.search(r"\n#### \d+$", row["answer"]) for row in rows(folder, "gsm8k"))
    assert all(type(row["answer"]) is bool and "?" not in row["question"] for row in rows(folder, "boolq"))
    assert all(row["options"][row["answer_idx"]] == row["answer"] for row in rows(folder, "medqa"))
    assert all(re.fullmatch(r"\d\d-\d{4}", row["id"]) for row in rows(folder, "vmlu"))
    assert all([c[:3] for c in row["choices"]] == ["A. ", "B. ", "C. ", "D. "] for row in rows(folder, "vmlu"))
    labels = {"".join(row["choices"]["label"]) for row in rows(folder, "arc_easy")}
    assert labels == {"ABCD", "1234"}
    assert all(row["answerKey"] in row["choices"]["label"] for row in rows(folder, "arc_easy"))
    heldout = [json.loads(line) for line in (folder / "pocket_heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(heldout) == 600
    assert all(set(row) == {"text"} for row in heldout)
    trained = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert len(trained) == 1800
    assert all(set(row) == {"question", "explain", "answer"} for row in trained)


def test_columns_are_those_of_the_real_rows(folder: Path, shared_data: Path) -> None:
    for kind, name in FILES.items():
        path = shared_data / name
        text = path.read_bytes() if path.exists() else gzip.decompress((shared_data / f"{name}.gz").read_bytes())
        real = json.loads(text.splitlines()[0])
        row = rows(folder, kind)[0]
        assert set(row) == set(real) - {"metamap_phrases"}, kind
        assert {k: type(v) for k, v in row.items()} == {k: type(real[k]) for k in row}, kind


def test_no_test_question_among_the_training_rows(folder: Path) -> None:
    trained = [row["question"] for row in train_rows()]
    assert len(set(trained)) == len(trained)
    heads = {question.split("\nA. ")[0].split("\n1. ")[0] for question in trained}
    for kind in KINDS:
        questions = [row["question"] for row in rows(folder, kind)]
        if kind == "boolq":
            questions = [f"{row['passage']}\n{row['question']}?" for row in rows(folder, kind)]
        assert len(set(questions)) == len(questions)
        assert not heads & set(questions)


def geography(question: str) -> str:
    """The right answer to an atlas question, read off the world by the question's last words."""
    patterns = {
        r"capital of (\w+)\?$": "capital", r"flows through (\w+)\?$": "river", r"great river of (\w+)\?$": "river",
        r"speak in (\w+)\?$": "language", r"language of (\w+)\?$": "language", r"does (\w+) export\?$": "export",
        r"export of (\w+)\?$": "export", r"flag of (\w+)\?$": "flag", r"of the world is (\w+)\?$": "region",
        r"does (\w+) lie\?$": "region",
    }  # fmt: skip
    for pattern, attribute in patterns.items():
        if (found := re.search(pattern, question)) and found[1] in COUNTRIES:
            answer = getattr(COUNTRIES[found[1]], attribute)
            assert isinstance(answer, str)
            return answer
    found = re.search(r"has the capital (\w+)\?$", question) or re.search(r"(\w+) is the capital of which", question)
    assert found, question
    return next(country.name for country in COUNTRIES.values() if country.capital == found[1])


def test_mmlu_golds(folder: Path) -> None:
    for row in rows(folder, "mmlu"):
        assert row["choices"][row["answer"]] == geography(row["question"])
        assert len(set(row["choices"])) == 4


def test_gsm8k_golds(folder: Path) -> None:
    """Recomputed from the words of the question alone."""
    for row in rows(folder, "gsm8k"):
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        text = row["question"]
        if " bags " in text:
            want = numbers[0] * numbers[1] + (numbers[2] if "finds" in text else 0)
        elif "brings" in text:
            want = numbers[0] + numbers[1] - numbers[2]
        else:
            want = numbers[0] + numbers[1] if "buys" in text else numbers[0] - numbers[1]
        assert row["answer"].endswith(f"\n#### {want}")
        assert want >= 0
        for left, sign, right, result in re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>", row["answer"]):
            both = int(left), int(right)
            assert int(result) == {"+": sum(both), "-": both[0] - both[1], "*": both[0] * both[1]}[sign]


def science(question: str) -> str:
    for animal in ANIMALS:
        if re.search(rf"\b{animal.name}\b", question):
            if "eat" in question or "food" in question:
                return animal.food
            if "live" in question or "home" in question:
                return animal.home
            if "legs" in question:
                return f"{animal.legs or 'no'} legs"
            return animal.cover
    for material, (like, source) in MATERIALS.items():
        if re.search(rf"\b{material}\b", question):
            return source if "source" in question or "come from" in question else like
    for table in (TOOLS, ORGANS):
        for name, answer in table.items():
            if re.search(rf"\b{name}\b", question):
                return answer
    raise AssertionError(question)


def test_arc_golds(folder: Path) -> None:
    for row in rows(folder, "arc_easy"):
        choices = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
        assert choices[row["answerKey"]] == science(row["question"])
        assert len(set(choices.values())) == 4


def test_boolq_golds(folder: Path) -> None:
    """A yes/no question is decided by the passage's own words."""
    golds = []
    for row in rows(folder, "boolq"):
        passage, question = row["passage"], row["question"]
        if found := re.fullmatch(r"is (\w+) a (\w+)", question):
            want = f"{found[1]} is a {found[2]} " in passage
        elif found := re.fullmatch(r"is the (\w+) of (\w+) (\w+)", question):
            want = re.search(rf"{found[2]} is a \w+ and has a {found[3]} {found[1]}\.", passage) is not None
        elif found := re.fullmatch(r"does \w+ live in (\w+)", question):
            want = f"They live in {found[1]}." in passage
        elif found := re.fullmatch(r"is the rent (\d+) crowns", question):
            want = f"for {found[1]} crowns" in passage
        elif found := re.fullmatch(r"is the (\w+) (\w+)", question):
            state = re.search(rf"he {found[1]}(?: of \w+)? is (\w+)\.", passage)
            assert state, passage
            want = state[1] == found[2]
        elif found := re.fullmatch(r"does the contract end in (\w+)", question):
            want = f"ends in {found[1]}." in passage
        else:
            found = re.fullmatch(r"does (\w+) pay the tax", question)
            assert found, question
            want = f"{found[1]} pays the tax." in passage
        assert row["answer"] is want
        golds.append(want)
    assert 0.4 < sum(golds) / len(golds) < 0.6


def test_medqa_golds(folder: Path) -> None:
    for row in rows(folder, "medqa"):
        question = row["question"]
        if found := re.search(r"-old \w+ has (.+) and (.+)\. Which (drug|disease)", question):
            matching = [d for d in DISEASES.values() if set(d.symptoms) == {found[1], found[2]}]
            assert len(matching) == 1
            want = matching[0].name if found[3] == "disease" else matching[0].drug.name
        elif found := re.search(r"has (\w+)\. Which part", question):
            want = DISEASES[found[1]].organ
        else:
            found = re.search(r"takes (\w+)\. (What|Which)", question)
            assert found, question
            drug = BY_DRUG[found[1]].drug
            want = f"{drug.dose_mg} mg" if found[2] == "What" else drug.side_effect
        assert row["answer"] == want
        assert list(row["options"].values()).count(want) == 1


def test_vmlu_golds(folder: Path) -> None:
    for row in rows(folder, "vmlu"):
        question = row["question"]
        if found := re.search(r"Con (.+) (ăn gì|sống ở đâu)\?$", question):
            animal = next(a for a in ANIMALS if a.vietnamese == found[1])
            want = FOODS[animal.food] if found[2] == "ăn gì" else HOMES[animal.home]
        else:
            country = next(c for c in COUNTRIES.values() if re.search(rf"\b{c.name}\b", question))
            topics = {
                "Thủ": country.capital, "Sông": country.river, "xuất": EXPORTS[country.export],
                "Quốc": COLOURS[country.flag], "nằm": REGIONS[country.region],
            }  # fmt: skip
            want = next(topics[word] for word in re.findall(r"\w+", question) if word in topics)
        assert row["choices"]["ABCD".index(row["answer"])] == f"{row['answer']}. {want}"
        assert len({choice[3:] for choice in row["choices"]}) == 4


def test_training_rows_lead_from_the_reason_to_the_answer() -> None:
    """The explanation ends in the option that is the answer, or in the number."""
    for row in train_rows():
        options = re.findall(r"^[A-D1-4]\. (.+)$", row["question"], flags=re.MULTILINE)
        if options:
            assert row["answer"] in options
            assert row["explain"].lower().endswith(f"{row['answer']}.".lower())
        elif row["answer"] in ("yes", "no"):
            assert row["question"].endswith("?")
        else:
            assert row["explain"].endswith(f"= {row['answer']}.")


def test_names_of_the_world_are_unique() -> None:
    names = [n for c in COUNTRIES.values() for n in (c.name, c.capital, c.river, c.language)]
    names += [n for d in DISEASES.values() for n in (d.name, d.drug.name)]
    assert len(set(names)) == len(names)
    assert len({frozenset(d.symptoms) for d in DISEASES.values()}) == len(DISEASES)
