"""GSM8K: word problems with a number as the answer (K. Cobbe et al., arXiv 2110.14168).

{"question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it
 take?", "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\\nSo the total amount of fabric is 2+1=<<2+1=3>>3
 bolts of fabric\\n#### 3"}
"""

from __future__ import annotations

import re

from superexperts.benchmarks.base import Benchmark, FewShot, HubData, Item, Row, RowError, read_text

__all__ = ["GSM8K"]


def _read(row: Row, name: str) -> Item:
    found = re.search(r"####\s*(-?[\d,]+(?:\.\d+)?)\s*$", read_text(row, "answer"))
    if found is None:
        raise RowError("field 'answer' does not end in '#### NUMBER'")
    gold = found[1].replace(",", "")
    return Item(id=name, body=read_text(row, "question"), choices=(), gold=gold, kind="number")


GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    read=_read,
    size=1319,
    hub=HubData(path="openai/gsm8k", config="main", revision="740312add88f781978c0658806c59bc2815b9866"),
    file="gsm8k_main_test",
    examples_file="gsm8k_main_train",
    few_shot=FewShot(shots=5, folder="gsm8k", task="gsm8k"),
    result_column=2,
)
