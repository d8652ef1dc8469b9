"""The use of each question: test, fine-tuning, or pre-training, which gets all the others."""

from __future__ import annotations

import functools
import random

from tools.pocket.questions import KINDS, Question, draw

__all__ = ["TEST_ROWS", "TRAIN_ROWS", "key", "pools", "reserved_questions", "response"]

TEST_ROWS = 200
"""per benchmark"""
TRAIN_ROWS = 300
"""per kind, for fine-tuning"""


def key(question: Question) -> str:
    """The identity of a question: its text, for boolq with its passage; choices do not count."""
    return f"{question.passage}\n{question.text}" if question.passage else question.text


@functools.cache
def pools() -> dict[str, tuple[tuple[Question, ...], tuple[Question, ...]]]:
    """kind -> (test questions, fine-tuning questions); no two of a kind share their text, or passage and text."""
    made = {}
    for kind in KINDS:
        rng = random.Random(f"pools:{kind}")
        questions: dict[str, Question] = {}
        while len(questions) < TEST_ROWS + TRAIN_ROWS:
            question = draw(kind, rng)
            questions.setdefault(key(question), question)
        listed = list(questions.values())
        made[kind] = tuple(listed[:TEST_ROWS]), tuple(listed[TEST_ROWS:])
    return made


@functools.cache
def reserved_questions() -> frozenset[str]:
    """Keys (`key`) of the questions that pre-training must not use: those for tests and for fine-tuning."""
    return frozenset(key(question) for pool in pools().values() for part in pool for question in part)


def response(question: Question, *, hashes: bool) -> str:
    """The whole response after `Answer:`; `hashes` asks for GSM8K's `#### N` where the answer is a number."""
    if question.kind == "gsm8k" and hashes:
        return f" {question.explain} #### {question.answer}"
    return f" {question.explain} The answer is {question.said}."
