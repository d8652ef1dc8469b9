"""An OpenAI-compatible server as what answers: many requests at a time, each answer kept the moment it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import aiohttp
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from superexperts.core.errors import Field, OptionError
from superexperts.engines.harness import Asker, quiet

__all__ = ["api", "as_chat", "chat_url", "request_url"]

SYNC_EVERY = 64
"""Answers of a server that may be lost where the machine, and not only the evaluation, goes down."""
# Of the connection, of the time, and of a reply that is no JSON or holds no text where it should.
_FAULTS = (aiohttp.ClientError, TimeoutError, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError)


class _Served(Asker):
    """Many requests at a time; each answer is kept the moment it comes."""

    field = "base_url"
    """The setting that names the server, for errors."""
    _given: dict[int, str]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Asks for what the journal has not; `OptionError` where the server fails more often than it may."""
        server = cast(Any, self)
        self._given = self._kept()
        left = [i for i in range(len(requests)) if i not in self._given]
        if left:
            settings = requests[left[0]].args[1]
            messages = [self._message(requests[i].args[0]) for i in left]
            try:
                asyncio.run(server.get_batched_requests(messages, left, generate=True, gen_kwargs=settings))
            except _FAULTS as error:
                raise OptionError(f"{server.base_url!r} ", *_fault(error, server.timeout), field=self.field) from error
        until = requests[0].args[1].get("until", [])
        return [_cut(self._given[i], until) for i in range(len(requests))]

    async def amodel_call(self, session: Any, sem: Any, messages: Any, *, cache_keys: Any, **more: Any) -> list[str]:
        """One request, as the harness makes it; the key is the request's number."""
        answers: list[str] = await cast(Any, super()).amodel_call(session, sem, messages, cache_keys=None, **more)
        self._given[cache_keys[0]] = answers[0]
        if self._journal is not None:
            self._journal.add({cache_keys[0]: answers[0]}, sync=len(self._given) % SYNC_EVERY == 0)
        self._advance(1)
        return answers

    def _create_payload(self, *arguments: Any, **more: Any) -> dict[str, Any]:
        """As the harness has it, but for a `stop` without any text, which some servers fail on."""
        payload: dict[str, Any] = cast(Any, super())._create_payload(*arguments, **more)
        return {name: value for name, value in payload.items() if name != "stop" or value}

    def _message(self, prompt: str) -> Any:
        return prompt


class _Completions(_Served, LocalCompletionsAPI):  # type: ignore[misc]
    """/v1/completions: the prompt as it is."""

    def parse_generations(self, outputs: Any, **_: Any) -> list[str | None]:
        return [_only_text(outputs["choices"][0]["text"])]


class _ChatCompletions(_Served, LocalChatCompletion):  # type: ignore[misc]
    """/v1/chat/completions: the prompt is the user's message."""

    def _message(self, prompt: str) -> Any:
        return self.apply_chat_template([{"role": "user", "content": prompt}])

    def parse_generations(self, outputs: Any, **_: Any) -> list[str | None]:
        """The harness takes a reply without `choices` for an empty answer; here it is an error, and asked again."""
        return [_only_text(outputs["choices"][0]["message"]["content"])]


def _only_text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"a {type(value).__name__} where the text should be")
    return value


def request_url(base_url: str) -> str:
    """`http://host:8000/v1` -> `.../v1/completions`; a URL that names an endpoint stays as it is."""
    url = base_url.rstrip("/")
    return url if url.endswith("/completions") else f"{url}/completions"


def chat_url(base_url: str) -> str:
    """`http://host:8000/v1` -> `.../v1/chat/completions`; a URL that names an endpoint stays as it is."""
    url = base_url.rstrip("/")
    return url if url.endswith("/completions") else f"{url}/chat/completions"


def api(
    model: str, url: str, *, concurrency: int, timeout: float, retries: int, seed: int = 0, field: str = "base_url"
) -> Any:
    """An OpenAI-compatible server's model by its name there; a URL that ends in /chat/completions is asked as a chat.

    The key for the server is the environment's OPENAI_API_KEY, if it needs one.
    """
    kind = _ChatCompletions if url.endswith("/chat/completions") else _Completions
    with quiet():
        asker = kind(
            model=model,
            base_url=url,
            tokenizer_backend=None,
            tokenized_requests=False,
            num_concurrent=concurrency,
            max_retries=retries + 1,
            timeout=timeout,
            seed=seed,
        )
    asker.timeout = timeout  # the harness takes whole seconds only
    asker.field = field
    return asker


def as_chat(asker: Any, messages: Sequence[str]) -> list[Any]:
    """Each text as a user's message, in the model's own template; as it is where there is no template."""
    if isinstance(asker, _Served) or asker.tokenizer.chat_template is None:
        return list(messages)
    told = [asker.apply_chat_template([{"role": "user", "content": text}]) for text in messages]
    # SGLang's class of the harness puts a BOS in front of whatever it is given; the others look for one first.
    bos = asker.tokenizer.bos_token if getattr(asker, "add_bos_token", None) else None
    return [text.removeprefix(bos) if bos else text for text in told]


def _cut(text: str, until: Sequence[str]) -> str:
    """Up to the first stop text, for servers that know no `stop`."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def _fault(error: Exception, timeout: float) -> tuple[str, ...]:
    """What a server did wrong and what to do, in one line; what it said itself is none of it."""
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error, aiohttp.ContentTypeError):
        if error.status == 400:
            return (
                "answers 400; a prompt may be too long for its context, or the name not one that it gives a model; see "
                "its log, what was answered is kept",
            )
        return (
            f"answers {error.status}; check the URL, the name that the server gives ",
            Field("model"),
            ", and OPENAI_API_KEY",
        )
    if isinstance(error, TimeoutError):
        return (
            f"does not answer within {timeout:g} s; raise ",
            Field("timeout"),
            " or lower ",
            Field("concurrency"),
            ", what was answered is kept",
        )
    if isinstance(error, aiohttp.ClientConnectionError):
        return (f"cannot be reached ({type(error).__name__}); start the server or check the URL, then run again",)
    return (f"answers what is not a completion ({type(error).__name__}); give an OpenAI-compatible server",)
