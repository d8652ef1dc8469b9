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

__all__ = ["Problem", "problem_in", "refused_parameter"]

Kind = Literal["again", "rate", "filtered", "refused", "fatal"]

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
        """Whether a prompt has no room in the model's context."""
        return bool(_TOO_LONG.search(self.words))

    @property
    def kind(self) -> Kind:
        """What to do: try `again`, wait for the `rate`, mark this prompt as `filtered` or as `refused`, or give up."""
        status = self.status
        if _NO_CREDIT.search(self.words) or status in (401, 402, 404, 405, 501):
            return "fatal"
        if status == 429 or (status in (403, 503) and _RATE.search(self.words)):
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
    if status < 400:
        error = _error_of(value)
        if error is None:
            return None
        status = _status_of(error)
    else:
        error = _error_of(value) or value or body.decode("utf-8", errors="replace")
    code, message, param = _fields(error)
    retry = _seconds(headers)
    return Problem(status=status, message=_clean(message), code=code, param=param, retry_after=retry)


def _error_of(value: Any) -> Any:
    """The error in the JSON of a reply, wherever providers put it."""
    if not isinstance(value, dict):
        return None
    if value.get("error") or value.get("object") == "error":
        return value.get("error") or value
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error"):
        return choice.get("error") or {"message": "the provider reports an error"}
    if not choices and isinstance(value.get("detail") or value.get("message"), str | list):
        return value
    return None


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
    detail = error.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):  # FastAPI, pydantic
        places = [str(place) for place in detail[0].get("loc", ())]
        return str(detail[0].get("type", "")), str(detail[0].get("msg", "")), places[-1] if places else ""
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


def refused_parameter(problem: Problem, sent: Collection[str]) -> str | None:
    """Which of the parameters that were sent a server refuses; None if it refuses something else."""
    if problem.status not in (400, 415, 422) or problem.too_long:
        return None
    if problem.param:
        return problem.param if problem.param in sent else None
    if not _UNSUPPORTED.search(problem.words):
        return None
    named = [(found.start(), name) for name in sent if (found := re.search(rf"\b{name}\b", problem.message))]
    return min(named)[1] if named else None
