"""OpenBookQA: questions on elementary science with four choices (T. Mihaylov et al., arXiv 1809.02789).

{"id": "8-343", "question_stem": "A person wants to start saving money so that they can afford a nice vacation ...",
 "choices": {"text": ["make more phone calls", "quit eating lunch out", "buy less with monopoly money",
 "have lunch with friends"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"}
"""

from __future__ import annotations

from superexperts.benchmarks import arc
from superexperts.benchmarks.base import Benchmark, FewShot, HubData, Item, Row

__all__ = ["OPENBOOKQA"]


def _read(row: Row, name: str) -> Item:
    return arc.read(row, name, question="question_stem")


OPENBOOKQA = Benchmark(
    name="openbookqa",
    title="OpenBookQA",
    read=_read,
    size=500,
    hub=HubData(path="allenai/openbookqa", config="main", revision="388097ea7776314e93a529163e0fea805b8a6454"),
    file="openbookqa_test",
    examples_file="openbookqa_train",
    few_shot=FewShot(shots=0, folder="openbookqa", task="openbookqa"),
    acc_norm=True,
)
