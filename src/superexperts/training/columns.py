"""The columns of a row, as people write them -> question, reasoning and answer, or question and reply.

What is plain is read; for everything else the message names the row, the column, and what it takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from superexperts.core.errors import DataError

__all__ = ["TAKEN", "counts_from", "fields_of"]

TAKEN = (
    "question, explain, answer (and choices); or instruction, output (and input); or prompt, completion; or messages"
)
"""The columns that a row may have."""

Wrong = Callable[[str], DataError]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OTHER_NAMES = {
    "explanation": "explain",
    "rationale": "explain",
    "reasoning": "explain",
    "answerKey": "answer",
    "options": "choices",
}
_PAIRS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"))
_CHATS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def counts_from(values: Collection[Any]) -> int | None:
    """Whether the answers of a file that are indices of choices count from 0 or 1; None if that is not plain.

    An index of 0 shows the one, an index as large as the number of choices the other.
    """
    zero = last = False
    for value in values:
        row = _named(value) if isinstance(value, dict) else {}
        answer, choices = row.get("answer"), row.get("choices")
        if type(answer) is not int or not isinstance(choices, list | dict):
            continue
        zero |= answer == 0
        last |= answer == len(_choice_texts(choices) or ())
    return None if zero == last else 0 if zero else 1


def fields_of(value: Any, wrong: Wrong, index_from: int | None) -> dict[str, Any]:
    """The fields of a `Row` but its number; raises what `wrong` makes of a message.

    `index_from` is what `counts_from` found.
    """
    if not isinstance(value, dict):
        raise wrong(f" is {type(value).__name__}, not an object; it takes {TAKEN}")
    row = _named(value)
    if {"question", "explain", "answer"} & row.keys():
        return _explained(row, wrong, index_from)
    for name in _CHATS:
        if name in row:
            return _conversation(row[name], name, wrong)
    for asked, told in _PAIRS:
        if asked in row and told in row:
            if isinstance(row[asked], list):
                return _conversation([*row[asked], *_as_list(row[told])], asked, wrong)
            more = row.get("input")
            question = _text(row[asked], asked, wrong)
            question += f"\n{_text(more, 'input', wrong)}" if more not in (None, "") else ""
            return {"question": question, "reply": _text(row[told], told, wrong)}
    names = ", ".join(map(str, row)) or "no columns"
    raise wrong(f" has {names[:200]}; it takes {TAKEN}")


def _named(value: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the usual names of columns, where they are not taken."""
    found = dict(value)
    for other, usual in _OTHER_NAMES.items():
        if other in found and usual not in found:
            found[usual] = found.pop(other)
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, name: str, wrong: Wrong) -> str:
    """A column's text: a number as it is written, a list of one value as that value, a list of texts as lines."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and name != "answer" and value and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise wrong(f": {name!r} is {json.dumps(value, default=str)[:60]}, not text; write it in quotes")
    if not value.strip():
        raise wrong(f": {name!r} is empty; fill it in or leave the row out")
    return value


# ---- question, explain, answer ------------------------------------------------------------------------------------


def _explained(row: Mapping[str, Any], wrong: Wrong, index_from: int | None) -> dict[str, str]:
    for name in ("question", "explain", "answer"):
        if name not in row:
            raise wrong(f" has no {name!r}; it takes {TAKEN}")
    question, explain = (_text(row[name], name, wrong) for name in ("question", "explain"))
    choices = _choices_below(question)
    if not choices and row.get("choices"):
        choices = _listed(row["choices"], wrong)
        question = "\n".join([question, *(f"{letter}. {text}" for letter, text in choices.items())])
    answer = row["answer"]
    if isinstance(answer, list) and len(answer) == 1:
        [answer] = answer
    if choices and type(answer) is int and _bare(str(answer)) not in map(_bare, choices.values()):
        return {"question": question, "explain": explain, "answer": _at(answer, choices, wrong, index_from)}
    answer = _text(answer, "answer", wrong)
    if choices:
        answer = _among(answer, choices, wrong)
    return {"question": question, "explain": explain, "answer": answer}


def _among(answer: str, choices: Mapping[str, str], wrong: Wrong) -> str:
    """The letter that the answer is, in whatever form, or the answer itself if it is the text of a choice."""
    stripped = answer.strip()
    form = re.fullmatch(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?[.:)]?", stripped)
    if form is not None and form[1].upper() in choices and _bare(stripped) not in map(_bare, choices.values()):
        return form[1].upper()
    accepted = {_bare(text) for letter, text in choices.items() for text in (letter, text, f"{letter}. {text}")}
    if _bare(stripped) in accepted:
        return answer
    if re.fullmatch(r"\d+", stripped):
        _at(int(stripped), choices, wrong, None)
    raise wrong(
        f": 'answer' is {json.dumps(stripped, ensure_ascii=False)[:60]}, which is neither a letter among the "
        f"question's choices ({', '.join(choices)}) nor the text of one; correct it or leave the row out"
    )


def _at(index: int, choices: Mapping[str, str], wrong: Wrong, index_from: int | None) -> str:
    """The letter of the choice at an index; the message says what the index would mean."""
    letters = list(choices)
    meant = {start: letters[index - start] for start in (0, 1) if 0 <= index - start < len(letters)}
    if index_from in meant:
        return meant[index_from]
    said = " and ".join(f"{letter} if choices count from {start}" for start, letter in meant.items())
    raise wrong(f": 'answer' is {index}, which would mean {said or 'no choice'}; write the letter")


def _choices_below(question: str) -> dict[str, str]:
    """The choices at the end of a question, one line each that begins like `A. ` or `A) `: letter -> text."""
    found: list[tuple[str, str]] = []
    for line in reversed(question.rstrip().split("\n")):
        match = re.fullmatch(r"\s*\(?([A-Z])[.):]\s+(.*\S)\s*", line)
        if match is None:
            break
        found.insert(0, (match[1], match[2]))
    letters = "".join(letter for letter, _ in found)
    return dict(found) if len(found) >= 2 and LETTERS.startswith(letters) else {}


def _listed(value: Any, wrong: Wrong) -> dict[str, str]:
    """The choices in a column: letter -> text."""
    texts = _choice_texts(value)
    if texts is None or not 2 <= len(texts) <= len(LETTERS):
        raise wrong(f": 'choices' is {json.dumps(value, default=str)[:60]}; write a list of two or more texts")
    return dict(zip(LETTERS, (_text(text, "choices", wrong) for text in texts), strict=False))


def _choice_texts(value: Any) -> Sequence[Any] | None:
    """The texts of a list, of ARC's {text, label}, or of {A: text, B: text}; None for anything else."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        return list(value["text"])
    if isinstance(value, dict) and "".join(value) and LETTERS.startswith("".join(value)):
        return list(value.values())
    return None


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


# ---- messages -----------------------------------------------------------------------------------------------------


def _conversation(value: Any, name: str, wrong: Wrong) -> dict[str, Any]:
    """The last message, which must be the assistant's, is the reply to those before it."""
    messages = [_message(one, name, wrong) for one in value] if isinstance(value, list) else []
    roles = [message["role"] for message in messages]
    if len(messages) < 2 or roles[-1] != "assistant" or "user" not in roles:
        raise wrong(f": {name!r} is not a conversation that ends with the assistant's message; correct it")
    *before, reply = messages
    question = next(message["content"] for message in reversed(before) if message["role"] == "user")
    return {"question": question, "reply": reply["content"], "messages": tuple(before)}


def _message(value: Any, name: str, wrong: Wrong) -> dict[str, str]:
    if isinstance(value, str):
        return {"role": "assistant", "content": value}  # a completion beside a prompt of messages
    role = value.get("role", value.get("from")) if isinstance(value, dict) else None
    content = value.get("content", value.get("value")) if isinstance(value, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise wrong(f": a message of {name!r} has no role and text; write {{role, content}}")
    return {"role": _ROLES.get(role, role), "content": content}
