"""Chat templates: what they may do wrong, switches for thinking, and how an adapter remembers its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from superexperts.core.errors import ModelError, OptionError
from superexperts.core.settings import thinking_of
from superexperts.data.chat import (
    EVALUATED,
    TRAINED,
    ChatStyle,
    chat_asked,
    conversation,
    prompt_record,
    read_prompt_record,
    render,
    require_same_prompt,
    write_prompt_record,
)
from tests.support import chats


@pytest.fixture
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    found.chat_template = None
    return found


def shown(tokenizer: Any, template: Any, **style: Any) -> str:
    tokenizer.chat_template = template
    how = ChatStyle(**style)
    return render(tokenizer, conversation("What is it?", how), how, EVALUATED)


def test_the_text_is_there_whatever_form_of_content_a_template_takes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert shown(tokenizer, chats.PLAIN) == "<bos><user>What is it?</s><assistant>"
    assert shown(tokenizer, chats.PARTS) == "<user>What is it?\n<assistant>"
    assert (
        shown(tokenizer, chats.PARTS, system_prompt="Be brief.") == "<system>Be brief.\n<user>What is it?\n<assistant>"
    )
    quoted = "{{ messages[0].content | tojson }}"
    assert shown(tokenizer, quoted) == '"What is it?"'


@pytest.mark.parametrize(
    ("template", "style", "said"),
    [
        (
            "{% for m in messages %}<{{ m.role }}>{% endfor %}",
            {},
            "leaves out the text of the user's",
        ),
        (
            "{{ messages[-1].content }}",
            {"system_prompt": "s1"},
            "the text of the system's message; leave out",
        ),
        (chats.RAISES, {"system_prompt": "s1"}, r"fails \(System role not supported\); leave out system_prompt"),
        ("{% for m in messages %}", {}, r"fails \(.*\); repair it, or give chat_template off"),
        ("{{ messages.nope.nope }}", {}, r"fails \("),
        ("{{ 1 + messages[0].content }}", {}, r"fails \("),
        ({"rag": chats.PLAIN, "tool_use": chats.PLAIN}, {}, "has the chat templates rag, tool_use, and none is named"),
    ],
)
def test_a_bad_template_is_one_line(template: Any, style: Any, said: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        shown(tokenizer, template, **style)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "chat_template"


def test_one_of_several_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    assert shown(tokenizer, {"rag": "no", "default": chats.PLAIN}).endswith("What is it?</s><assistant>")
    assert shown(tokenizer, {"only": chats.PLAIN}).endswith("What is it?</s><assistant>")


def test_switches(tokenizer: PreTrainedTokenizerBase) -> None:
    assert shown(tokenizer, chats.QWEN).endswith("<assistant>")
    assert shown(tokenizer, chats.QWEN, thinking=True).endswith("<assistant>")
    assert shown(tokenizer, chats.QWEN, thinking=False).endswith("<think>\n\n</think>\n\n")
    effort = chats.PLAIN + "{% generation %}{{ reasoning_effort }}{% endgeneration %}"
    assert shown(tokenizer, effort, reasoning_effort="low").endswith("low")
    budget = chats.PLAIN + "{{ thinking_budget }}"
    assert shown(tokenizer, budget, thinking=512).endswith("512")
    # A text or a field with the name of a variable is not a switch.
    for template in (chats.PLAIN, chats.PLAIN + "thinking {{ messages[0].thinking }}"):
        with pytest.raises(OptionError, match="thinking: the chat template has no switch for thinking"):
            shown(tokenizer, template, thinking=False)
    with pytest.raises(OptionError, match="reasoning_effort: 'low' is given, but the chat template has no such"):
        shown(tokenizer, chats.PLAIN, reasoning_effort="low")


@pytest.mark.parametrize("name", ["thinking", "enable_reasoning", "reasoning"])
def test_every_name_of_the_switch(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    template = chats.PLAIN + f"{{% if {name} is defined and not {name} %}}</think>{{% endif %}}"
    assert shown(tokenizer, template, thinking=False).endswith("</think>")
    assert shown(tokenizer, template, thinking=True).endswith("<assistant>")


def test_a_model_that_always_thinks_may_have_a_budget_but_cannot_be_kept_from_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for thinking in (True, 2048):
        assert shown(tokenizer, chats.OPENS_THOUGHTS, thinking=thinking).endswith("<think>\n")
    with pytest.raises(OptionError, match="thinking: the chat template has no switch for thinking"):
        shown(tokenizer, chats.OPENS_THOUGHTS, thinking=False)


def test_a_template_may_leave_out_the_thoughts_of_earlier_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    first = [*conversation("2 + 2?", ChatStyle()), {"role": "assistant", "content": "<think>easy</think>\n\nfour"}]
    asked = [*first, *conversation("3 + 3?", ChatStyle())]
    assert render(tokenizer, asked, ChatStyle(), TRAINED) == "<user>2 + 2?<assistant>\n\nfour<user>3 + 3?"
    # The reply itself is what is learnt, thoughts and all.
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    with pytest.raises(ModelError, match="leaves out the text of the assistant's message"):
        render(tokenizer, first, ChatStyle(), TRAINED, opens_answer=False)


def test_templates_see_one_day(tokenizer: PreTrainedTokenizerBase) -> None:
    text = shown(tokenizer, chats.PLAIN + "{{ strftime_now('%d %B %Y') }}")
    assert text.endswith("01 January 2026")


def test_auto_is_on_where_there_is_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not chat_asked(tokenizer, "auto", EVALUATED)
    with pytest.raises(ModelError, match="chat_template: 'on' needs a chat template"):
        chat_asked(tokenizer, "on", EVALUATED)
    tokenizer.chat_template = chats.PLAIN
    assert chat_asked(tokenizer, "auto", EVALUATED)
    assert not chat_asked(tokenizer, "off", EVALUATED)
    assert chat_asked(tokenizer, "chat", TRAINED)


@pytest.mark.parametrize(
    ("trained", "asked", "said"),
    [
        (
            {"chat": True},
            {"chat": False},
            "was trained in chat, but is asked without a chat template; give chat_template on",
        ),
        (
            {"chat": False},
            {"chat": True},
            "was trained without a chat template, but is asked in chat; give chat_template off",
        ),
        (
            {"chat": True, "system": "a"},
            {"chat": True},
            "was trained with the system prompt 'a', but is asked with None",
        ),
        ({"chat": True}, {"chat": True, "template": chats.QWEN}, "was trained with another chat template"),
    ],
)
def test_an_adapter_is_asked_as_it_was_trained(
    trained: Any, asked: Any, said: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def record(chat: bool, template: str = chats.PLAIN, system: str | None = None) -> dict[str, Any]:
        tokenizer.chat_template = template
        return prompt_record(tokenizer, ChatStyle(system_prompt=system), TRAINED, chat=chat)

    write_prompt_record(tmp_path, record(**trained))
    require_same_prompt(read_prompt_record(tmp_path), record(**trained), tmp_path)
    with pytest.raises(OptionError, match=said) as caught:
        require_same_prompt(read_prompt_record(tmp_path), record(**asked), tmp_path)
    assert caught.value.field == "adapter"
    assert read_prompt_record(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [(None, None), ("on", True), ("OFF", False), ("2048", 2048), ("budget 64", 64), ("budget=64", 64), ("budget:8", 8)],
)
def test_thinking_as_text(text: str | None, value: bool | int | None) -> None:
    assert thinking_of(text) is value or thinking_of(text) == value


@pytest.mark.parametrize("text", ["maybe", "0", "-5", "1.5", ""])
def test_thinking_that_is_neither(text: str) -> None:
    with pytest.raises(OptionError, match="thinking: "):
        thinking_of(text)
