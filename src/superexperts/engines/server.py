"""The engine `api`: an OpenAI-compatible server. Many requests run at a time, and each answer is kept at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import aiohttp
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from superexperts.core.errors import Field, OptionError
from superexperts.engines import Opening
from superexperts.engines.harness import HarnessModel, quiet

__all__ = ["api", "as_chat", "chat_url", "open_engine", "request_url"]

SYNC_EVERY = 64
"""Answers between two syncs of the journal, which are lost if the machine loses power."""
# Connection, timeout, and a reply that is not JSON or has no text in the expected place.
_FAULTS = (aiohttp.ClientError, TimeoutError, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError)


class _Served(HarnessModel):
    """Many requests at a time; each answer is kept at once."""

    field = "base_url"
    """The setting that names the server, for errors."""
    _answers: dict[int, str]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests the answers that the journal lacks; `OptionError` if the server fails more often than allowed."""
        server = cast(Any, self)
        self._answers = self._kept()
        left = [i for i in range(len(requests)) if i not in self._answers]
        if left:
            settings = requests[left[0]].args[1]
            messages = [self._message(requests[i].args[0]) for i in left]
            try:
                asyncio.run(server.get_batched_requests(messages, left, generate=True, gen_kwargs=settings))
            except _FAULTS as error:
                raise OptionError(f"{server.base_url!r} ", *_fault(error, server.timeout), field=self.field) from error
        until = requests[0].args[1].get("until", [])
        return [_cut(self._answers[i], until) for i in range(len(requests))]

    async def amodel_call(self, session: Any, sem: Any, messages: Any, *, cache_keys: Any, **more: Any) -> list[str]:
        """One request, as the harness makes it; the key is the request's number."""
        answers: list[str] = await cast(Any, super()).amodel_call(session, sem, messages, cache_keys=None, **more)
        self._answers[cache_keys[0]] = answers[0]
        if self._journal is not None:
            self._journal.add({cache_keys[0]: answers[0]}, sync=len(self._answers) % SYNC_EVERY == 0)
        self._advance(1)
        return answers

    def _create_payload(self, *arguments: Any, **more: Any) -> dict[str, Any]:
        """The harness's payload, but without an empty `stop`, on which some servers fail."""
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
        """The harness takes a reply without `choices` for an empty answer. Here it is an error, and sent again."""
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
        server = kind(
            model=model,
            base_url=url,
            tokenizer_backend=None,
            tokenized_requests=False,
            num_concurrent=concurrency,
            max_retries=retries + 1,
            timeout=timeout,
            seed=seed,
        )
    server.timeout = timeout  # the harness takes whole seconds only
    server.field = field
    return server


def open_engine(opening: Opening) -> Any:
    """The model `opening.model` of the server at `opening.base_url`."""
    assert opening.base_url is not None
    return api(
        opening.model,
        request_url(opening.base_url),
        concurrency=opening.concurrency,
        timeout=opening.timeout,
        retries=opening.retries,
        seed=opening.seed,
    )


def as_chat(model: Any, messages: Sequence[str]) -> list[Any]:
    """Each text as a user's message in the model's chat template; unchanged if there is no template."""
    if isinstance(model, _Served) or model.tokenizer.chat_template is None:
        return list(messages)
    prompts = [model.apply_chat_template([{"role": "user", "content": text}]) for text in messages]
    # The harness's class of SGLang always adds a BOS in front; the others first check whether there is one.
    bos = model.tokenizer.bos_token if getattr(model, "add_bos_token", None) else None
    return [text.removeprefix(bos) if bos else text for text in prompts]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first stop text, for servers that ignore `stop`."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def _fault(error: Exception, timeout: float) -> tuple[str, ...]:
    """What the server did wrong and what to do. The server's own text is left out, because it may be anything."""
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error, aiohttp.ContentTypeError):
        if error.status == 400:
            return (
                "answers 400; a prompt may be too long for its context, or it has no model of that name; see its log, "
                "the answers so far are kept",
            )
        return (
            f"answers {error.status}; check the URL, the server's name for ",
            Field("model"),
            ", and OPENAI_API_KEY",
        )
    if isinstance(error, TimeoutError):
        return (
            f"does not answer within {timeout:g} s; raise ",
            Field("timeout"),
            " or lower ",
            Field("concurrency"),
            ", the answers so far are kept",
        )
    if isinstance(error, aiohttp.ClientConnectionError):
        return (f"cannot be reached ({type(error).__name__}); start the server or check the URL, then run again",)
    return (f"does not answer with a completion ({type(error).__name__}); give an OpenAI-compatible server",)
