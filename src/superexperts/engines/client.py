"""Requests to an OpenAI-compatible server: many at a time, and each answer is handed on as soon as it is there.

A prompt that the server refuses does not end the others. A limit on the rate is waited for, by all requests together.
A parameter that the server does not take is left out of all later requests. No error is ever taken for an answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from superexperts.core.console import note
from superexperts.core.errors import Field, OptionError
from superexperts.engines.problems import Problem, problem_in, refused_parameter
from superexperts.engines.replies import Generated, read_choice

__all__ = ["REPLACED", "Client"]

REPLACED: Mapping[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "stop": None,
    "seed": None,
}
"""Parameter that some servers refuse -> the one to send in its place, None to leave it out."""
PATIENCE = 300.0
"""Seconds without any answer after which a limit on the rate ends the run."""
LONGEST_WAIT = 60.0
"""Hosted servers count requests per minute, so a wait that the server does not name grows up to a minute."""
IN_A_ROW = 8
"""Prompts that may fail or be refused, one after the other, before the run ends."""
_SETTINGS = {
    "chat_template_kwargs": "thinking",
    "reasoning_effort": "reasoning_effort",
    "continue_final_message": "prefill",
    "add_generation_prompt": "prefill",
}
"""Parameters that only a setting sends, so that leaving them out would ask something else -> that setting."""
_SEQUELS = {"temperature": ", so the answers may be sampled", "seed": ""}
_UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError)


class _RequestError(Exception):
    """A request that failed for good; `parts` is the message, after the server's name."""

    def __init__(self, *parts: str, ends: bool = False) -> None:
        super().__init__(*parts)
        self.parts = parts
        self.ends = ends
        """Whether no other request can succeed either."""


class Client:
    """A server under one URL, and what was learnt about it."""

    def __init__(self, url: str, *, concurrency: int, timeout: float, retries: int, field: str) -> None:
        self.url = url
        self.field = field
        """The setting that names the server, for errors."""
        self.left_out: dict[str, str | None] = {}
        """Parameters that the server refused, and what is sent instead."""
        self.refused: dict[int, str] = {}
        """Number of a request that the server refused -> what the server said."""
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._not_before = self._last_answer = 0.0
        self._pauses = self._answered = self._in_a_row = 0
        self._was_limited = False

    def ask(self, bodies: Mapping[int, dict[str, Any]], keep: Callable[[int, Generated], None]) -> None:
        """Posts each body and hands its reply to `keep`, with the number of the request.

        A refused prompt gets an empty reply with the finish reason "error" or "content_filter" once another prompt was
        answered. `OptionError` if the server cannot be reached, refuses everything, or fails too often; what was
        answered was handed on before.
        """
        self._last_answer = time.monotonic()
        self._in_a_row = 0
        try:
            asyncio.run(self._ask(bodies, keep))
        except _RequestError as failed:
            raise OptionError(f"{self.url!r} ", *failed.parts, field=self.field) from failed.__cause__

    async def _ask(self, bodies: Mapping[int, dict[str, Any]], keep: Callable[[int, Generated], None]) -> None:
        waiting = iter(bodies.items())
        refused: dict[int, Problem] = {}
        failures: list[_RequestError] = []

        def give_up(failed: _RequestError) -> bool:
            """Whether a failure of one prompt ends the run: nothing was answered yet, or many failed in a row."""
            self._in_a_row += 1
            nothing = not self._answered and self._in_a_row >= min(IN_A_ROW, len(bodies))
            return failed.ends or nothing or self._in_a_row >= max(IN_A_ROW, 2 * self._concurrency)

        async def work(session: aiohttp.ClientSession) -> None:
            for number, body in waiting:
                try:
                    answer = await self._answer(session, body)
                except _RequestError as error:
                    failures.append(error)
                    if give_up(error) or not self._answered:
                        raise
                    continue
                if isinstance(answer, Generated):
                    self._answered, self._in_a_row, self._pauses = self._answered + 1, 0, 0
                    self._last_answer = time.monotonic()
                    keep(number, answer)
                    continue
                refused[number] = answer
                if answer.kind != "filtered" and give_up(failed := _refusal(answer)):
                    raise failed

        headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
        if "api-version=" in self.url:  # Azure has another name for it
            headers["api-key"] = os.environ.get("OPENAI_API_KEY", "")
        connector = aiohttp.TCPConnector(limit=self._concurrency)
        total = aiohttp.ClientTimeout(total=self._timeout)
        async with aiohttp.ClientSession(connector=connector, timeout=total, headers=headers) as session:
            workers = [asyncio.create_task(work(session)) for _ in range(min(self._concurrency, len(bodies)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        unspecific = [problem for problem in refused.values() if problem.kind != "filtered"]
        if unspecific and not self._answered:
            raise _refusal(unspecific[0])
        for number, problem in refused.items():
            self.refused[number] = str(problem)
            keep(number, Generated("", "content_filter" if problem.kind == "filtered" else "error"))
        if failures:
            count = f"; {len(failures)} of {len(bodies)} prompts failed"
            raise _RequestError(*failures[0].parts, count) from failures[0].__cause__

    async def _answer(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Generated | Problem:
        """The reply to one request, or the problem for which the server refuses this prompt."""
        attempt = 0
        while True:
            await self._wait_for_rate()
            sent = self._without(body)
            failed: _RequestError
            try:
                async with session.post(self.url, json=sent) as response:
                    data = await response.read()
                problem = problem_in(response.status, response.headers, data)
                if problem is None:
                    return read_choice(json.loads(data))
                kind = problem.kind
                if kind == "rate":
                    self._pause(problem)
                    continue
                if kind == "refused" and self._learn(problem, sent):
                    continue
                if kind in ("refused", "filtered") or (kind == "nothing" and attempt >= self._retries):
                    return problem
                failed = self._fault(problem)
                if kind == "fatal":
                    raise failed
                if problem.retry_after:
                    self._not_before = max(self._not_before, time.monotonic() + min(problem.retry_after, LONGEST_WAIT))
            except TimeoutError as error:
                failed = _because(
                    error,
                    *(f"does not answer within {self._timeout:g} s; raise ", Field("timeout"), " or lower "),
                    *(Field("concurrency"), ", the answers so far are kept"),
                )
            except aiohttp.ClientConnectionError as error:
                what_to_do = "start the server or check the URL, then run again"
                failed = _because(error, f"cannot be reached ({type(error).__name__}); {what_to_do}")
            except (aiohttp.ClientError, *_UNREADABLE) as error:
                name = type(error).__name__
                advice = "see its log, the answers so far are kept"
                if not self._answered:
                    advice = "give an OpenAI-compatible server"
                failed = _because(error, f"does not answer with a completion ({name}); {advice}")
            attempt += 1
            if attempt > self._retries:
                raise failed
            await asyncio.sleep(min(max(2.0 ** (attempt - 1), 1.0), 10.0))

    # ---- what is learnt on the way ----

    def _without(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body without the parameters that the server refuses."""
        names = {name: self.left_out.get(name, name) for name in body}
        return {names[name] or "": value for name, value in body.items() if names[name] is not None}

    def _learn(self, problem: Problem, sent: Mapping[str, Any]) -> bool:
        """Whether the server refuses a parameter that it is not sent from now on."""
        name = refused_parameter(problem, sent)
        if name is None or name not in REPLACED:
            return False
        if name not in self.left_out:
            instead = self.left_out[name] = REPLACED[name]
            sequel = f"{instead} is sent instead" if instead else f"it is left out{_SEQUELS.get(name, '')}"
            note(f"api: the server does not take {name}; {sequel}")
        return True

    def _pause(self, problem: Problem) -> None:
        """Lets all requests wait for a limit on the rate; raises if that takes too long."""
        now = time.monotonic()
        if now < self._not_before:  # another request has met the same limit
            return
        wait = problem.retry_after
        if not wait:  # also where a server says 0, and refuses again at once
            wait = min(2.0**self._pauses, LONGEST_WAIT)
        if now + wait > self._last_answer + PATIENCE:
            seconds = f"asks to wait {wait:.0f} s more" if problem.retry_after else f"for over {PATIENCE:.0f} s"
            raise _RequestError(
                f"limits the rate of requests, {seconds}: {problem}; lower ",
                *(Field("concurrency"), " or run again later, the answers so far are kept"),
                ends=True,
            )
        if not self._was_limited:
            note(f"api: the server limits the rate of requests: {problem}; waiting {wait:.0f} s")
        self._was_limited = True
        self._pauses += 1
        self._not_before = now + wait

    async def _wait_for_rate(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _fault(self, problem: Problem) -> _RequestError:
        if problem.kind == "fatal":
            usual = problem.status == 404 and re.search(r"/v\d", self.url) is None
            path = " (most servers need /v1 in it)" if usual else ""
            return _RequestError(
                f"answers {problem}; check the URL{path}, the server's name for ",
                *(Field("model"), ", and OPENAI_API_KEY; the answers so far are kept"),
                ends=True,
            )
        return _RequestError(f"answers {problem}; see its log, the answers so far are kept")


def _because(error: BaseException, *parts: str) -> _RequestError:
    failed = _RequestError(*parts)
    failed.__cause__ = error
    return failed


def _refusal(problem: Problem) -> _RequestError:
    hint, field = "check the server's name for ", Field("model")
    setting = next((field for name, field in _SETTINGS.items() if name in f"{problem.param} {problem.message}"), None)
    if problem.too_long:
        hint, field = "lower ", Field("max_new_tokens")
    elif setting is not None:
        hint, field = "leave out ", Field(setting)
    return _RequestError(f"answers {problem} to every prompt; ", hint, field, ", or see its log")
