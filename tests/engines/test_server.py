"""What servers do besides answering: refuse a prompt or a parameter, limit the rate, think, and say why they end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superexperts.benchmarks.base import prompt
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.cli import main
from superexperts.core.errors import OptionError
from superexperts.engines import client
from superexperts.engines.problems import problem_in, refused_parameter
from superexperts.engines.replies import Generated, Reply, Request, make_reply, read_choice
from superexperts.evaluation import evaluate
from tests.engines.test_engines import answers, served_config
from tests.support.servers import Reply as Sent
from tests.support.servers import said, scripted_server


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited; it does not."""
    waited: list[float] = []
    now = [0.0]

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    return waited


def ask(out: Path, data: Path, reply: Callable[[dict[str, Any], int], Sent], **changes: Any) -> tuple[Any, list[Any]]:
    """(what `evaluate` returns, the bodies that a chat server was sent); `reply` gets the number of the prompt."""
    order: dict[str, int] = {}
    lock = threading.Lock()

    def numbered(_: str, body: dict[str, Any]) -> Sent:
        with lock:
            number = order.setdefault(json.dumps(body["messages"]), len(order))
        return reply(body, number)

    with scripted_server(numbered) as server:
        url = f"{server.base_url}/chat/completions"
        settings = {"tasks": "boolq", "limit": 4, "concurrency": 1, "retries": 1, **changes}
        return evaluate.run(served_config(out, data, url, **settings)), server.bodies


def refusal(status: int = 400, **error: Any) -> Sent:
    return status, {"error": {"message": "The prompt was blocked", "code": "content_filter"} | error}


@pytest.mark.parametrize(
    ("sent", "finish"),
    [
        (refusal(), "content_filter"),
        (refusal(code="invalid_request", message="maximum context length is 8 tokens"), "error"),
        (refusal(status=422, code=None, message="cannot do this one"), "error"),
        ((200, {"error": {"code": 403, "message": "flagged by moderation"}}), "content_filter"),
    ],
)
def test_a_refused_prompt_is_marked_and_the_rest_is_kept(
    sent: Sent, finish: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, bodies = ask(tmp_path, data, lambda _, number: sent if number == 1 else said("yes"))
    rows = answers(tmp_path)["boolq"]
    assert [row["response"] for row in rows] == ["yes", "", "yes", "yes"]
    assert rows[1]["finish_reason"] == finish
    assert result["ended"] == {"boolq": {"refused": 1}}
    assert len(bodies) == 4
    shown = capsys.readouterr().err
    assert f"the server refused 1 prompts: {rows[1]['id']}: 4" in shown
    assert "of 4 answers 1 were refused or filtered" in shown
    assert main(["extract", str(tmp_path), "--json"]) == 0


def test_a_refused_prompt_is_asked_again_by_a_run_that_asks_more(tmp_path: Path, data: Path) -> None:
    refuses = True

    def reply(_: str, body: dict[str, Any]) -> Sent:
        return refusal(code="", message="cannot") if refuses and len(server.bodies) == 1 else said("no")

    with scripted_server(reply) as server:
        settings = {"tasks": "boolq", "concurrency": 1}
        url = f"{server.base_url}/chat/completions"
        evaluate.run(served_config(tmp_path, data, url, limit=3, **settings))
        assert [row["response"] for row in answers(tmp_path)["boolq"]] == ["", "no", "no"]
        refuses = False
        evaluate.run(served_config(tmp_path, data, url, limit=4, **settings))
        assert [row["response"] for row in answers(tmp_path)["boolq"]] == ["no"] * 4
        assert len(server.bodies) == 3 + 2


def test_a_server_that_refuses_everything_is_asked_a_few_times(tmp_path: Path, data: Path) -> None:
    count: list[int] = []

    def refuse(*_: Any) -> Sent:
        count.append(1)
        return refusal(code="", message="no model x here")

    with pytest.raises(OptionError, match=r"answers 400 \('no model x here'\) to every prompt"):
        ask(tmp_path, data, refuse, limit=50)
    assert len(count) == client.IN_A_ROW


def test_an_error_inside_a_200_is_tried_again_and_never_an_answer(tmp_path: Path, data: Path) -> None:
    inside = [
        (200, {"error": {"code": 502, "message": "Provider returned error"}}),
        (200, {"choices": [{"finish_reason": "error", "error": {"code": 502}, "message": {"content": ""}}]}),
        (200, {"object": "error", "message": "internal error"}),
    ]

    def reply(_: Any, number: int) -> Sent:
        return inside.pop() if inside else said("yes")

    _, bodies = ask(tmp_path, data, reply, retries=3)
    assert [row["response"] for row in answers(tmp_path)["boolq"]] == ["yes"] * 4
    assert len(bodies) == 4 + 3


def test_what_fails_for_good_is_an_error_and_the_rest_is_kept(tmp_path: Path, data: Path) -> None:
    with pytest.raises(OptionError, match=r"answers 500 \('oops'\); .*; 1 of 4 prompts failed"):
        ask(tmp_path, data, lambda _, number: (500, {"error": "oops"}) if number == 2 else said("yes"))
    assert (tmp_path / "answers" / ".boolq.partial").read_text().count('"yes"') == 3
    assert not (tmp_path / "answers" / "boolq.jsonl").exists()


@pytest.mark.parametrize(
    ("parameter", "error", "then"),
    [
        (
            "max_tokens",
            {"param": "max_tokens", "message": "Use 'max_completion_tokens' instead."},
            "max_completion_tokens",
        ),
        ("max_tokens", {"message": "Unsupported parameter: 'max_tokens' is not supported"}, "max_completion_tokens"),
        ("temperature", {"message": "Unsupported value: temperature does not support 0; only the default"}, None),
        ("seed", {"message": "Extra inputs are not permitted: seed"}, None),
    ],
)
def test_a_refused_parameter_is_learnt_once_and_said_once(
    parameter: str, error: dict[str, Any], then: str | None, tmp_path: Path, data: Path, capsys: Any
) -> None:
    def reply(body: dict[str, Any], _: int) -> Sent:
        return (400, {"error": error}) if parameter in body else said("yes")

    _, bodies = ask(tmp_path, data, reply)
    assert [parameter in body for body in bodies] == [True, False, False, False, False]
    assert then is None or all(body[then] == 24 for body in bodies[1:])
    assert capsys.readouterr().err.count(f"the server does not take {parameter}") == 1


def test_a_parameter_in_the_way_of_fastapi(tmp_path: Path, data: Path) -> None:
    detail = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
    _, bodies = ask(tmp_path, data, lambda body, _: (422, {"detail": detail}) if "seed" in body else said("yes"))
    assert len(bodies) == 5
    assert [row["response"] for row in answers(tmp_path)["boolq"]] == ["yes"] * 4


def test_a_prompt_too_long_is_not_a_refused_parameter() -> None:
    text = "max_tokens is too large: 512. This model's maximum context length is 256 tokens"
    problem = problem_in(400, {}, json.dumps({"error": {"message": text, "param": "max_tokens"}}).encode())
    assert problem is not None
    assert problem.too_long
    assert refused_parameter(problem, ["max_tokens", "seed"]) is None


def test_a_limit_on_the_rate_is_waited_for(tmp_path: Path, data: Path, waits: list[float], capsys: Any) -> None:
    """As long as the server says, however few retries are allowed."""
    left = [2]

    def reply(*_: Any) -> Sent:
        left[0] -= 1
        return (
            (429, {"error": {"message": "Too many requests"}}, {"Retry-After": "20"}) if left[0] >= 0 else said("yes")
        )

    _, bodies = ask(tmp_path, data, reply, retries=0)
    assert waits == [20, 20]
    assert len(bodies) == 6
    assert capsys.readouterr().err.count("limits the rate of requests: 429 ('Too many requests'); waiting 20 s") == 1


def test_a_limit_without_a_time_is_waited_for_over_a_minute(tmp_path: Path, data: Path, waits: list[float]) -> None:
    def reply(*_: Any) -> Sent:
        return said("yes") if sum(waits) >= 60 else (429, b"slow down")

    ask(tmp_path, data, reply, retries=0)
    assert waits == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}])
def test_each_limit_is_waited_for_from_the_beginning(
    headers: dict[str, str], tmp_path: Path, data: Path, waits: list[float], capsys: Any
) -> None:
    """Three requests are refused in front of each answer: a limit per second must not cost a minute each time."""
    count = iter(range(100))

    def reply(*_: Any) -> Sent:
        return said("yes") if next(count) % 4 == 3 else (429, b"slow down", headers)

    ask(tmp_path, data, reply, retries=0)
    assert waits == [1, 2, 4] * 4
    assert capsys.readouterr().err.count("limits the rate") == 1


def test_an_unreadable_reply_among_answers_is_no_reason_for_another_server(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        OptionError, match=r"completion \(JSONDecodeError\); see its log, .* kept; 1 of 4 prompts failed"
    ):
        ask(tmp_path, data, lambda _, number: (200, b'{"choices": [{"mess') if number == 2 else said("yes"))
    page = b"<html><head><style>a{}</style><title>Blocked</title></head><body>by the gateway</body></html>"
    with pytest.raises(OptionError, match=r"answers 403 \('Blocked by the gateway'\); check the URL"):
        ask(tmp_path, data, lambda *_: (403, page))


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "86400"}])
def test_a_limit_that_does_not_end(headers: dict[str, str], tmp_path: Path, data: Path) -> None:
    with pytest.raises(OptionError, match=r"limits the rate of requests, .*429 \('slow down'\); lower concurrency"):
        ask(tmp_path, data, lambda *_: (429, b"slow down", headers), retries=0)


def test_no_credit_is_not_waited_for(tmp_path: Path, data: Path, waits: list[float]) -> None:
    error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
    with pytest.raises(OptionError, match=r"answers 429 \('You exceeded your current quota'\)"):
        ask(tmp_path, data, lambda *_: (429, {"error": error}))
    assert not waits


def test_the_key_is_in_no_message(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    with pytest.raises(OptionError, match=r"bad key \*\*\*") as caught:
        ask(tmp_path, data, lambda *_: (401, {"error": {"message": "bad key very-secret"}}))
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("sent", "response", "thoughts", "text"),
    [
        (said("<think>\nNo? Yes.\nQuestion: x\n</think>\n\nyes"), None, "No? Yes.\nQuestion: x", "yes"),
        (said("yes", reasoning_content="No? Yes."), "yes", "No? Yes.", "yes"),
        (said("yes", reasoning="No? Yes.", reasoning_content="No? Yes."), "yes", "No? Yes.", "yes"),
        (said([{"type": "thinking", "thinking": [{"type": "text", "text": "No?"}]}, {"type": "text", "text": "yes"}]),
         "yes", "No?", "yes"),
        (said(None, "length", reasoning_content="No? Y"), "", "No? Y", ""),
        (said("yes"), "yes", None, None),
    ],
)  # fmt: skip
def test_thoughts_are_a_part_of_an_answer(
    sent: Sent, response: str | None, thoughts: str | None, text: str | None, tmp_path: Path, data: Path
) -> None:
    _, bodies = ask(tmp_path, data, lambda *_: sent, limit=1)
    [row] = answers(tmp_path)["boolq"]
    assert (row.get("thoughts"), row.get("text")) == (thoughts, text)
    assert response is None or row["response"] == response
    assert "stop" not in bodies[0]


def test_cut_and_empty_answers_are_said(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(_: Any, number: int) -> Sent:
        cut = said(None, "length", reasoning_content="hm") if number < 2 else said("To solve this", "length")
        return said("") if number == 3 else cut

    result, _ = ask(tmp_path, data, reply)
    assert result["ended"] == {"boolq": {"cut": 3, "silent": 2, "empty": 1}}
    err = capsys.readouterr().err
    assert "of 4 answers 3 were cut at the limit of new tokens, 2 of them before any answer" in err
    assert "1 are empty" in err


def test_a_stop_text_that_cut_thoughts_is_not_sent_again(tmp_path: Path, data: Path) -> None:
    def reply(_: str, body: dict[str, Any]) -> Sent:
        whole = "<think>\nLet me restate.\nQuestion: so?\n</think> yes\nQuestion: more"
        text = whole.split("\nQuestion:")[0] if "stop" in body else whole
        return 200, {"choices": [{"index": 0, "finish_reason": "stop", "text": text}]}

    with scripted_server(reply) as server:
        evaluate.run(served_config(tmp_path, data, server.base_url, tasks="boolq", limit=2))
        assert sorted("stop" in body for body in server.bodies) == [False, False, True, True]
    for row in answers(tmp_path)["boolq"]:
        assert row["thoughts"] == "Let me restate.\nQuestion: so?"
        assert row["text"] == "yes"
        assert row["response"].endswith("</think> yes")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "refusal": "I cannot"}, Generated("I cannot", "refusal")),
        ({"content": None, "tool_calls": [{"function": {"arguments": '{"answer": "C"}'}}]},
         Generated('{"answer": "C"}', "stop")),
        ({"content": [{"type": "output_text", "text": "a"}, {"type": "text", "text": "b"}]}, Generated("ab", "stop")),
        ({"content": "x", "reasoning_details": [{"text": "y"}, {"summary": "z"}]}, Generated("x", "stop", "yz")),
    ],
)  # fmt: skip
def test_forms_of_a_reply(message: dict[str, Any], expected: Generated) -> None:
    assert read_choice({"choices": [{"finish_reason": "stop", "message": message}]}) == expected


def test_a_reply_in_the_journal_comes_back() -> None:
    request = Request(prompt="p", max_new_tokens=3)
    for generated in (Generated("x"), Generated("x", "stop"), Generated("<think>a</think>b", "length")):
        reply = make_reply(generated, request)
        assert Reply.from_given(json.loads(json.dumps(reply.to_given()))) == reply


BODY = ["model", "messages", "max_tokens", "temperature", "seed", "stop"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"error": {"message": "This model does not support the parameter temperature."}}, "temperature"),
        ({"code": "invalid argument", "error": "Argument not supported on this model: stop"}, "stop"),
        ({"error": {"message": "property 'seed' is unsupported", "type": "invalid_request_error"}}, "seed"),
        ({"object": "error", "message": {"detail": [{"loc": ["body", "seed"], "msg": "not permitted"}]}}, "seed"),
        ({"detail": [{"type": "list_type", "loc": ["body", "stop", "list[str]"], "msg": "a list"}]}, "stop"),
        ([{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}], "seed"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": "unsupported: max_tokens"}}},
         "max_tokens"),
        ({"error": "Input validation error: `temperature` must be strictly positive"}, "temperature"),
        ({"error": {"message": "no such model", "param": "model"}}, None),
        ({"error": {"message": "your question about the stop words", "type": "invalid_request_error"}}, None),
        ({"error": {"message": "max_tokens is too large: 32768. This model supports at most 16384 completion tokens",
                    "param": "max_tokens"}}, None),
        ({"error": {"message": "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"}}, None),
    ],
)  # fmt: skip
def test_which_parameter_a_provider_means(body: Any, name: str | None) -> None:
    """In the forms of OpenAI, xAI, Groq, Mistral, vLLM, Gemini, OpenRouter, TGI, Anthropic and DeepSeek."""
    problem = problem_in(400, {}, json.dumps(body).encode())
    assert problem is not None
    assert refused_parameter(problem, BODY) == name
    assert problem.too_long == ("max_tokens" in str(problem) and name is None)


def test_parameters_refused_one_after_the_other(tmp_path: Path, data: Path, capsys: Any) -> None:
    def reply(body: dict[str, Any], _: int) -> Sent:
        for name in ("temperature", "seed", "max_tokens"):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model"}}
        return said("yes")

    _, bodies = ask(tmp_path, data, reply, concurrency=4)
    assert set(bodies[-1]) == {"model", "messages", "max_completion_tokens"}
    assert capsys.readouterr().err.count("the server does not take") == 3


@pytest.mark.parametrize(
    ("settings", "message", "advice"),
    [
        ({"thinking": "off"}, "Unrecognized request argument supplied: chat_template_kwargs", "leave out thinking"),
        ({}, "max_tokens is too large: 24. This model supports at most 16 completion tokens", "lower max_new_tokens"),
    ],
)
def test_what_cannot_be_left_out_names_its_setting(
    settings: dict[str, Any], message: str, advice: str, tmp_path: Path, data: Path
) -> None:
    with pytest.raises(OptionError, match=f"to every prompt; {advice}"):
        ask(tmp_path, data, lambda *_: (400, {"error": {"message": message}}), **settings)


@pytest.mark.parametrize(
    "sent",
    [
        (200, {"choices": []}),
        (200, {"choices": None}),
        (200, {"choices": [{"finish_reason": "stop", "message": None}]}),
    ],
)
def test_a_prompt_that_always_gets_nothing_is_marked(sent: Sent, tmp_path: Path, data: Path) -> None:
    result, bodies = ask(tmp_path, data, lambda _, number: sent if number == 2 else said("yes"), retries=2)
    assert [row["finish_reason"] for row in answers(tmp_path)["boolq"]] == ["stop", "stop", "error", "stop"]
    assert result["ended"] == {"boolq": {"refused": 1}}
    assert len(bodies) == 4 + 2


@pytest.mark.parametrize("reason", ["error", "abort", "insufficient_system_resource"])
def test_half_a_reply_is_asked_again(reason: str, tmp_path: Path, data: Path) -> None:
    left = [1]

    def reply(*_: Any) -> Sent:
        return said("no, that is", reason) if left and left.pop() else said("yes")

    _, bodies = ask(tmp_path, data, reply)
    assert [row["response"] for row in answers(tmp_path)["boolq"]] == ["yes"] * 4
    assert len(bodies) == 5


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"finish_reason": "content_filter"}, Generated("", "content_filter")),
        ({"finish_reason": "content_filter", "message": None}, Generated("", "content_filter")),
        ({"finish_reason": "SAFETY", "message": {"content": ""}}, Generated("", "content_filter")),
        ({"finish_reason": "length", "message": {"role": "assistant"}}, Generated("", "length")),
        ({"finish_reason": "MAX_TOKENS", "message": {"content": "a"}}, Generated("a", "length")),
        ({"finish_reason": "end_turn", "message": {"content": "a"}}, Generated("a", "stop")),
        ({"finish_reason": "stop", "message": {"content": [{"type": "refusal", "refusal": "No."}]}},
         Generated("No.", "refusal")),
    ],
)  # fmt: skip
def test_why_a_reply_ends(choice: dict[str, Any], expected: Generated) -> None:
    body = {"choices": [choice]}
    assert problem_in(200, {}, json.dumps(body).encode()) is None
    assert read_choice(body) == expected


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Rate limit reached: Limit 30000, Used 29000. Please try again in 2.5s.", 2.5),
        ("Please try again in 1m12s.", 72),
        ("try again in 250ms", 0.25),
        ("Please retry after 2 minutes", 120),
        ("You exceeded your current quota, please check your billing details. Please retry in 34.07s.", 34.07),
        ("Too many requests, try again later", None),
    ],
)
def test_a_time_to_wait_in_words(message: str, seconds: float | None) -> None:
    problem = problem_in(429, {}, json.dumps({"error": {"message": message}}).encode())
    assert problem is not None
    assert problem.retry_after == seconds
    assert problem.kind == "rate"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ({"Retry-After": "2.5"}, 2.5),
        ({"retry-after-ms": "500"}, 0.5),
        ({"Retry-After": "x"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_when_to_come_back(header: dict[str, str], seconds: float | None) -> None:
    problem = problem_in(503, header, b"later")
    assert problem is not None
    assert problem.retry_after == seconds
    assert problem.kind == ("again" if seconds is None else "rate")


def test_a_busy_server_is_waited_for_as_long_as_it_says(tmp_path: Path, data: Path, waits: list[float]) -> None:
    def reply(*_: Any) -> Sent:
        return said("yes") if sum(waits) >= 90 else (503, b"starting", {"Retry-After": "30"})

    ask(tmp_path, data, reply, retries=0)
    assert waits == [30, 30, 30]


def test_a_reasoning_models_run_from_the_questions_to_the_scores(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right answers in every form of a server, beside thoughts that say otherwise, and two that never end."""
    items = load_benchmarks(["boolq"], data)["boolq"].items
    gold = {prompt(item): str(item.gold) for item in items}
    other = {"yes": "no", "no": "yes"}

    def reply(body: dict[str, Any], number: int) -> Sent:
        assert "stop" not in body
        right = gold[body["messages"][-1]["content"]]
        wrong = f"Is it {other[right]}? The answer is {other[right]}.\nQuestion: is it?\nI think so."
        forms = (
            said(f"<think>\n{wrong}\n</think>\n\nThe answer is {right}."),
            said(f"The answer is {right}.", reasoning_content=wrong),
            said(f"{wrong}\n</think>\n{right.capitalize()}."),
            said(f"<|channel|>analysis<|message|>{wrong}<|end|><|start|>assistant<|channel|>final<|message|>{right}"),
            said(f"<think>\nThe answer is {right}. But wait", "length"),
            said(None, "length", reasoning=f"The answer is {right}. But wait"),
        )
        return forms[number]

    result, bodies = ask(tmp_path, data, reply, limit=6)
    assert len(bodies) == 6
    assert result["ended"] == {"boolq": {"cut": 2, "silent": 2}}
    capsys.readouterr()
    assert main(["extract", str(tmp_path), "--json"]) == 0
    [score] = json.loads(capsys.readouterr().out)["scores"]
    assert (score["items"], score["correct"], score["unparsed"], score["cut"]) == (6, 4, 2, 2)
