"""The engine `api`: an OpenAI-compatible server, by completions or as a chat."""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from superexperts.engines import Opening
from superexperts.engines.client import Client
from superexperts.engines.harness import HarnessModel
from superexperts.engines.replies import Generated, Reply, Request, make_reply, stopped_in_thoughts

__all__ = ["ServerModel", "api", "as_chat", "chat_url", "is_chat", "open_engine", "request_url"]

SYNC_EVERY = 64
"""Answers between two syncs of the journal, which are lost if the machine loses power."""


class ServerModel(HarnessModel):
    """A model on a server, which is known by its name there only."""

    def __init__(self, name: str, client: Client, seed: int) -> None:
        self.name, self.client, self.seed = name, client, seed
        self.batch_size = 1
        self.extra: dict[str, Any] = {}
        """Further parameters of each request, such as the variables of the server's chat template."""

    @property
    def refused(self) -> Mapping[int, str]:
        """Number of a request that the server refused -> what the server said."""
        return self.client.refused

    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        """Asks what the journal lacks. A prompt that the server refused is not kept, so that the next run asks it
        again; `OptionError` if the server fails more often than allowed."""
        self.client.refused.clear()
        found = {number: Reply.from_given(given) for number, given in self._kept().items()}
        self._ask({number: request for number, request in enumerate(requests) if number not in found}, found)
        # A stop text may have cut thoughts. Asked again without it, the model thinks to the end.
        cut = [number for number, request in enumerate(requests) if stopped_in_thoughts(request, found[number])]
        self._ask({number: dataclasses.replace(requests[number], sends_stop=False) for number in cut}, found)
        return [found[number] for number in range(len(requests))]

    def _ask(self, requests: Mapping[int, Request], found: dict[int, Reply]) -> None:
        def keep(number: int, generated: Generated) -> None:
            reply = found[number] = make_reply(generated, requests[number])
            if stopped_in_thoughts(requests[number], reply):
                return  # it is asked again
            if self._journal is not None and number not in self.client.refused:
                self._journal.add({number: reply.to_given()}, sync=len(found) % SYNC_EVERY == 0)
            self._advance(1)

        if requests:
            self.client.ask({number: self._body(request) for number, request in requests.items()}, keep)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "max_tokens": request.max_new_tokens, "temperature": 0}
        if isinstance(request.prompt, str):
            body |= {"prompt": request.prompt}
            if request.stop and request.sends_stop:  # some servers fail on an empty list, and OpenAI's takes four
                body |= {"stop": list(request.stop[:4])}
        else:
            body |= {"messages": [dict(message) for message in request.prompt]}
        return body | {"seed": self.seed} | self.extra


def is_chat(url: str) -> bool:
    """Whether a URL, as `request_url` and `chat_url` return it, takes messages."""
    return urllib.parse.urlsplit(url).path.endswith("/chat/completions")


def request_url(base_url: str) -> str:
    """`http://host:8000/v1` -> `.../v1/completions`; a URL that names an endpoint stays as it is, and so does what
    stands behind a question mark."""
    return _endpoint(base_url, "completions")


def chat_url(base_url: str) -> str:
    """`http://host:8000/v1` -> `.../v1/chat/completions`; a URL that names an endpoint stays as it is."""
    return _endpoint(base_url, "chat/completions")


def _endpoint(base_url: str, name: str) -> str:
    parts = urllib.parse.urlsplit(base_url)
    path = parts.path.rstrip("/")
    path = path if path.endswith("/completions") else f"{path}/{name}"
    return urllib.parse.urlunsplit(parts._replace(path=path))


def api(
    model: str, url: str, *, concurrency: int, timeout: float, retries: int, seed: int = 0, field: str = "base_url"
) -> ServerModel:
    """An OpenAI-compatible server's model by its name there; a URL that ends in /chat/completions is asked as a chat.

    The key for the server is the environment's OPENAI_API_KEY, if it needs one.
    """
    client = Client(url, concurrency=concurrency, timeout=timeout, retries=retries, field=field)
    return ServerModel(model, client, seed)


def open_engine(opening: Opening) -> ServerModel:
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
    if isinstance(model, ServerModel):
        if not is_chat(model.client.url):
            return list(messages)
        return [({"role": "user", "content": text},) for text in messages]
    if model.tokenizer.chat_template is None:
        return list(messages)
    prompts = [model.apply_chat_template([{"role": "user", "content": text}]) for text in messages]
    # The harness's class of SGLang always adds a BOS in front; the others first check whether there is one.
    bos = model.tokenizer.bos_token if getattr(model, "add_bos_token", None) else None
    return [text.removeprefix(bos) if bos else text for text in prompts]
