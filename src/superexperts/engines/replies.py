"""What goes to an engine and what comes back: a request, and a reply with its thoughts split off."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from superexperts.core.thoughts import before_stop, split_thoughts
from superexperts.engines.journal import Given
from superexperts.engines.problems import FILTERED

__all__ = [
    "Generated",
    "Message",
    "Reply",
    "Request",
    "instances",
    "make_reply",
    "read_choice",
    "stopped_in_thoughts",
]

Message = Mapping[str, Any]
"""A message of a chat: `role` and `content`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to answer greedily."""

    prompt: str | tuple[Message, ...]
    """The text that the model continues; a server that is asked in chat takes the messages instead."""
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts that end the answer. They never end it within its thoughts."""
    sends_stop: bool = True
    """Whether the engine may look at `stop` itself. It then knows nothing of thoughts."""
    opened: bool = False
    """Whether the prompt ends inside thoughts, because the chat template opens them."""
    prefill: str = ""
    """Beginning of the answer, with which the prompt ends."""
    thinking_budget: int | None = None
    """Tokens after which thoughts are ended for the model; `max_new_tokens` then come after them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A model's reply to a request. The fields have the meaning that they have in `Answer`."""

    response: str
    thoughts: str | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        """The reply without its thoughts."""
        return self.response if self.text is None else self.text

    def to_given(self) -> Given:
        """The reply as the journal keeps it: the response alone if nothing more is known."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return self.response if len(known) == 1 else known

    @classmethod
    def from_given(cls, given: Given) -> Reply:
        """The inverse of `to_given`."""
        assert not isinstance(given, list), "log-probabilities are not a reply"
        return cls(response=given) if isinstance(given, str) else cls(**given)


class Generated(NamedTuple):
    """What an engine hands over."""

    text: str
    finish_reason: str | None = None
    """As in `Answer`; None if the engine does not say why the text ends."""
    thoughts: str = ""
    """Thoughts that a server put into a field for them."""


def make_reply(generated: Generated, request: Request) -> Reply:
    """Splits off thoughts, then cuts what is said at the first stop text."""
    text = generated.text if generated.text.startswith(request.prefill) else request.prefill + generated.text
    # A server that returns thoughts in a separate field has already split them off the text.
    opened = request.opened and not generated.thoughts
    response = before_stop(text, request.stop, opened=opened)
    finish_reason = generated.finish_reason if response == text else "stop"
    parts = split_thoughts(response, opened=opened)
    thoughts = "\n\n".join(part for part in (generated.thoughts, parts.thoughts) if part)
    if not thoughts and parts.text == response:
        return Reply(response=response, finish_reason=finish_reason)
    return Reply(response=response, thoughts=thoughts or None, text=parts.text, finish_reason=finish_reason)


def stopped_in_thoughts(request: Request, reply: Reply) -> bool:
    """Whether a stop text may have ended the thoughts: they did not end by themselves, and nothing was said."""
    stops = request.sends_stop and request.stop and reply.finish_reason == "stop"
    return bool(stops and reply.thoughts and not reply.said.strip())


def instances(prompts: Sequence[Any], max_new_tokens: int) -> list[Request]:
    """Requests for greedy replies that end where the model ends them."""
    return [Request(prompt=prompt, max_new_tokens=max_new_tokens) for prompt in prompts]


# ---- what servers send --------------------------------------------------------------------------------------------

_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_THOUGHT_PARTS = ("thinking", "reasoning", "thought", "redacted_thinking")
_LENGTH = ("length", "max_tokens", "max_output_tokens", "model_length")
_STOP = ("stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete")


def read_choice(value: Any) -> Generated:
    """The reply in a server's JSON of a completion or chat completion.

    `LookupError` or `TypeError` if there is none in the usual place. Thoughts may be in a field beside the text, in
    parts of a list, or in the text itself. Where a model refused, its words of refusal are the response.
    """
    choice = value["choices"][0]
    finish = _finish(choice)
    message = choice.get("message", choice)
    if message is None or ("content" not in message and (finish == "content_filter" or "role" in message)):
        # A filter may leave no message, and Gemini sends only a role where thoughts took all tokens.
        message = {**(message or {}), "content": (message or {}).get("text")}
    # Some servers send the same thoughts under two names.
    thoughts = next(filter(None, (_words(message.get(name)) for name in _THOUGHT_FIELDS)), "")
    refusal = message.get("refusal")
    name = "text" if message is choice else "content"
    content = message.get(name)
    if name not in message and not (thoughts or refusal or message.get("tool_calls")):
        raise LookupError(name)
    text, more = _content(content)
    if not text and message.get("tool_calls"):
        text = "\n".join(_arguments(call) for call in message["tool_calls"])
    if not text and isinstance(content, list):
        refusal = refusal or _refusal_in(content)
    if not text and isinstance(refusal, str) and refusal:
        text, finish = refusal, "refusal"
    return Generated(text, finish, "\n\n".join(filter(None, (thoughts, more))))


def _finish(choice: Any) -> str | None:
    """Why a reply ends, in the words of OpenAI's servers."""
    finish = choice.get("finish_reason")
    if not isinstance(finish, str):
        return None
    word = finish.lower()
    if word in FILTERED:
        return "content_filter"
    return "length" if word in _LENGTH else "stop" if word in _STOP else word


def _refusal_in(parts: Sequence[Any]) -> str:
    """The words of refusal among a message's parts."""
    return "".join(str(part.get("refusal") or "") for part in parts if isinstance(part, dict))


def _content(content: Any) -> tuple[str, str]:
    """(text, thoughts) of a message's content: a text, a list of parts, or nothing."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise TypeError(f"a {type(content).__name__} where the text should be")
    said: list[str] = []
    thought: list[str] = []
    for part in content:
        inside = isinstance(part, dict) and part.get("type") in _THOUGHT_PARTS
        (thought if inside else said).append(_words(part))
    return "".join(said), "\n\n".join(filter(None, thought))


def _words(value: Any) -> str:
    """All text in a part, however it is nested."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_words, value))
    if isinstance(value, dict):
        return "".join(
            _words(value[name]) for name in ("text", "content", "thinking", "reasoning", "summary") if name in value
        )
    return ""


def _arguments(call: Any) -> str:
    """The arguments of a tool call as text: a model may answer by calling a tool."""
    arguments = call["function"].get("arguments") or ""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
