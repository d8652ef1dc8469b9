"""An answer that breaks off has not come to its conclusion: what it says on the way is working."""

import pytest

from superexperts.extraction import read
from superexperts.extraction.endings import breaks_off

CUT = [
    "A crate holds 6 jars. Two crates hold",
    "A crate holds 6 jars.\n\nNext,",
    "1. A crate holds 6 jars.\n2. Two crates hold 12 jars.\n3",
    "1. A crate holds 6 jars.\n2. Two crates hold 2 * 6 = 12 ja",
    "jars = 6\ncrates = 2\ntotal =",
    "**Step 1:** 2 + 6 = 8\n\n**Step 2: Count",
    "Bước 1: 2 + 6 = 8.\n\n### Bước 2",
    "The sum is\n\\[\n2 \\times 6 = 12",
    "The sum is $\\frac{12}{2} = 6",
    "She pays 2 * $",
    "* 2 crates: right.\n*",
    "She has 6 jars (2 of them",
]
WHOLE = [
    "A crate holds 6 jars.",
    "12",
    "12 jars",
    "So she has 12 - 3 = 9 jars",
    "She buys 12 jars.\n\n**9**",
    "She buys 12 jars.\n\n\\[\\boxed{9}\\]",
    "12 - 3 = 9\n9 jars",
    "B",
    "| A | no |\n| B | yes |",
    'print("nine")\n```',
]


@pytest.mark.parametrize("text", CUT)
def test_a_text_that_breaks_off(text: str) -> None:
    assert breaks_off(text)


@pytest.mark.parametrize("text", CUT)
def test_no_number_is_read_where_the_text_breaks_off(text: str) -> None:
    assert read("number", text, "How many jars does Mai have?", ())[0] is None


@pytest.mark.parametrize("text", WHOLE)
def test_a_text_that_has_come_to_its_end(text: str) -> None:
    assert not breaks_off(text)


METALS = (("A", "lead"), ("B", "mercury"), ("C", "zinc"))


@pytest.mark.parametrize(
    "text",
    [
        "Metals differ in how they melt. Some, such as mercury, are",
        "Mercury is a metal with a density of 13.5 grams per cubic centimetre that miners have used for ages and",
        "(a) The density follows from mass and volume, which the table gives. (b) The melting point",
        "a) The density follows from the mass and the volume, both of which the table gives for each",
    ],
)
def test_no_option_is_read_out_of_the_working(text: str) -> None:
    assert read("choice", text, "Which metal is liquid at room temperature?", METALS)[0] is None


def test_a_statement_before_the_break_counts() -> None:
    text = "The answer is B. Mercury has its melting point at"
    assert read("choice", text, "Which metal is liquid at room temperature?", METALS)[0] == "B"


def test_the_number_of_a_step_is_not_the_answer() -> None:
    assert read("number", "First count the jars.\n3. Then we are done.", "How many?", ())[0] is None


def test_an_answer_that_runs_on_into_another_turn_is_not_cut() -> None:
    text = "She has 9 jars. The next one is:\n\nQuestion: How many"
    assert read("number", text, "How many jars does Mai have?", ())[0] == "9"
