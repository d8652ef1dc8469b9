"""Engines beside transformers: the same answers over HTTP, resume, and what a server may do wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from superexperts.cli import main
from superexperts.core.errors import OptionError
from superexperts.engines.journal import Journal
from superexperts.engines.server import request_url
from superexperts.evaluation import evaluate
from superexperts.evaluation.evaluate import EvaluateConfig
from tests.support.servers import free_port, scripted_server

TASKS = "gsm8k,boolq,mmlu"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, data: Path) -> dict[str, Any]:
    """The answers of the model in this process."""
    out = tmp_path_factory.mktemp("here")
    evaluate.run(config(out, data, str(checkpoint)))
    return answers(out)


def config(out: Path, data: Path, model: str = "name", **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {"model": model, "data_dir": data, "out": out, "tasks": TASKS, "limit": 6}
    return EvaluateConfig(**settings | {"max_new_tokens": 24, "device": "cpu"} | changes)


def served_config(out: Path, data: Path, url: str, **changes: Any) -> EvaluateConfig:
    return config(out, data, **{"engine": "api", "base_url": url, "retries": 0} | changes)


def answers(out: Path) -> dict[str, Any]:
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted((out / "answers").glob("*.jsonl"))
    }


@pytest.mark.parametrize("endpoint", ["", "/chat/completions"])
def test_a_real_server_answers_as_the_model_does_here(
    endpoint: str, tmp_path: Path, data: Path, checkpoint: Path, served: str, here: dict[str, Any]
) -> None:
    """Prompt, BOS, stop text and length are the same: so is every answer, by completions and as a chat.

    A chat has no stop text, and this server says of no answer that it was cut.
    """
    arguments = ["evaluate", str(checkpoint), "--engine", "api", "--base-url", served + endpoint, "--concurrency", "3"]
    options = ["--tasks", TASKS, "--limit", "6", "--max-new-tokens", "24", "--data-dir", str(data), "--json"]
    assert main([*arguments, *options, "--out", str(tmp_path)]) == 0
    found = answers(tmp_path)
    for task, rows in here.items():
        for one, other in zip(rows, found[task], strict=True):
            ends = (str(other.pop("finish_reason")), str(one["finish_reason"]))
            assert set(ends) <= {"stop", "length"}
            other["response"] = other["response"].split("\nQuestion:")[0]
            assert other | {"finish_reason": ends[1]} == one
    assert not list((tmp_path / "answers").glob(".*"))


def completion(_: str, body: dict[str, Any]) -> tuple[int, Any]:
    text = f" {len(body['prompt'])}\nQuestion: more"
    return 200, {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}


def test_what_is_sent_and_kept(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, the whole prompt, at most so many at a time; nothing is asked where all is done."""
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")

    def slowly(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/v1/completions"
        time.sleep(0.02)
        return completion(path, body)

    with scripted_server(slowly) as server:
        settings = served_config(tmp_path, data, server.base_url, concurrency=3, tasks="gsm8k", limit=20, seed=5)
        evaluate.run(settings)
        assert len(server.bodies) == 20
        assert 1 < server.most_at_once <= 3
        found = answers(tmp_path)["gsm8k"]
        assert {body["prompt"] for body in server.bodies} == {answer["prompt"] for answer in found}
        for body in server.bodies:
            asked = {"model": "name", "max_tokens": 24, "temperature": 0, "stop": ["\nQuestion:"], "seed": 5}
            assert {**body, "prompt": ""} == {**asked, "prompt": ""}
        assert [answer["response"] for answer in found] == [f" {len(answer['prompt'])}" for answer in found]
        evaluate.run(served_config(tmp_path, data, server.base_url, tasks="gsm8k", limit=20, seed=5, timeout=9))
        assert len(server.bodies) == 20
        replaced = {"model": "other", "overwrite": True}
        evaluate.run(served_config(tmp_path, data, server.base_url, tasks="gsm8k", limit=20, seed=5, **replaced))
        assert len(server.bodies) == 40
    assert all("very-secret" not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_a_server_that_breaks_off_is_asked_only_for_the_rest(tmp_path: Path, data: Path) -> None:
    good = 7

    def breaks(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return completion(path, body) if len(server.bodies) <= good else (503, {"error": "\x1b[31mgo away"})

    with scripted_server(breaks) as server:
        settings = served_config(tmp_path, data, server.base_url, concurrency=1, tasks="gsm8k,boolq")
        with pytest.raises(OptionError, match=r"answers 503 \('.*go away'\); .*; 5 of 6 prompts failed") as caught:
            evaluate.run(settings)
        assert "\x1b" not in str(caught.value)
        assert (tmp_path / "answers" / ".boolq.partial").read_text().count("answers") == 1
        server.bodies.clear()
        good = 100
        evaluate.run(settings)
        assert len(server.bodies) == 5  # one of boolq's six was answered
    assert all(row["response"] == f" {len(row['prompt'])}" for rows in answers(tmp_path).values() for row in rows)


def test_a_servers_answers_are_synced_now_and_then(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr("superexperts.engines.server.SYNC_EVERY", 3)
    monkeypatch.setattr(Journal, "add", lambda self, answers, *, sync=True: synced.append(sync))
    with scripted_server(completion) as server:
        evaluate.run(served_config(tmp_path, data, server.base_url, tasks="gsm8k", limit=7, concurrency=1))
    assert synced == [False, False, True, False, False, True, False]


def test_a_request_that_fails_is_made_again(tmp_path: Path, data: Path) -> None:
    def stumbles(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (500, b"") if len(server.bodies) == 1 else completion(path, body)

    with scripted_server(stumbles) as server:
        evaluate.run(served_config(tmp_path, data, server.base_url, tasks="gsm8k", limit=2, retries=1))
        assert len(server.bodies) == 3
    assert len(answers(tmp_path)["gsm8k"]) == 2


@pytest.mark.parametrize(
    ("reply", "endpoint", "said"),
    [
        ((404, {"error": "no such model"}), "", "answers 404 ('no such model'); check the URL, the server's name"),
        ((400, {"error": "no model x"}), "", "answers 400 ('no model x') to every prompt; check the server's name"),
        ((400, {"error": "prompt too long"}), "", "answers 400 ('prompt too long') to every prompt; lower --max-new"),
        ((401, {"error": {"message": "bad key"}}), "", "answers 401 ('bad key'); check the URL"),
        ((200, {"error": "busy"}), "", "answers 502 ('busy'); see its log"),
        ((200, {"error": {"code": 503, "message": "busy"}}), "/chat/completions", "answers 503 ('busy'); see its log"),
        ((200, {"message": "no route"}), "/chat/completions", "answers 502 ('no route'); see its log"),
        ((200, {}), "", "does not answer with a completion"),
        (
            (200, {"choices": []}),
            "",
            "answers 200 ('a reply without an answer') to every prompt; check the server's name",
        ),
        ((200, b"<html>"), "", "does not answer with a completion"),
        ((200, b"\xff"), "", "does not answer with a completion"),
        ((200, {"choices": [{"index": 0, "text": 3}]}), "", "does not answer with a completion"),
    ],
)
def test_a_bad_server_is_one_line(
    reply: Any, endpoint: str, said: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_server(lambda *_: reply) as server:
        arguments = ["evaluate", "name", "--engine", "api", "--base-url", server.base_url + endpoint, "--limit", "1"]
        options = ["--data-dir", str(data), "--tasks", "boolq", "--retries", "0", "--out", str(tmp_path / "out")]
        assert main([*arguments, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("superexperts: ")] == lines[-1:]
    assert f"--base-url: '{server.base_url}{endpoint or '/completions'}' {said}" in lines[-1]
    assert not list(tmp_path.rglob("boolq.jsonl"))


def test_no_server_and_a_slow_one(tmp_path: Path, data: Path) -> None:
    with pytest.raises(OptionError, match="cannot be reached .*; start the server or check the URL"):
        evaluate.run(served_config(tmp_path, data, f"http://127.0.0.1:{free_port()}/v1", tasks="boolq"))

    def sleeps(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.6)
        return completion(path, body)

    with (
        scripted_server(sleeps) as server,
        pytest.raises(OptionError, match="does not answer within 0.2 s; raise timeout"),
    ):
        evaluate.run(served_config(tmp_path, data, server.base_url, tasks="boolq", limit=1, timeout=0.2))


def test_an_answer_of_null_is_empty(tmp_path: Path, data: Path) -> None:
    reply = {"choices": [{"index": 0, "message": {"content": None}}]}
    with scripted_server(lambda *_: (200, reply)) as server:
        url = f"{server.base_url}/chat/completions"
        evaluate.run(served_config(tmp_path, data, url, tasks="boolq", limit=1))
    assert server.bodies[0]["messages"] == [{"role": "user", "content": answers(tmp_path)["boolq"][0]["prompt"]}]
    assert answers(tmp_path)["boolq"][0]["response"] == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "vllm"}, "engine: 'vllm' needs the package vllm, which is not installed; pip install vllm"),
        ({"engine": "sglang"}, "engine: 'sglang' needs the package sglang"),
        ({"engine": "api"}, "base_url: missing for engine api; give the server's URL"),
        ({"engine": "api", "base_url": "localhost:8000"}, "base_url: 'localhost:8000' is not a URL"),
        ({"engine": "api", "base_url": "http://me:secret@host/v1"}, "base_url: 'host/v1' holds a password"),
        ({"base_url": "http://host/v1"}, "base_url: 'http://host/v1' needs engine api, not hf; give that as well"),
        ({"engine": "vllm", "silence": "L1E1"}, "silence: 'L1E1' needs engine hf, not vllm"),
        ({"engine": "vllm", "adapter": Path("a")}, "adapter: 'a' needs engine hf, not vllm"),
        ({"engine": "sglang", "perplexity": "c4"}, "perplexity: 'c4' needs engine hf, not sglang"),
        ({"concurrency": 0}, "concurrency: 0 is not positive"),
        ({"timeout": 0}, "timeout: 0 is not positive"),
        ({"timeout": float("inf")}, "timeout: inf is not a finite number; give one"),
        ({"column": "body"}, "column: 'body' does nothing without perplexity"),
        ({"column": "body", "perplexity": "wikitext2"}, "column: 'body' has no effect on wikitext2; leave it out"),
        ({"retries": -1}, "retries: -1 is negative"),
    ],
)
def test_bad_options(changes: dict[str, Any], said: str, tmp_path: Path, data: Path) -> None:
    with pytest.raises(OptionError) as caught:
        evaluate.run(config(tmp_path, data, **{"model": "pocket", "tasks": "boolq"} | changes))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1/v1", "http://h:1/v1/completions"),
        ("http://h:1/v1/", "http://h:1/v1/completions"),
        ("http://h/v1/completions", "http://h/v1/completions"),
        ("https://h/v1/chat/completions/", "https://h/v1/chat/completions"),
        ("https://h/v1?api-version=1", "https://h/v1/completions?api-version=1"),
        ("https://h/x/chat/completions?api-version=1", "https://h/x/chat/completions?api-version=1"),
    ],
)
def test_request_url(url: str, expected: str) -> None:
    assert request_url(url) == expected
