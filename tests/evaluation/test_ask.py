"""Which items are asked, and which answers of an earlier run stand."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from superexperts.benchmarks.base import Item
from superexperts.core.errors import OptionError, OutputError
from superexperts.core.stages import STAGE_VERSIONS
from superexperts.engines.harness import TransformersModel
from superexperts.engines.journal import Journal, open_journals
from superexperts.evaluation import evaluate
from superexperts.evaluation.ask import chosen_items
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.evaluation.opening import name_after


def _config(out: Path, data: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {"data_dir": data, "out": out, "max_new_tokens": 8, "device": "cpu", "tasks": "boolq"}
    settings["overwrite"] = True
    return EvaluateConfig(**settings | changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each batch had that the model was given."""
    batches: list[int] = []
    generate, score = TransformersModel._model_generate, TransformersModel._loglikelihood_tokens

    def generated(self: TransformersModel, context: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        batches.append(len(context))
        return generate(self, context, *arguments, **more)

    def scored(self: TransformersModel, requests: list[Any], **more: Any) -> Any:
        batches.append(len(requests))
        return score(self, requests, **more)

    monkeypatch.setattr(TransformersModel, "_model_generate", generated)
    monkeypatch.setattr(TransformersModel, "_loglikelihood_tokens", scored)
    return batches


def _items(*subjects: str | None) -> list[Item]:
    return [
        Item(id=str(number), body="?", choices=(), gold="1", kind="number", subject=subject)
        for number, subject in enumerate(subjects)
    ]


def test_which_items() -> None:
    five, many = _items(*[None] * 5), _items(*[None] * 1000)
    assert chosen_items("boolq", five, None) == [0, 1, 2, 3, 4]
    assert chosen_items("boolq", five, 2, first=True) == [0, 1]
    assert chosen_items("boolq", five, 9) == [0, 1, 2, 3, 4]
    ten, twenty = (chosen_items("boolq", many, limit) for limit in (10, 20))
    assert ten == sorted(ten) != list(range(10))
    assert len(set(twenty)) == 20
    assert set(ten) < set(twenty), "a larger sample holds the smaller one"
    assert chosen_items("boolq", many, 10) == ten
    assert chosen_items("boolq", many, 10, seed=1) != ten
    assert chosen_items("arc_easy", many, 10) != ten
    # Not only from the beginning: the sample's mean number is that of a draw from all.
    assert 300 < sum(chosen_items("boolq", many, 100)) / 100 < 700


def test_a_sample_is_spread_over_the_subjects() -> None:
    """Subjects come one after another in the file, as in MMLU; one is ten times as large as the others."""
    sizes = {f"s{number}": 100 for number in range(20)} | {"law": 1000}
    items = _items(*[subject for subject, size in sizes.items() for _ in range(size)])
    for limit in (30, 90, 300, 2999):
        numbers = chosen_items("mmlu", items, limit)
        assert len(numbers) == limit
        counts = Counter(items[number].subject for number in numbers)
        assert all(abs(counts[subject] - limit * size / len(items)) <= 1 for subject, size in sizes.items())
    small = chosen_items("mmlu", items, 30)
    assert {items[number].subject for number in small} == sizes.keys()
    assert set(small) < set(chosen_items("mmlu", items, 90))
    assert {items[number].subject for number in chosen_items("mmlu", items, 30, first=True)} == {"s0"}


def _ids(folder: Path, task: str = "boolq") -> list[str]:
    lines = (folder / "answers" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines]


def test_a_larger_limit_asks_only_what_is_new(
    tmp_path: Path, data: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(_config(tmp_path / "a", data, limit=5))
    evaluate.run(_config(tmp_path / "a", data, limit=9))
    assert asked == [5, 4]
    assert "5 answers of an earlier run are kept" in capsys.readouterr().err
    evaluate.run(_config(tmp_path / "b", data, limit=9))
    files = [(tmp_path / name / "answers" / "boolq.jsonl").read_text() for name in "ab"]
    assert files[0] == files[1]
    evaluate.run(_config(tmp_path / "a", data, limit=3))  # fewer: nothing is asked
    assert asked == [5, 4, 9]
    assert _ids(tmp_path / "a") == [f"boolq-{i}" for i in chosen_items("boolq", _items(*[None] * 200), 3)]
    evaluate.run(_config(tmp_path / "a", data, limit=3, tasks="boolq,arc_easy"))  # another benchmark beside it
    assert asked == [5, 4, 9, 3]
    evaluate.run(_config(tmp_path / "a", data, limit=4, limit_first=True))
    assert _ids(tmp_path / "a") == ["boolq-0", "boolq-1", "boolq-2", "boolq-3"]
    assert len(asked) == 5


def test_answers_of_the_version_before_are_kept_until_the_stage_version_is_raised(
    tmp_path: Path, data: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests of superexperts 0.1.0 have no version, and keys that depended on all source files."""
    monkeypatch.setitem(STAGE_VERSIONS, "evaluate", 1)
    evaluate.run(_config(tmp_path, data, limit=2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["version"]
    manifest |= {"key": "of all sources", "asked": {"boolq": "of all sources"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    evaluate.run(_config(tmp_path, data, limit=2))
    assert asked == [2]
    evaluate.run(_config(tmp_path, data, limit=3))
    assert asked == [2, 1]
    monkeypatch.setitem(STAGE_VERSIONS, "evaluate", STAGE_VERSIONS["evaluate"] + 1)
    evaluate.run(_config(tmp_path, data, limit=3))
    assert asked == [2, 1, 3]


def test_log_probabilities_are_kept_as_well(tmp_path: Path, data: Path, asked: list[int]) -> None:
    for limit in (3, 5):
        evaluate.run(_config(tmp_path / "a", data, limit=limit, protocol="loglikelihood"))
    assert asked == [6, 4]  # two choices each
    evaluate.run(_config(tmp_path / "b", data, limit=5, protocol="loglikelihood"))
    read = [(tmp_path / name / "answers" / "boolq.jsonl").read_text().splitlines() for name in "ab"]
    for one, other in zip(*(map(json.loads, lines) for lines in read), strict=True):
        pairs = zip(one.pop("loglikelihoods"), other.pop("loglikelihoods"), strict=True)
        assert all(a == [b[0], pytest.approx(b[1], abs=1e-5), b[2]] for a, b in pairs)  # other batches, other padding
        assert one == other


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 9},
        {"silence": "L1E11"},
        {"protocol": "loglikelihood", "num_fewshot": 1},
        {"variant": "other"},
        {"seed": 1},
        {"batch_size": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_anything_else_asks_all_again(
    change: dict[str, Any], tmp_path: Path, data: Path, asked: list[int]
) -> None:
    evaluate.run(_config(tmp_path, data, limit=2))
    evaluate.run(_config(tmp_path, data, limit=3, **change))
    assert sum(asked) == 2 + 3 * (2 if "protocol" in change else 1)


def test_another_prompt_model_or_a_changed_file_asks_all_again(
    tmp_path: Path, data: Path, checkpoint: Path, asked: list[int]
) -> None:
    rows = [json.loads(line) for line in (data / "boolq_validation.jsonl").read_text().splitlines()]
    mine = tmp_path / "data"
    mine.mkdir()

    def write(question: str) -> None:
        rows[0]["question"] = question
        (mine / "boolq_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("is it so")
    evaluate.run(_config(tmp_path / "a", mine, limit=2))
    evaluate.run(_config(tmp_path / "a", mine, limit=3))
    assert asked == [2, 1]
    write("is it not so")
    evaluate.run(_config(tmp_path / "a", mine, limit=4))
    assert asked == [2, 1, 4]
    evaluate.run(_config(tmp_path / "a", mine, limit=5, model=str(checkpoint)))
    assert asked == [2, 1, 4, 5]
    file = tmp_path / "a" / "answers" / "boolq.jsonl"
    file.write_text(file.read_text().replace('"response": "', '"response": "forged ', 1))
    evaluate.run(_config(tmp_path / "a", mine, limit=6, model=str(checkpoint)))
    assert asked == [2, 1, 4, 5, 6]
    assert "forged" not in file.read_text()


def test_another_harness_asks_all_again(
    tmp_path: Path, data: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The few-shot prompts are in its files."""
    evaluate.run(_config(tmp_path, data, limit=2))
    monkeypatch.setattr(evaluate, "versions", lambda: {"lm_eval": "0.0.0"})
    evaluate.run(_config(tmp_path, data, limit=2))
    assert asked == [2, 2]


def test_all_processes_journals_count(tmp_path: Path) -> None:
    """Of a run that was killed in two processes, what either kept is kept; other keys and benchmarks are not."""
    Journal(tmp_path / ".boolq.partial", "key").add({"a": "1"})
    Journal(tmp_path / ".boolq.1.partial", "key").add({"b": "2"})
    Journal(tmp_path / ".boolq.2.partial", "another").add({"c": "3"})
    Journal(tmp_path / ".mmlu.partial", "key").add({"d": "4"})
    journals = open_journals(tmp_path, {"boolq": "key"}, {"boolq": {"e": "5"}})
    assert journals["boolq"].answers == {"a": "1", "b": "2"}
    assert [path.name for path in tmp_path.iterdir()] == [".boolq.partial"]
    assert Journal(tmp_path / ".boolq.partial", "key").answers == {"a": "1", "b": "2"}
    assert open_journals(tmp_path, {"arc_easy": "k"}, {"arc_easy": {"e": "5"}})["arc_easy"].answers == {"e": "5"}


def test_finished_answers_are_not_lost_without_a_word(tmp_path: Path, data: Path, asked: list[int]) -> None:
    out = tmp_path / "out"
    evaluate.run(_config(out, data, limit=4, tasks="boolq,arc_easy"))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("max_new_tokens", {"max_new_tokens": 9}),
        ("silence", {"silence": "L1E3"}),
        ("tasks", {"tasks": "boolq"}),
        ("limit", {"limit": 3}),
        ("limit", {"limit_first": True}),
    ]
    for name, change in changes:
        settings = {"limit": 4, "tasks": "boolq,arc_easy", "overwrite": False} | change
        with pytest.raises(
            OutputError, match=f"out: .*out holds a finished result of `evaluate` with another {name}; "
        ):
            evaluate.run(_config(out, data, **settings))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    evaluate.run(_config(out, data, limit=5, tasks="boolq,arc_easy,gsm8k", overwrite=False))  # more, and nothing lost
    assert sum(asked) == 8 + 2 + 5


def test_replaced_answers_stay_until_the_new_ones_are_whole(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full after the first benchmark of the second run; the third run goes on."""
    out = tmp_path / "out"
    evaluate.run(_config(out, data, limit=2))
    old = (out / "answers" / "boolq.jsonl").read_bytes()
    add = Journal.add

    def full(self: Journal, answers: Any, *, sync: bool = True) -> None:
        if "arc_easy" in self.path.name:
            monkeypatch.setattr(Journal, "_append", no_room)
        add(self, answers, sync=sync)

    def no_room(self: Journal, value: Any, *, sync: bool = True) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    again: dict[str, Any] = {"limit": 3, "max_new_tokens": 9, "tasks": "boolq,arc_easy"}
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", full)
        patched.setattr(Journal, "_append", Journal._append)
        with pytest.raises(
            OutputError, match="No space left on device.; make room and evaluate again, which goes on af"
        ):
            evaluate.run(_config(out, data, **again))
        patched.undo()
    monkeypatch.undo()
    assert (out / ".earlier" / "boolq.jsonl").read_bytes() == old
    capsys.readouterr()
    evaluate.run(_config(out, data, **again, overwrite=False))
    said = capsys.readouterr().err
    assert "3 answers of an earlier run are kept" in said
    assert "other questions" not in said
    assert not (out / ".earlier").exists()
    assert len(_ids(out, "arc_easy")) == 3


def test_an_evaluation_is_named_after_its_adapter(tmp_path: Path) -> None:
    assert name_after(None) == "base"
    assert name_after(tmp_path / "lora-super" / "adapter") == "lora-super"
    assert name_after(tmp_path / "mine") == "mine"


def test_the_first_items_of_all_are_refused() -> None:
    with pytest.raises(OptionError, match="limit_first: does nothing when all items are asked; give limit"):
        EvaluateConfig(limit_first=True)
