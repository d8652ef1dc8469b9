"""MedQA: questions from US medical licensing exams with four choices (D. Jin et al., arXiv 2009.13081).

    {"question": "A 67-year-old man with transitional cell carcinoma of the bladder comes to the physician ...",
     "answer": "Cross-linking of DNA", "options": {"A": "Inhibition of proteasome", "B": "Hyperstabilization of
     microtubules", "C": "Generation of free radicals", "D": "Cross-linking of DNA"}, "meta_info": "step1",
     "answer_idx": "D"}

`options` can also be a list of {"key": "A", "value": "Inhibition of proteasome"}, as in lavita/medical-qa-datasets.
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
    gold_number,
    read_field,
    read_text,
)

__all__ = ["MEDQA"]


def _read(row: Row, name: str) -> Item:
    options = read_field(row, "options", (Mapping, list))
    if isinstance(options, list):
        options = {read_text(option, "key"): read_text(option, "value") for option in options}
    # Arrow gives every row the union of all rows' keys, with None where a row has no such option.
    pairs = sorted((str(label), str(text).strip()) for label, text in options.items() if text is not None)
    return choice_item(name, read_text(row, "question"), pairs, read_text(row, "answer_idx"))


def _harness_row(item: Item, row: Row) -> Row:
    labels = [label for label, _ in item.choices]
    if labels != ["A", "B", "C", "D"]:
        raise RowError(f"{item.id} has the choices {','.join(labels)}; the harness's task needs A,B,C,D")
    endings = {f"ending{i}": text for i, (_, text) in enumerate(item.choices)}
    return {"sent1": row["question"], **endings, "label": gold_number(item)}


MEDQA = Benchmark(
    name="medqa",
    title="MedicalQA",
    read=_read,
    size=1273,
    original_name="med",
    hub=HubData(path="GBaker/MedQA-USMLE-4-options", revision="0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18"),
    file="medqa_gbaker_test",
    other_file="medqa_lavita_test",
    examples_file="medqa_gbaker_train",
    few_shot=FewShot(shots=0, folder="medqa", task="medqa_4options", row=_harness_row),
    acc_norm=True,
    result_column=4,
)
