"""Rows for fine-tuning: `{question, explain, answer}` becomes token ids, with labels for the response only.

The question already holds its choices. The prompt is the one that `evaluate` uses, so that the model is trained on what
it will be asked. Only the response and its EOS are learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superexperts.core.console import note
from superexperts.core.errors import DataError, Field, ModelError, OptionError
from superexperts.core.prompt import prompt_of
from superexperts.data.chat import TRAINED, ChatStyle, Message, chat_asked, conversation, prompt_record, render
from superexperts.data.row_files import data_files, raw_rows
from superexperts.training.columns import TAKEN, counts_from, fields_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Example", "Row", "encode", "load_examples", "prompt", "put_in_chat", "read_rows", "response"]

FIELDS = ("question", "explain", "answer")
"""The columns of the usual rows."""
IGNORED = -100
"""Label of a token that the loss leaves out: the default of torch's cross entropy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A question with the reasoning and the answer, or with a whole reply."""

    number: int
    """Line of a JSONL file, or position in the file, from 1."""
    question: str
    explain: str = ""
    answer: str = ""
    reply: str | None = None
    """The whole reply, for rows that have no reasoning and answer."""
    messages: tuple[Message, ...] = ()
    """The messages before the reply, for rows that are conversations."""

    @property
    def response(self) -> str:
        """The text that the model learns to write, without the EOS that ends it."""
        return response(self.explain, self.answer) if self.reply is None else f" {self.reply}"

    def asked(self, style: ChatStyle) -> list[Message]:
        """The messages before the reply in a chat. A question with an answer is put as `evaluate` puts it."""
        if self.messages:
            own = any(message["role"] == "system" for message in self.messages)
            return [*conversation("", style)[:-1], *self.messages] if not own else list(self.messages)
        return conversation(prompt(self.question) if self.reply is None else self.question, style)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A row in tokens."""

    input_ids: list[int]
    labels: list[int]
    """The same ids for the response and its EOS, `IGNORED` for the prompt."""
    truncated: bool = False
    """Whether the response, EOS included, was cut off at the limit."""


def prompt(question: str) -> str:
    """The text before the response."""
    return prompt_of(question)


def response(explain: str, answer: str) -> str:
    """The text that the model learns to write, without the EOS that ends it."""
    return f" {explain} The answer is {answer}."


def put_in_chat(
    tokenizer: PreTrainedTokenizerBase, setting: str, system_prompt: str | None
) -> tuple[bool, dict[str, Any]]:
    """(whether rows are put as a chat, the record of that for an adapter); `setting` is auto, plain or chat."""
    chat = chat_asked(tokenizer, setting, TRAINED)
    if system_prompt is not None and not chat:
        raise OptionError("needs a chat; give ", Field("prompt"), " chat, or leave it out", field="system_prompt")
    return chat, prompt_record(tokenizer, ChatStyle(system_prompt=system_prompt), TRAINED, chat=chat)


def load_examples(
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat: bool = False,
    system_prompt: str | None = None,
    truncate: bool = False,
    eval_data: Path | None = None,
    eval_share: float = 0,
    seed: int = 0,
) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows set aside, in tokens: those of `eval_data`, or a share of `data` drawn by `seed`."""
    import torch  # here, because a study's check reads rows without it

    rules: dict[str, Any] = {
        "max_length": max_length,
        "chat": chat,
        "system_prompt": system_prompt,
        "truncate": truncate,
    }
    examples = encode(read_rows(data), tokenizer, file=data, **rules)
    cut = sum(example.truncated for example in examples)
    if cut:
        note(f"train: {cut:,} of {len(examples):,} responses were cut off at {max_length} tokens")
    if eval_data is not None:
        rows = read_rows(eval_data, "eval_data")
        return examples, encode(rows, tokenizer, file=eval_data, field="eval_data", **rules)
    aside = max(1, round(eval_share * len(examples))) if eval_share else 0
    if aside >= len(examples):
        what = f"{eval_share} of {len(examples)} rows"
        raise OptionError(f"{what} leaves none to train on; give less", field="eval_share")
    # Its own generator: the global one must not be advanced, or the training would differ without rows set aside.
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = set(order[:aside])
    return (
        [example for number, example in enumerate(examples) if number not in drawn],
        [example for number, example in enumerate(examples) if number in drawn],
    )


def read_rows(file: Path, field: str = "data") -> list[Row]:
    """The rows of a JSON array, or of a JSONL, CSV or Parquet file (each may be gzipped), or of a folder of them.

    `DataError` about `field`, which names the file, the row, what is wrong in it and the columns that it takes.
    """
    values = [(part, *row) for part in data_files(file, field) for row in raw_rows(part, field)]
    index_from = counts_from([value for _, _, value in values])
    rows = []
    for part, number, value in values:

        def wrong(text: str, where: str = f"{part} row {number}") -> DataError:
            return DataError(f"{where}{text}", field=field)

        rows.append(Row(number=number, **fields_of(value, wrong, index_from)))
    if not rows:
        raise DataError(f"{file} has no rows; a row has {TAKEN}", field=field)
    return rows


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    file: Path,
    field: str = "data",
    chat: bool = False,
    system_prompt: str | None = None,
    truncate: bool = False,
) -> list[Example]:
    """Each row as prompt, response and one EOS, in tokens; with BOS in front if the tokenizer itself puts one there.

    The prompt's tokens are always those of the prompt alone, as at inference: where the tokenizer would merge across
    the boundary, the response is encoded separately. With `chat` the prompt is the user's message in the tokenizer's
    chat template, and the response is the assistant's message up to the end of its turn.

    A row of more than `max_length` tokens is cut off and marked if `truncate` is given, and a `DataError` otherwise;
    a prompt that leaves no room for a response always is. `file` and `field` are for messages. `ModelError` for a
    tokenizer without EOS, or without a chat template that `chat` can use.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ModelError("its tokenizer has no EOS token, so no response could end; set eos_token", field="model")
    if chat:
        chat_asked(tokenizer, "chat", TRAINED)
    style = ChatStyle(system_prompt=system_prompt)
    examples = []
    long: list[tuple[Row, int]] = []
    for row in rows:
        if len(row.messages) > 1 and not chat:
            raise DataError(
                f"{file} row {row.number} is a conversation of {len(row.messages) + 1} messages, which plain text "
                "cannot hold; give ",
                *(Field("prompt"), " chat"),
                field=field,
            )
        tokens = _chat_tokens(row, tokenizer, eos, style) if chat else _plain_tokens(row, tokenizer, eos)
        prompt_ids, response_ids = tokens
        input_ids = [*prompt_ids, *response_ids]
        if len(input_ids) > max_length:
            long.append((row, len(input_ids)))
        if truncate and len(prompt_ids) >= max_length:
            raise DataError(
                f"{file} row {row.number}: the prompt alone has {len(prompt_ids)} tokens, which leaves no room for a "
                "response under ",
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
    prompt_text, response_text = prompt(row.question), row.response
    prompt_ids = _without_final(_ids(tokenizer, prompt_text), eos)
    # Encoded together, so that the response starts with the token that the model would generate after the prompt.
    whole = _without_final(_ids(tokenizer, prompt_text + response_text), eos)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, [*whole[len(prompt_ids) :], eos]
    return prompt_ids, [*_without_final(_ids(tokenizer, response_text, add_special_tokens=False), eos), eos]


def _chat_tokens(
    row: Row, tokenizer: PreTrainedTokenizerBase, eos: int, style: ChatStyle
) -> tuple[list[int], list[int]]:
    """Tokens of what comes before the response with the opening of the assistant's turn, and of that turn up to EOS."""
    asked, reply = row.asked(style), row.response.strip()
    opened = render(tokenizer, asked, style, TRAINED)
    whole = render(tokenizer, [*asked, {"role": "assistant", "content": reply}], style, TRAINED, opens_answer=False)
    if not whole.startswith(opened):
        raise ModelError(
            "'chat' needs a chat template in which the whole conversation begins with its prompt, which this one does "
            "not; give plain",
            field="prompt",
        )
    # The template itself writes BOS if there is one.
    prompt_ids = _ids(tokenizer, opened, add_special_tokens=False)
    response_ids = _ids(tokenizer, whole[len(opened) :], add_special_tokens=False)
    return prompt_ids, response_ids if eos in response_ids else [*response_ids, eos]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)


def _without_final(ids: list[int], eos: int) -> list[int]:
    """The ids without a final EOS, which a few tokenizers put after every text."""
    return ids[:-1] if ids and ids[-1] == eos else ids
