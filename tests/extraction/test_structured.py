"""Answers in JSON, tool calls, tags, tables and tick lists; numbers and statements of other countries."""

from typing import Any

import pytest

from superexperts.extraction import read

RIVERS = (("A", "the Nile"), ("B", "the Rhine"), ("C", "the Ganges"), ("D", "the Volga"))
ASKED = "Which river flows through Cologne?"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('{"thoughts": "The Nile is in Africa.", "finalAnswer": "B"}', "B"),
        ('{"answer": {"label": "B", "text": "the Rhine"}}', "B"),
        ('{"selected_choice": ["B"]}', "B"),
        ('{"answer": ["A", "B"]}', None),
        ('{"answer": "the Rhine"}', "B"),
        ('{"answer": null, "reason": "the Rhine or the Volga"}', None),
        ("{'answer': 'B', 'why': 'the Nile is too far'}", "B"),
        ('Here it is:\n```json\n{"why": "not (A)", "answer": "B"}\n```\nAsk me more!', "B"),
        ('{"why": "The Rhine passes Cologne, so', None),
        ('<tool_call>\n{"name": "answer", "arguments": "{\\"option\\": \\"B\\"}"}\n</tool_call>', "B"),
        ('<tool_call>{"name": "search", "arguments": {"query": "the Rhine"}}</tool_call>', None),
        ('submit_answer("B")', "B"),
        ("<final_answer>B</final_answer>", "B"),
        ("[ANSWER]B[/ANSWER]", "B"),
        ("<answer>The Nile is in Africa. So it must be B.</answer>", "B"),
        ("<answer>B</answer>\n<answer>", "B"),
        ("| River | |\n|---|---|\n| the Nile | ❌ |\n| the Rhine | ✅ |\n| the Volga | ❌ |", "B"),
        ("A. the Nile: no\nB. the Rhine: yes\nC. the Ganges: no", "B"),
        ("| A | the Nile |\n| B | the Rhine |\n| C | the Ganges |\n| D | the Volga |", None),
        ("FINAL_ANSWER: B", "B"),
        ("Die richtige Antwort lautet B.", "B"),
        ("La bonne réponse est B.", "B"),
        ("La respuesta correcta es la B.", "B"),
        ("莱茵河流经科隆，因此选B。", "B"),
        ("正确答案：（B）", "B"),
        ("答案是A和B。", None),
        ("Ｂ", "B"),
    ],
)
def test_choices(text: str, label: str | None) -> None:
    assert read("choice", text, ASKED, RIVERS)[0] == label


def test_the_one_that_is_wrong_answers_a_question_for_it() -> None:
    text = "A. the Nile: correct\nB. the Rhine: incorrect\nC. the Ganges: correct"
    assert read("choice", text, "Which of these rivers is NOT in Africa or Asia?", RIVERS)[0] == "B"
    assert read("choice", text, ASKED, RIVERS)[0] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"unit": "km", "answer": 230}', "230"),
        ('{"name": "calculator", "arguments": {"expression": "23 * 10"}}', None),
        ("<answer>There are 23 boats with 10 people each. They carry 230 people.</answer>", "230"),
        ("The answer is 45 230.", "45230"),
        ("The answer is 100 200 300.", None),
        ("The answer is 2’300’000.", "2300000"),
        ("Answer: ₹4,56,700", "456700"),
        ("Answer: 12_500", "12500"),
        ("Đáp số: 3.250 đồng", "3250"),
        ("Vậy mỗi người nhận 2,75 lít.", "2.75"),
        ("Đáp án: 15 triệu đồng", "15000000"),
        ("Das Ergebnis ist 2.500,75 Euro.", "2500.75"),
        ("The pond is 1.728 m deep.", "1.728"),
        ("They raised $3.2M.", "3200000"),
        ("The answer is three dozen.", "36"),
        ("It lasts 1 hour and 20 minutes, so 80 minutes in total.", "80"),
        ("所以一共有25只船。", "25"),
        ("答案：２５", "25"),
        ("Write '#### 5' at the end.\n\n#### 25", "25"),
        ("#### 24\n\nWait, this is wrong: one is missing.\n\n#### 25", "25"),
        ("#### 24\n\nQuestion: what else?\n#### 25", "24"),
        ("Is it #### 24 or #### 25?", None),
        ("The answer is 24. Wait, let me recheck: 24 +", None),
    ],
)
def test_numbers(text: str, value: str | None) -> None:
    assert read("number", text, "How many people do 23 boats carry?", ())[0] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"answer": false}', "no"),
        ("是的，它流经科隆。", "yes"),
        ("不是。", "no"),
        ("Ja, er fließt durch Köln.", "yes"),
        ("Non.", "no"),
    ],
)
def test_yes_and_no(text: str, value: Any) -> None:
    assert read("yesno", text, "does the Rhine flow through Cologne", ())[0] == value
