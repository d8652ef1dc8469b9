"""What a server says when it does not answer, and what that means: wait, try again, leave a parameter out, or stop.

Servers agree on little: the status may be 200, the code may be in one of five places, and the words are free. The
tables here are read in order, on the status, the code and the message together.
"""

from __future__ import annotations

import dataclasses
import email.utils
import json
import os
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal

__all__ = ["FILTERED", "Problem", "problem_in", "refused_parameter"]

Kind = Literal["again", "rate", "filtered", "refused", "nothing", "fatal"]

FILTERED = frozenset(
    (
        "content_filter",
        "content_filtered",
        "safety",
        "prohibited_content",
        "blocklist",
        "recitation",
        "spii",
        "sensitive",
    )
)
"""Reasons, in lower case, for which a filter ends a reply (OpenAI, Amazon, Google, Zhipu)."""
_BLOCKED = re.compile(
    r"content[_ -]?(?:filter|policy|management)|responsible[_ ]?ai|safety|moderat|flagged|prohibited|inappropriate",
    re.IGNORECASE,
)
_NO_CREDIT = re.compile(r"insufficient[_ ](?:quota|balance|credit|fund)|billing|not enough credit", re.IGNORECASE)
_RATE = re.compile(r"rate[_ -]?limit|too[_ ]many[_ ]requests|throttl|tokens per min|requests per min", re.IGNORECASE)
_BUSY = re.compile(
    r"overload|unavailable|server[_ ]error|internal error|time[_ -]?out|try again|capacity", re.IGNORECASE
)
_TOO_LONG = re.compile(
    r"context[_ ](?:length|window|size)|maximum (?:context|model|sequence)|(?:too|exceed\w*)[^.]{0,20} (?:long|input)"
    r"|prompt is too|string_above_max|reduce the length|too many (?:input )?tokens",
    re.IGNORECASE,
)
_TOO_MANY = re.compile(
    r"max_(?:completion_)?tokens.{0,80}(?:too (?:large|big|high)|range|at most|less than|maximum|<=|>|exceed)"
    r"|(?:maximum|supports? at most)[^.]{0,40} (?:output|completion) tokens",
    re.IGNORECASE,
)
_WAIT = re.compile(
    r"(?:again|retry|wait)\D{0,20}(?=\d)(?:(\d+)\s?m(?:in\w*)?(?![a-z])\s?)?(?:(\d+(?:\.\d+)?)\s?(ms|s))?",
    re.IGNORECASE,
)
_TAGS = re.compile(r"<(style|script)\b.*?</\1>|<[^<>]*>", re.IGNORECASE | re.DOTALL)
_INTERRUPTED = frozenset(("error", "abort", "cancelled", "insufficient_system_resource"))
"""Reasons for which a server ends a reply that is not the model's whole answer (of providers in general, vLLM and
SGLang, others, DeepSeek)."""
_NOT_PARAMETERS = frozenset(("model", "prompt", "messages"))
"""What every request needs, so that it cannot be left out."""
_UNSUPPORTED = re.compile(
    r"unsupported|not (?:\w+ )?(?:support|permit|allow|accept|recogni)|unknown|unrecogni|unexpected|extra[_ ]"
    r"|invalid|incompatible|does not support|only the default|deprecated|must (?:be|not)|removed",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """An error that a server sent."""

    status: int
    """The HTTP status, or the one in the body of a reply with status 200."""
    message: str = ""
    """The server's words, without control characters and without the key that it was sent."""
    code: str = ""
    param: str = ""
    """The parameter that the server names, in whatever place."""
    retry_after: float | None = None
    """Seconds to wait, if the server says so."""

    @property
    def words(self) -> str:
        return f"{self.code} {self.message}"

    @property
    def too_long(self) -> bool:
        """Whether a prompt has no room in the model's context, or the answer is allowed more tokens than the model
        can give."""
        return bool(_TOO_LONG.search(self.words) or _TOO_MANY.search(self.message))

    @property
    def kind(self) -> Kind:
        """What to do: try `again`, wait for the `rate`, mark this prompt as `filtered` or as `refused` (after trying
        again where there is `nothing` in the reply), or give up."""
        status = self.status
        if status < 400:
            return "nothing"
        # Gemini speaks of billing where a limit per minute is meant, but then it says how long to wait.
        if status == 429 and self.retry_after is not None:
            return "rate"
        if _NO_CREDIT.search(self.words) or status in (401, 402, 404, 405, 501):
            return "fatal"
        if status == 429 or (status in (403, 503) and _RATE.search(self.words)):
            return "rate"
        if status in (503, 529) and self.retry_after is not None:
            return "rate"
        if status < 500 and _BLOCKED.search(self.words):
            return "filtered"
        if status >= 500 or status in (408, 409, 425):
            return "again"
        return "fatal" if status == 403 else "refused"

    def __str__(self) -> str:
        return f"{self.status} ({self.message!r})" if self.message else str(self.status)


def problem_in(status: int, headers: Mapping[str, str], body: bytes) -> Problem | None:
    """The problem in a server's reply; None for a reply that holds no error."""
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if isinstance(value, list) and len(value) == 1:  # Gemini
        value = value[0]
    if status < 400:
        error = _error_of(value)
        if error is None:
            return Problem(status=status, message="a reply without an answer") if _is_empty(value) else None
        status = _status_of(error)
    else:
        error = _error_of(value) or value or body.decode("utf-8", errors="replace")
    code, message, param = _fields(error)
    retry = _seconds(headers)
    if retry is None and status in (429, 503, 529):
        retry = _seconds_in(message)
    return Problem(status=status, message=_clean(message), code=code, param=param, retry_after=retry)


def _error_of(value: Any) -> Any:
    """The error in the JSON of a reply, wherever providers put it."""
    if not isinstance(value, dict):
        return None
    if value.get("error") or value.get("object") == "error":
        return value.get("error") or value
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") in _INTERRUPTED):
        why = choice.get("finish_reason")
        return choice.get("error") or {"message": f"the provider ended the reply with the reason {why!r}"}
    errors = value.get("errors")
    if not choices and isinstance(errors, list) and errors:  # Cloudflare
        return errors[0]
    if not choices and isinstance(value.get("detail") or value.get("message"), str | list):
        return value
    return None


def _is_empty(value: Any) -> bool:
    """Whether the JSON of a reply has the form of a completion, but nothing in it."""
    if not isinstance(value, dict) or "choices" not in value:
        return False
    choices = value["choices"]
    if not choices:
        return True
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict) or str(choice.get("finish_reason")).lower() in FILTERED:
        return False
    return "text" not in choice and choice.get("message") is None


def _status_of(error: Any) -> int:
    """The status that fits an error inside a reply with status 200."""
    code, message, _ = _fields(error)
    if re.fullmatch(r"[45]\d\d", code):
        return int(code)
    words = f"{code} {message}"
    if _RATE.search(words):
        return 429
    if _BLOCKED.search(words) or _TOO_LONG.search(words) or "invalid_request" in words:
        return 400
    return 503 if _BUSY.search(words) else 502


def _fields(error: Any) -> tuple[str, str, str]:
    """(code, message, parameter)"""
    if not isinstance(error, dict):
        return "", str(error), ""
    if isinstance(error.get("message"), dict):  # Mistral
        return _fields(error["message"])
    detail = error.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):  # FastAPI, pydantic
        # ["body", "stop", "str"]: what follows the parameter is a part or a type of it.
        places = [place for place in detail[0].get("loc", ()) if isinstance(place, str) and place != "body"]
        return str(detail[0].get("type", "")), str(detail[0].get("msg", "")), places[0] if places else ""
    inner = error.get("innererror")
    codes = [error.get("code"), error.get("type"), inner.get("code") if isinstance(inner, dict) else None]
    message = error.get("message") or detail or error.get("msg") or ""
    raw = error.get("metadata", {}).get("raw") if isinstance(error.get("metadata"), dict) else None
    words = [str(part) for part in (message, raw) if part]
    code = next((str(code) for code in codes if isinstance(code, int) and code), "")
    return code or " ".join(str(code) for code in codes if code), ": ".join(words), str(error.get("param") or "")


def _clean(text: str, longest: int = 200) -> str:
    """A server's words, which may be anything, as one short line to print."""
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "***")
    if text.lstrip()[:1] == "<":  # a page of a gateway
        text = _TAGS.sub(" ", text[:4000])
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:4000]).split())
    return line if len(line) <= longest else f"{line[:longest]}..."


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `Retry-After` (seconds or a date) or `retry-after-ms`."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
        if (value := headers.get("Retry-After")) is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _seconds_in(message: str) -> float | None:
    """Seconds to wait, from words such as `Please try again in 1m2.5s`."""
    found = _WAIT.search(message)
    if found is None or not (found[1] or found[2]):
        return None
    seconds = float(found[2] or 0) / (1000 if (found[3] or "").lower() == "ms" else 1)
    return 60.0 * int(found[1] or 0) + seconds


def refused_parameter(problem: Problem, sent: Collection[str]) -> str | None:
    """Which of the parameters that were sent a server refuses; None if it refuses something else."""
    if problem.status not in (400, 415, 422) or problem.too_long:
        return None
    names = set(sent) - _NOT_PARAMETERS
    if problem.param:
        return problem.param if problem.param in names else None
    # The usual code "invalid_request_error" says nothing of a parameter.
    if not _UNSUPPORTED.search(problem.words.replace("invalid_request_error", "")):
        return None
    named = [(found.start(), name) for name in names if (found := re.search(rf"\b{name}\b", problem.message))]
    return min(named)[1] if named else None
