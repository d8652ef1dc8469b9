"""Tiny sums: a benchmark as one file, src/superexperts/benchmarks/sums.py. Its line in the registry: "sums.SUMS".

{"question": "Which is 2 + 2?", "choices": ["3", "4"], "answer": 1}
"""

from __future__ import annotations

from superexperts.benchmarks.base import Benchmark, Item, Row, choice_item, read_field, read_text

__all__ = ["SUMS"]


def _read(row: Row, name: str) -> Item:
    texts = [str(text) for text in read_field(row, "choices", list)]
    choices = list(zip("ABCDEFGH", texts, strict=False))
    gold = "ABCDEFGH"[read_field(row, "answer", int)]
    return choice_item(name, read_text(row, "question"), choices, gold)


SUMS = Benchmark(
    name="sums",
    title="Sums",
    read=_read,
    size=2,
    file="sums_test",
    examples_file="sums_train",
    source="the rows in this example",
)
