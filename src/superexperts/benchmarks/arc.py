"""ARC: science questions from school exams, an easy and a challenge set (P. Clark et al., arXiv 1803.05457).

Some rows have the labels 1 to 4, and some have three or five choices.

    {"id": "Mercury_7081673", "question": "Which piece of safety equipment is used to keep mold spores from entering the
     respiratory system?", "choices": {"text": ["safety goggles", "breathing mask", "rubber gloves", "lead apron"],
     "label": ["A", "B", "C", "D"]}, "answerKey": "B"}
"""

from __future__ import annotations

from collections.abc import Mapping

from superexperts.benchmarks.base import (
    Benchmark,
    FewShot,
    HubData,
    Item,
    Row,
    RowError,
    choice_item,
    read_field,
    read_text,
)

__all__ = ["ARC_CHALLENGE", "ARC_EASY", "read"]


def read(row: Row, name: str, question: str = "question") -> Item:
    """The item of a row in ARC's layout; `question` is the column of the question."""
    choices = read_field(row, "choices", Mapping)
    labels, texts = read_field(choices, "label", list), read_field(choices, "text", list)
    if len(labels) != len(texts):
        raise RowError(f"field 'choices' has {len(labels)} labels and {len(texts)} texts")
    pairs = [(str(label).strip(), str(text).strip()) for label, text in zip(labels, texts, strict=True)]
    return choice_item(str(row.get("id") or name), read_text(row, question), pairs, read_text(row, "answerKey"))


_REVISION = "210d026faf9955653af8916fad021475a3f00453"

ARC_EASY = Benchmark(
    name="arc_easy",
    title="ARC-E",
    read=read,
    size=2376,
    hub=HubData(path="allenai/ai2_arc", config="ARC-Easy", revision=_REVISION),
    file="arc_easy_test",
    examples_file="arc_easy_train",
    few_shot=FewShot(shots=0, folder="arc", task="arc_easy"),
    acc_norm=True,
    result_column=1,
)

ARC_CHALLENGE = Benchmark(
    name="arc_challenge",
    title="ARC-C",
    read=read,
    size=1172,
    original_name="arc",  # rep/arc.py loads the challenge set, although the original's table calls it ARC-E
    hub=HubData(path="allenai/ai2_arc", config="ARC-Challenge", revision=_REVISION),
    file="arc_challenge_test",
    examples_file="arc_challenge_train",
    few_shot=FewShot(shots=25, folder="arc", task="arc_challenge"),
    acc_norm=True,
)
