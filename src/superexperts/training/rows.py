"""Rows for fine-tuning: `{question, explain, answer}` -> token ids, and a label for every token that is learnt.

The question holds its choices already. The prompt is what `evaluate` asks too, so the model is trained on what it
will see; only the response and its EOS are learnt.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from superexperts.core.errors import DataError, Field, ModelError
from superexperts.core.prompt import prompt_of

__all__ = ["FIELDS", "IGNORED", "Example", "Row", "encode", "prompt", "read_rows", "response"]

FIELDS = ("question", "explain", "answer")
IGNORED = -100
"""Label of a token that the loss leaves out (torch's cross entropy's default)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A question, the reasoning and the answer."""

    number: int
    """Line of a JSONL file, or position in a JSON array, from 1."""
    question: str
    explain: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A row in tokens."""

    input_ids: list[int]
    labels: list[int]
    """The same ids for the response and its EOS, `IGNORED` for the prompt."""
    truncated: bool = False
    """Whether the response, EOS included, was cut off at the limit."""


def prompt(question: str) -> str:
    """What the model is asked."""
    return prompt_of(question)


def response(explain: str, answer: str) -> str:
    """What it is to say, before EOS."""
    return f" {explain} The answer is {answer}."


def read_rows(file: Path, field: str = "data") -> list[Row]:
    """The rows of a JSON array or of a JSONL file (either may be gzipped); `DataError` names file, row and field."""
    rows = [_row(value, number, file, field) for number, value in _values(file, field)]
    if not rows:
        raise DataError(f"{file} has no rows; give rows of {{question, explain, answer}}", field=field)
    return rows


def _values(file: Path, field: str) -> Iterator[tuple[int, Any]]:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror or error}); check the path", field=field) from error
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); save it as UTF-8", field=field) from error
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} is not valid JSON ({error}); repair it", field=field) from error
        return
    # Not str.splitlines: JSON may hold the other line ends that it knows, such as U+2028, as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file} row {number} is not valid JSON ({error}); repair it", field=field) from error


def _row(value: Any, number: int, file: Path, field: str) -> Row:
    where = f"{field}: {file} row {number}"
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}, not an object; write {{question, explain, answer}}")
    for field in FIELDS:
        if field not in value:
            raise DataError(f"{where} has no {field!r}; give question, explain and answer")
        if not isinstance(value[field], str):
            raise DataError(f"{where}: {field!r} is {json.dumps(value[field])[:60]}, not text; write it in quotes")
        if not value[field].strip():
            raise DataError(f"{where}: {field!r} is empty; fill it in or leave the row out")
    choices = _choices(value["question"])
    answer = value["answer"].strip()
    accepted = {_bare(text) for letter, text in choices.items() for text in (letter, text, f"{letter}. {text}")}
    if choices and _bare(answer) not in accepted:
        raise DataError(
            f"{where}: 'answer' is {json.dumps(answer, ensure_ascii=False)[:60]}, which is neither a letter among the "
            f"question's choices ({', '.join(choices)}) nor the text of one; correct it or leave the row out"
        )
    return Row(number=number, **{field: value[field] for field in FIELDS})


def _choices(question: str) -> dict[str, str]:
    """The choices that end a question, a line each from `A. ` or `A) ` on: letter -> text; none for other questions."""
    found: list[tuple[str, str]] = []
    for line in reversed(question.rstrip().split("\n")):
        match = re.fullmatch(r"\s*\(?([A-Z])[.):]\s+(.*\S)\s*", line)
        if match is None:
            break
        found.insert(0, (match[1], match[2]))
    letters = "".join(letter for letter, _ in found)
    return dict(found) if len(found) >= 2 and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters) else {}


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    file: Path,
    field: str = "data",
    chat: bool = False,
    truncate: bool = False,
) -> list[Example]:
    """Each row as prompt, response and one EOS, in tokens; BOS is put in front where the tokenizer itself puts one.

    The prompt's tokens are always those of the prompt alone, as at inference: where the tokenizer would merge over
    the border, the response is encoded by itself. With `chat` the prompt is the user's message in the tokenizer's chat
    template and the response the assistant's, up to what the template ends a turn with. A row of more than
    `max_length` tokens is cut off, and marked, with `truncate`, and otherwise a `DataError` that says how many there
    are; so is a prompt that leaves no room for a response.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ModelError("its tokenizer has no EOS token, so no response could end; set eos_token", field="model")
    if chat and tokenizer.chat_template is None:
        raise ModelError("'chat' needs a chat template, which MODEL's tokenizer has not; give plain", field="prompt")
    examples = []
    long: list[tuple[Row, int]] = []
    for row in rows:
        prompt_ids, response_ids = _chat_tokens(row, tokenizer, eos) if chat else _plain_tokens(row, tokenizer, eos)
        input_ids = [*prompt_ids, *response_ids]
        if len(input_ids) > max_length:
            long.append((row, len(input_ids)))
        if truncate and len(prompt_ids) >= max_length:
            raise DataError(
                (
                    f"{file} row {row.number}: the prompt alone has {len(prompt_ids)} tokens, which leaves no room "
                    "for a response under "
                ),
                Field("max_length"),
                f" {max_length}; shorten 'question' or raise ",
                Field("max_length"),
                field=field,
            )
        labels = [IGNORED] * len(prompt_ids) + response_ids
        truncated = len(input_ids) > max_length
        examples.append(Example(input_ids=input_ids[:max_length], labels=labels[:max_length], truncated=truncated))
    if long and not truncate:
        row, length = long[0]
        others = f", and {len(long) - 1} more rows" if len(long) > 1 else ""
        raise DataError(
            f"{file} row {row.number} has {length} tokens, over ",
            Field("max_length"),
            f" {max_length}{others}; shorten 'explain', raise ",
            Field("max_length"),
            ", or give ",
            Field("truncate"),
            field=field,
        )
    return examples


def _plain_tokens(row: Row, tokenizer: PreTrainedTokenizerBase, eos: int) -> tuple[list[int], list[int]]:
    """Prompt, response with EOS."""
    prompt_text, response_text = prompt(row.question), response(row.explain, row.answer)
    prompt_ids = _without_final(_ids(tokenizer, prompt_text), eos)
    whole = _without_final(_ids(tokenizer, prompt_text + response_text), eos)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, [*whole[len(prompt_ids) :], eos]
    return prompt_ids, [*_without_final(_ids(tokenizer, response_text, add_special_tokens=False), eos), eos]


def _chat_tokens(row: Row, tokenizer: PreTrainedTokenizerBase, eos: int) -> tuple[list[int], list[int]]:
    """The user's turn and what opens the assistant's; the assistant's, which EOS ends if the template does not."""
    turns = [
        {"role": "user", "content": prompt(row.question)},
        {"role": "assistant", "content": response(row.explain, row.answer).strip()},
    ]
    opened = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if not whole.startswith(opened):
        raise ModelError(
            (
                "'chat' needs a chat template whose whole conversation begins with its prompt, which MODEL's "
                "does not; give plain"
            ),
            field="prompt",
        )
    # The template writes BOS itself where there is one.
    prompt_ids = _ids(tokenizer, opened, add_special_tokens=False)
    response_ids = _ids(tokenizer, whole[len(opened) :], add_special_tokens=False)
    return prompt_ids, response_ids if eos in response_ids else [*response_ids, eos]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)


def _without_final(ids: list[int], eos: int) -> list[int]:
    """A few tokenizers end every text with EOS of their own accord."""
    return ids[:-1] if ids and ids[-1] == eos else ids
