"""A benchmark's row -> an item: what is asked, what may be chosen, and what is right. Pure functions, no data set.

One prompt for every variant of a model: `Question: {body}\\nAnswer:`. Real rows, in the columns of their Hub data sets:

    mmlu      {"question": "Find the degree for ...", "subject": "abstract_algebra", "choices": ["0", "4", "2", "6"],
               "answer": 1}
    gsm8k     {"question": "Janet's ducks lay 16 eggs ...", "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs
               a day.\\n ... \\n#### 18"}
    arc_easy  {"id": "Mercury_417466", "question": "Which statement best explains ...", "choices": {"text": ["Sunlight
               is ...", ...], "label": ["A", "B", "C", "D"]}, "answerKey": "A"}; labels can be 1-4, choices 3 to 5
    arc_challenge  as arc_easy
    openbookqa  {"id": "8-343", "question_stem": "A person wants to start saving money so that they can afford a nice
               vacation ...", "choices": {"text": ["make more phone calls", ...], "label": ["A", "B", "C", "D"]},
               "answerKey": "B"}
    boolq     {"question": "is house tax and property tax are same", "passage": "Property tax ...", "answer": true}
    medqa     {"question": "A junior ...", "answer": "Tell the ...", "options": {"A": "Disclose ...", ...},
               "meta_info": "step1", "answer_idx": "B"}; options can be a list of {"key": "A", "value": "Disclose ..."}
    vmlu      {"id": "28-0007", "question": "Hoạt động nào ...", "choices": ["A. Bán ngoại tệ ...", ...], "answer":
               "C"}; three to five choices that begin with their label; test rows have no `answer`
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from superexperts.core.errors import DataError
from superexperts.core.prompt import prompt_of

__all__ = ["Item", "prompt", "read_item"]

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark."""

    id: str
    """The row's own id, or `<task>-<index>` where it has none."""
    body: str
    """What stands between `Question: ` and `\\nAnswer:`."""
    choices: tuple[tuple[str, str], ...]
    """(label, text) of each choice in order; empty for numbers and yes/no."""
    gold: str | None
    """The right choice's label, "yes" / "no", or a plain number; None where the publisher keeps it."""
    kind: Literal["choice", "number", "yesno"]
    subject: str | None = None
    """What the benchmark files the item under: MMLU's subject, the number before the dash of VMLU's ids."""


def prompt(item: Item) -> str:
    """The whole prompt; a response begins right after it."""
    return prompt_of(item.body)


def read_item(task: str, row: Row, index: int) -> Item:
    """The item of a benchmark's row; `index` counts from 0.

    `DataError` names the row and the field that is missing, empty or of the wrong type.
    """
    try:
        return READERS[task](row, f"{task}-{index}")
    except _FieldError as error:
        raise DataError(f"{task}: row {index + 1}: {error}; repair the data file") from error


class _FieldError(ValueError):
    """What is wrong with one field of a row."""


def _field(row: Row, name: str, kind: type | tuple[type, ...]) -> Any:
    value = row.get(name)
    if value is None:
        raise _FieldError(f"field {name!r} is missing")
    # bool is an int to Python, but `true` is no index
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _FieldError(f"field {name!r} is {str(value)[:40]!r}, of the wrong type")
    return value


def _text(row: Row, name: str) -> str:
    text: str = _field(row, name, str).strip()
    if not text:
        raise _FieldError(f"field {name!r} is empty")
    return text


def _choice_item(
    name: str, question: str, choices: list[tuple[str, str]], gold: str | None, subject: str | None = None
) -> Item:
    """A question with its labelled choices, in the rows' own labels."""
    labels = [label for label, _ in choices]
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise _FieldError(f"choices are labelled {labels}: two or more different labels are needed")
    if gold is not None and gold not in labels:
        raise _FieldError(f"the answer is {gold!r}, which is none of the labels {labels}")
    lines = [f"{label}. {text}" for label, text in choices]
    body = "\n".join([question, *lines])
    return Item(id=name, body=body, choices=tuple(choices), gold=gold, kind="choice", subject=subject)


def _mmlu(row: Row, name: str) -> Item:
    texts = [str(text).strip() for text in _field(row, "choices", list)]
    index = _field(row, "answer", int)
    labels = "ABCDEFGHIJ"[: len(texts)]
    # By index, never by text: some rows have two equal choices.
    gold = labels[index] if 0 <= index < len(labels) else str(index)
    subject = row.get("subject")
    return _choice_item(
        name,
        _text(row, "question"),
        list(zip(labels, texts, strict=True)),
        gold,
        subject if isinstance(subject, str) and subject else None,
    )


def _gsm8k(row: Row, name: str) -> Item:
    found = re.search(r"####\s*(-?[\d,]+(?:\.\d+)?)\s*$", _text(row, "answer"))
    if found is None:
        raise _FieldError("field 'answer' does not end in '#### NUMBER'")
    gold = found[1].replace(",", "")
    return Item(id=name, body=_text(row, "question"), choices=(), gold=gold, kind="number")


def _arc(row: Row, name: str, question: str = "question") -> Item:
    choices = _field(row, "choices", Mapping)
    labels, texts = _field(choices, "label", list), _field(choices, "text", list)
    if len(labels) != len(texts):
        raise _FieldError(f"field 'choices' has {len(labels)} labels and {len(texts)} texts")
    pairs = [(str(label).strip(), str(text).strip()) for label, text in zip(labels, texts, strict=True)]
    return _choice_item(str(row.get("id") or name), _text(row, question), pairs, _text(row, "answerKey"))


def _openbookqa(row: Row, name: str) -> Item:
    return _arc(row, name, "question_stem")


def _boolq(row: Row, name: str) -> Item:
    question, gold = _text(row, "question").rstrip("?"), "yes" if _field(row, "answer", bool) else "no"
    return Item(id=name, body=f"{_text(row, 'passage')}\n{question}?", choices=(), gold=gold, kind="yesno")


def _medqa(row: Row, name: str) -> Item:
    options = _field(row, "options", (Mapping, list))
    if isinstance(options, list):  # as lavita/medical-qa-datasets has them
        options = {_text(option, "key"): _text(option, "value") for option in options}
    # Arrow gives every row the union of all rows' keys, with None where a row has no such option.
    pairs = sorted((str(label), str(text).strip()) for label, text in options.items() if text is not None)
    return _choice_item(name, _text(row, "question"), pairs, _text(row, "answer_idx"))


def _vmlu(row: Row, name: str) -> Item:
    pairs = []
    for choice in _field(row, "choices", list):
        found = re.match(r"\s*([A-Z])\s*[.):]\s*", str(choice))
        if found is None:
            raise _FieldError(f"field 'choices' has {str(choice)[:40]!r}, which does not begin with a label like 'A. '")
        pairs.append((found[1], str(choice)[found.end() :].strip()))
    own = str(row.get("id") or "")
    subject = own.rpartition("-")[0] or None
    gold = None if row.get("answer") is None else _text(row, "answer")
    return _choice_item(own or name, _text(row, "question"), pairs, gold, subject)


READERS: dict[str, Callable[[Row, str], Item]] = {
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "medqa": _medqa,
    "vmlu": _vmlu,
}


# ---- what the task files name: doc_to_text, doc_to_target and process_results, each of one row ---------------------


def _text_of(task: str) -> Callable[[Row], str]:
    return lambda row: prompt(read_item(task, row, 0))


def _gold_of(task: str) -> Callable[[Row], str]:
    return lambda row: read_item(task, row, 0).gold or ""


mmlu_text, mmlu_gold = _text_of("mmlu"), _gold_of("mmlu")
gsm8k_text, gsm8k_gold = _text_of("gsm8k"), _gold_of("gsm8k")
arc_easy_text, arc_easy_gold = _text_of("arc_easy"), _gold_of("arc_easy")
arc_challenge_text, arc_challenge_gold = _text_of("arc_challenge"), _gold_of("arc_challenge")
openbookqa_text, openbookqa_gold = _text_of("openbookqa"), _gold_of("openbookqa")
boolq_text, boolq_gold = _text_of("boolq"), _gold_of("boolq")
medqa_text, medqa_gold = _text_of("medqa"), _gold_of("medqa")
vmlu_text, vmlu_gold = _text_of("vmlu"), _gold_of("vmlu")


def unscored(row: Row, responses: list[str]) -> dict[str, float]:
    """The harness scores nothing: `extract` reads the raw responses, and what it cannot read is counted."""
    return {"bypass": 0.0}
