"""vLLM and SGLang: the harness's classes over stand-ins that take what the packages take, and run the pocket model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoTokenizer

from superexperts.cli import main
from superexperts.core.errors import OptionError
from superexperts.evaluation import evaluate
from tests.engines.test_engines import answers, config
from tests.extraction.test_judge import write
from tests.support import local_engines
from tests.support.local_engines import ASKED, BUILT, CONTEXT, installed


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[str]:
    """The name of a package that stands in for the real one."""
    name = str(request.param)
    with installed(name, model):
        yield name


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    BUILT.clear()
    ASKED.clear()


@pytest.mark.parametrize("protocol", ["generative", "loglikelihood"])
def test_an_engine_answers_as_transformers_does(
    engine: str, protocol: str, tmp_path: Path, data: Path, checkpoint: Path, model: nn.Module
) -> None:
    """Prompts, BOS, stop text, length and log-probabilities; no code from the checkpoint; greedily."""
    how: dict[str, Any] = {"protocol": protocol, "num_fewshot": 1 if protocol == "loglikelihood" else None}
    how |= {"model": str(checkpoint), "limit": 4, "max_new_tokens": 16, "tasks": "gsm8k,boolq,arc_easy"}
    evaluate.run(config(tmp_path / "hf", data, **how))
    evaluate.run(config(tmp_path / engine, data, engine=engine, **how))
    [built] = BUILT
    assert built["trust_remote_code"] is False
    assert {ids[0] for ids in ASKED} == {AutoTokenizer.from_pretrained(checkpoint).bos_token_id}
    expected, found = answers(tmp_path / "hf"), answers(tmp_path / engine)
    assert list(found) == list(expected) == ["arc_easy", "boolq", "gsm8k"]
    for task, rows in expected.items():
        for one, two in zip(rows, found[task], strict=True):
            for (label, nats, length), other in zip(
                one.pop("loglikelihoods", []), two.pop("loglikelihoods", []), strict=True
            ):
                assert other == [label, pytest.approx(nats, abs=1e-3), length]
            assert one == two


@pytest.mark.parametrize("protocol", ["generative", "loglikelihood"])
def test_what_is_too_long_is_cut_behind_bos_and_counted(
    engine: str, protocol: str, tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    lines = (data / "boolq_validation.jsonl").read_text().splitlines()[:2]
    long = lines[0].replace('"passage": "', f'"passage": "{"the gate is open. " * 200}')
    (tmp_path / "boolq_validation.jsonl").write_text(f"{long}\n{lines[1]}\n")
    how: dict[str, Any] = {"protocol": protocol, "engine": engine, "tasks": "boolq", "max_new_tokens": 16}
    said = evaluate.run(config(tmp_path / "out", tmp_path, model=str(checkpoint), limit=2, **how))
    assert said["truncated"] == 1
    bos = AutoTokenizer.from_pretrained(checkpoint).bos_token_id
    assert max(map(len, ASKED)) == (CONTEXT - 16 if protocol == "generative" else CONTEXT - 1)
    assert {ids[0] for ids in ASKED} == {bos}


def test_a_judge_says_what_it_says_by_transformers(
    engine: str, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_engines, "CONTEXT", 2048)
    monkeypatch.setattr("superexperts.extraction.judge.MAX_NEW_TOKENS", 12)
    replies = []
    for name in ("hf", engine):
        folder = write(tmp_path / name, ["hm", "well, who knows"])
        assert (
            main(["extract", str(folder), "--judge", str(checkpoint), "--device", "cpu", "--judge-engine", name]) == 0
        )
        replies.append(sorted((folder / "judge.jsonl").read_text().splitlines()))
    assert replies[0] == replies[1]
    assert all(json.loads(line)["reply"] for line in replies[0])
    bos = AutoTokenizer.from_pretrained(checkpoint).bos_token_id
    assert [ids.count(bos) for ids in ASKED] == [1, 1]
    assert BUILT[0]["trust_remote_code"] is False


def test_no_room_for_a_prompt(engine: str, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=r"max_new_tokens: 256 leaves no room .* of 256 tokens; give less"):
        evaluate.run(config(tmp_path, data, model=str(checkpoint), engine=engine, max_new_tokens=256))
    assert not (tmp_path / "answers").exists()
