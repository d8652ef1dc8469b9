"""Which items are asked, and which answers of an earlier run stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from superexperts.core.errors import OptionError
from superexperts.core.stages import STAGE_VERSIONS
from superexperts.engines.harness import TransformersModel
from superexperts.engines.journal import Journal, open_journals
from superexperts.evaluation import evaluate
from superexperts.evaluation.ask import chosen_items
from superexperts.evaluation.evaluate import EvaluateConfig


def _config(out: Path, data: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {"data_dir": data, "out": out, "max_new_tokens": 8, "device": "cpu", "tasks": "boolq"}
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


def test_which_items() -> None:
    assert chosen_items(5, None) == [0, 1, 2, 3, 4]
    assert chosen_items(5, 2) == [0, 1]
    assert chosen_items(5, 9) == [0, 1, 2, 3, 4]
    ten, twenty = (chosen_items(1000, limit, "0:boolq") for limit in (10, 20))
    assert ten == sorted(ten) != list(range(10))
    assert len(set(twenty)) == 20
    assert set(ten) < set(twenty), "a larger sample holds the smaller one"
    assert chosen_items(1000, 10, "0:boolq") == ten
    assert chosen_items(1000, 10, "1:boolq") != ten
    # Not only from the beginning: the sample's mean number is that of a draw from all.
    assert 300 < sum(chosen_items(1000, 100, "0:boolq")) / 100 < 700


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
    assert _ids(tmp_path / "a") == ["boolq-0", "boolq-1", "boolq-2"]
    evaluate.run(_config(tmp_path / "a", data, limit=3, tasks="boolq,arc_easy"))  # another benchmark beside it
    assert asked == [5, 4, 9, 3]
    evaluate.run(_config(tmp_path / "a", data, limit=4, shuffle=True))
    assert _ids(tmp_path / "a") == [f"boolq-{i}" for i in chosen_items(200, 4, "0:boolq")]
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


def test_a_sample_of_all_is_refused() -> None:
    with pytest.raises(OptionError, match="shuffle: does nothing when all items are asked; give limit"):
        EvaluateConfig(shuffle=True)
