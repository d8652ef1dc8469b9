"""What commits to an answer, and what only speaks of one: negations, several options, conditions, working."""

import pytest

from superexperts.extraction import read

GASES = (("A", "helium"), ("B", "oxygen"), ("C", "neon"), ("D", "argon"))
ASKED = "Which of these gases is NOT a noble gas?"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The gas that is not noble is (B).", "B"),
        ("The one that is incorrect is option B.", "B"),
        ("All others are noble. Thus, the gas that is not is **B. oxygen**.", "B"),
        ("A, C and D are all correct.", None),
        ("Options A and C both fit.", None),
        ("It is not A since helium is noble. It's also not C. That leaves B or D.", None),
        ("Both B and D seem possible, however B is more likely.", "B"),
        ("Look at each option:\n\nA. helium - noble.\nB. oxygen: reacts.\nC. neon.\n\nSo B is the best choice.", "B"),
        ("Look at each option:\n\nA. helium - noble.\nB. oxygen - reacts.\nC. neon - noble.\nD. argon - noble.", None),
        ("Now to each of the options.\n(A) is one of them.\n(B) is not one of them.\nThe answer is (B).", "B"),
        ("The odd one out is a:\n\nB. oxygen\n\nReason: it takes part in burning and", "B"),
        ("The answer is A. Wait, no. Helium is noble. The answer is B.", "B"),
        ("Is it A, or", None),
    ],
)  # fmt: skip
def test_options(text: str, label: str | None) -> None:
    assert read("choice", text, ASKED, GASES)[0] == label


def test_a_figure_on_the_way_is_no_option() -> None:
    options = (("A", "21"), ("B", "42"), ("C", "63"))
    text = "The first three terms add up to 21, so the ratio is 2. The next terms follow, but this is odd."
    assert read("choice", text, "What is the sum of the next terms?", options)[0] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is yes if the gas is pure, and no otherwise.", None),
        ("No information is given about this gas.", None),
        ("No, it burns.", "no"),
        ("I would say yes, though I am not sure.", "yes"),
    ],
)
def test_yes_and_no(text: str, value: str | None) -> None:
    assert read("yesno", text, "is oxygen noble", ())[0] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Let x be the litres. Then 2x + 3 = 15.", None),
        ("So x = 6 litres.", "6"),
        ("First, calculate 12 * 12.", None),
        ("#### 6\n\nBut is it 6, or 7? Usually one would say", None),
        ("Now in code:\n```python\n# the first 5 litres\nlitres = total", None),
    ],
)
def test_numbers(text: str, value: str | None) -> None:
    assert read("number", text, "How many litres?", ())[0] == value
