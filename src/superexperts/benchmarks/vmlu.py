"""VMLU: Vietnamese questions on 58 subjects with three to five choices (github.com/ZaloAI-Jaist/VMLU).

The subject is the number before the dash of the id, and every choice begins with its label.

    {"id": "28-0008", "question": "Những yếu tố nào sau đây có thể dẫn đến thâm hụt cán cân thương mại của một nước:",
     "choices": ["A. Đồng nội tệ xuống giá so với đồng ngoại tệ", "B. Sự gia tăng của đầu tư trực tiếp nước ngoài",
     "C. Thu nhập của các nước đối tác mậu dịch chủ yếu tăng", "D. Các lựa chọn đều sai"], "answer": "D"}
"""

from __future__ import annotations

import re

from superexperts.benchmarks.base import (
    Benchmark,
    FewShot,
    Item,
    Row,
    RowError,
    Withheld,
    choice_item,
    gold_number,
    read_field,
    read_text,
)

__all__ = ["VMLU"]


def _read(row: Row, name: str) -> Item:
    pairs = []
    for choice in read_field(row, "choices", list):
        found = re.match(r"\s*([A-Z])\s*[.):]\s*", str(choice))
        if found is None:
            raise RowError(f"field 'choices' has {str(choice)[:40]!r}, which does not begin with a label like 'A. '")
        pairs.append((found[1], str(choice)[found.end() :].strip()))
    row_id = str(row.get("id") or "")
    gold = None if row.get("answer") is None else read_text(row, "answer")  # test rows have no answer
    return choice_item(row_id or name, read_text(row, "question"), pairs, gold, row_id.rpartition("-")[0] or None)


def _harness_row(item: Item, row: Row) -> Row:
    return {"body": item.body, "labels": [label for label, _ in item.choices], "answer": gold_number(item)}


# The harness has no VMLU. This is its layout of MMLU, in Vietnamese.
_TASK = {
    "task": "vmlu_loglikelihood",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "description": "Trả lời câu hỏi trắc nghiệm.\n\n",
    "doc_to_text": "Câu hỏi: {{body}}\nĐáp án đúng là:",
    "doc_to_choice": "labels",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}

VMLU = Benchmark(
    name="vmlu",
    title="VMLU",
    read=_read,
    size=744,
    split="valid",
    file="vmlu_valid",
    examples_file="vmlu_dev",
    source="VMLU MQA v1.5 from github.com/ZaloAI-Jaist/VMLU",
    withheld=Withheld(file="vmlu_test"),
    few_shot=FewShot(shots=5, config=_TASK, by_subject=True, row=_harness_row),
    # The groups of the result table in the publisher's repository.
    groups={
        "STEM": tuple(f"{number:02d}" for number in range(1, 22)),
        "social science": tuple(f"{number:02d}" for number in range(22, 32)),
        "humanity": tuple(f"{number:02d}" for number in range(32, 50)),
        "other": tuple(f"{number:02d}" for number in range(50, 59)),
    },
    result_column=5,
)
