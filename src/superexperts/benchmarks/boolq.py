"""BoolQ: yes-or-no questions about a passage (C. Clark et al., arXiv 1905.10044).

{"question": "is house tax and property tax are same", "answer": true, "passage": "Property tax or 'house tax' is a
 local tax on buildings, along with appurtenant land. ..."}
"""

from __future__ import annotations

from superexperts.benchmarks.base import Benchmark, FewShot, HubData, Item, Row, read_field, read_text

__all__ = ["BOOLQ"]


def _read(row: Row, name: str) -> Item:
    question, gold = read_text(row, "question").rstrip("?"), "yes" if read_field(row, "answer", bool) else "no"
    return Item(id=name, body=f"{read_text(row, 'passage')}\n{question}?", choices=(), gold=gold, kind="yesno")


def _harness_row(item: Item, row: Row) -> Row:
    # The harness reads SuperGLUE's columns. Its passages begin with a title; those of google/boolq do not.
    return {"question": row["question"].rstrip("?"), "passage": row["passage"], "label": int(row["answer"])}


BOOLQ = Benchmark(
    name="boolq",
    title="BoolQ",
    read=_read,
    size=3270,
    hub=HubData(path="google/boolq", revision="35b264d03638db9f4ce671b711558bf7ff0f80d5"),
    split="validation",  # the test split has no answers
    file="boolq_validation",
    examples_file="boolq_train",
    few_shot=FewShot(shots=0, folder="super_glue/boolq", task="boolq", row=_harness_row),
    result_column=3,
)
