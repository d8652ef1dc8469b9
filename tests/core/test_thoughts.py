"""Thoughts are split from what is said, whatever a model marks them with."""

import pytest

from superexperts.core.thoughts import before_stop, end_for, is_mark, leaves_open, split_thoughts

MARKS = [
    ("<think>", "</think>"),
    ("<Thinking>", "</Thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ('<think duration="3">', "</think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"),
    ("<|im_start|>think\n", "<|im_start|>answer\n"),
    ("Here is my thought process:\n", "\nHere is my response:\n"),
    ("## Thinking\n", "\n## Final Response\n"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
]


@pytest.mark.parametrize(("opens", "ends"), MARKS)
def test_thoughts_and_text_are_parted(opens: str, ends: str) -> None:
    parts = split_thoughts(f"{opens}Bronze? No, tin.{ends}Tin it is.")
    assert parts.thoughts.removesuffix("<|end|><|begin|>assistant") == "Bronze? No, tin."
    assert (parts.text, parts.finished) == ("Tin it is.", True)


@pytest.mark.parametrize(("opens", "ends"), MARKS)
def test_thoughts_without_an_end_are_not_finished(opens: str, ends: str) -> None:
    assert split_thoughts(f"{opens}The answer is bronze. But wait") == ("The answer is bronze. But wait", "", False)


@pytest.mark.parametrize(
    ("text", "thoughts", "said"),
    [
        ("Bronze is softer.</think>\n\nTin", "Bronze is softer.", "Tin"),  # opened in the prompt
        ("<think>\n\n</think>\n\nTin", "", "Tin"),
        ("<think>one</think>First<think>two</think>Tin", "one\n\ntwo", "First\n\nTin"),
        ("<think>Use <answer> and </thinking tags.</think>Tin", "Use <answer> and </thinking tags.", "Tin"),
        ("<thinking>1 <reflection>2</reflection> 3</thinking>Tin", "1 <reflection>2</reflection> 3", "Tin"),
        ("<think>one</thinking>Tin", "one", "Tin"),
        ("one</think>Tin</think>", "one", "Tin"),
        ("one, as </think> says</think>Tin", "one, as\n\nsays", "Tin"),
        ("Tin\n<think>Or is it", "Or is it", "Tin"),
        ("<think>It is tin.\n<answer>tin</answer>", "It is tin.", "<answer>tin</answer>"),
        ("final**Tin**", "", "**Tin**"),
        ("I think the reason is tin.", "", "I think the reason is tin."),
        ("analysis of the metals shows tin", "", "analysis of the metals shows tin"),
        ("x < 3 and [thinking] aloud", "", "x < 3 and [thinking] aloud"),
    ],
)  # fmt: skip
def test_blocks_of_every_shape(text: str, thoughts: str, said: str) -> None:
    assert split_thoughts(text) == (thoughts, said, True)


def test_an_answer_tag_amid_thoughts_does_not_end_them() -> None:
    assert not split_thoughts("<think>Is it\n<answer>tin</answer>\nor not? Let me").finished


def test_channels_other_than_final_are_thoughts() -> None:
    text = (
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        "<|constrain|>json<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>Tin<|return|><|start|>user"
    )
    assert split_thoughts(text) == ("one\n\n{}", "Tin", True)


def test_the_models_own_marks() -> None:
    assert split_thoughts("{{hm}}one{{/hm}}Tin", own=[("{{hm}}", "{{/hm}}")]) == ("one", "Tin", True)


def test_a_prompt_that_opens_thoughts() -> None:
    assert leaves_open("<|im_start|>assistant\n<think>\n")
    assert leaves_open("<|start|>assistant<|channel|>analysis<|message|>")
    assert not leaves_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not leaves_open("Do <think> tags matter? Answer:")
    assert split_thoughts("The answer is tin. But", opened=True) == ("The answer is tin. But", "", False)
    assert split_thoughts("<think>\nHm.</think>Tin", opened=True) == ("Hm.", "Tin", True)


def test_stop_texts_do_not_apply_inside_thoughts() -> None:
    text = "<think>Question: which metal?\nQuestion: is it tin?</think>\nTin.\nQuestion: and then?"
    assert before_stop(text, ["Question:"]) == "<think>Question: which metal?\nQuestion: is it tin?</think>\nTin.\n"
    assert before_stop("<think>Question: which", ["Question:"]) == "<think>Question: which"
    assert before_stop("Tin.\nQuestion: and then?", ["Question:"]) == "Tin.\n"


def test_time_is_linear_in_the_text() -> None:
    """Each of these would take minutes in quadratic time; the limit of a test ends them."""
    for part in (
        "<think>",
        "</think>",
        "<",
        "<|channel|>",
        "<|channel|>analysis",
        "\n<answer>",
        "assistantfinal",
        "[THINK]",
    ):
        parts = split_thoughts(part * 50_000)
        assert len(parts.thoughts) + len(parts.text) <= len(part) * 50_000 + 200_000


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("<think>\nso", "</think>"),
        ("<seed:think>so", "</seed:think>"),
        ("[THINK]so", "[/THINK]"),
        ("◁think▷so", "◁/think▷"),
        ("<|begin_of_thought|>so", "<|end_of_thought|>"),
        ("<|START_THINKING|>so", "<|END_THINKING|>"),
        ("<|channel>thought\nso", "<channel|>"),
        ("<|start|>assistant<|channel|>analysis<|message|>so", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("no mark", None),
    ],
)
def test_what_ends_thoughts(text: str, end: str | None) -> None:
    found = end_for(text)
    assert found == end
    if end is not None:
        assert split_thoughts(f"{text}{found}yes").text == "yes"


def test_which_special_tokens_are_marks() -> None:
    marks = ("<think>", "</think>", "<|channel|>", "<|message|>", "[THINK]", "<|END_THINKING|>", "<channel|>")
    assert all(map(is_mark, marks))
    assert not any(map(is_mark, ("<eos>", "<|im_end|>", "<|eot_id|>", "[INST]", "<s>")))
