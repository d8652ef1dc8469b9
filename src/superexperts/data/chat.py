"""Chats: a question as the messages of a chat, and as the text that a tokenizer's chat template makes of them.

The same functions make the prompts of training and of evaluation. A template comes with the checkpoint and may do
anything: refuse a role, leave a text out, fail. What it makes is checked, and an error is one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.core.runs import digest, read_json, write_json
from superexperts.core.thoughts import end_for, split_thoughts

__all__ = [
    "EVALUATED",
    "PLAIN_STYLE",
    "TRAINED",
    "ChatStyle",
    "Message",
    "Spelt",
    "chat_asked",
    "conversation",
    "prompt_record",
    "read_prompt_record",
    "render",
    "require_same_prompt",
    "write_prompt_record",
]

Message = dict[str, Any]
"""`role` and `content`."""

DAY = datetime.datetime(2026, 1, 1)
"""The date that templates see. Some write today's date into the prompt, so that the prompt would change every day."""
SWITCHES = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
"""Variables by which templates turn thinking on and off (Qwen, GLM, SmolLM; Granite, DeepSeek; others; Command)."""
RECORD = "prompt.json"
RECORD_SCHEMA = "superexperts/prompt/1"

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
)


class Spelt(NamedTuple):
    """How a command names the choice between a chat and plain text, for messages."""

    field: str
    plain: str
    """The value that means plain text."""


EVALUATED, TRAINED = Spelt("chat_template", "off"), Spelt("prompt", "plain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """How questions are asked in a chat."""

    system_prompt: str | None = None
    """Text of the system's message; None for no such message."""
    thinking: bool | int | None = None
    """Whether a reasoning model thinks first, or for how many tokens at most; None leaves that to the template."""
    reasoning_effort: str | None = None
    """Word for how long a model thinks, such as low; None leaves that to the template."""
    prefill: str = ""
    """Beginning of each answer, which the model goes on from."""

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for a template, under the names that templates know."""
        found: dict[str, Any] = {}
        if self.thinking is not None:
            found |= dict.fromkeys(SWITCHES, self.thinking is not False)
            if self.thinking is not True:
                found["thinking_budget"] = int(self.thinking)
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = self.reasoning_effort
        return found


PLAIN_STYLE = ChatStyle()


def chat_asked(tokenizer: PreTrainedTokenizerBase, setting: str, spelt: Spelt) -> bool:
    """Whether prompts go through the tokenizer's chat template: `setting` is auto, or the word for yes or no.

    `auto` is yes where there is a template. `ModelError` if one is asked for that the tokenizer lacks.
    """
    if setting == spelt.plain:
        return False
    has_one = bool(tokenizer.chat_template)
    if setting != "auto" and not has_one:
        raise ModelError(
            f"{setting!r} needs a chat template, which the tokenizer does not have; give {spelt.plain}",
            field=spelt.field,
        )
    return has_one


def conversation(text: str, style: ChatStyle) -> list[Message]:
    """The messages before an answer: the system's, if the style has one, and the user's."""
    system = [] if style.system_prompt is None else [{"role": "system", "content": style.system_prompt}]
    return [*system, {"role": "user", "content": text}]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    style: ChatStyle,
    spelt: Spelt,
    *,
    opens_answer: bool = True,
) -> str:
    """The text that the template makes of messages, up to the place where the answer begins if `opens_answer`.

    Content is given as text, or as a list of parts to a template that shows the text only then. `ModelError` if
    the template fails, or leaves the text of a message out. `OptionError` for thinking or reasoning effort that the
    template does not know.
    """
    template = _template(tokenizer, spelt)
    _check_switches(template, style)
    problem: ModelError | None = None  # that of content as text, the usual form
    for as_parts in (False, True):
        given = [_with_parts(message) for message in messages] if as_parts else list(messages)
        try:
            with _fixed_day():
                shown = str(
                    tokenizer.apply_chat_template(
                        given,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=opens_answer,
                        **style.variables,
                    )
                )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            said = f"fails ({reason})"
        else:
            role = _first_left_out(shown, messages)
            if role is None:
                return shown
            said = f"leaves out the text of the {role}'s message"
        problem = problem or ModelError(f"the chat template {said}; ", *_instead(messages, spelt), field=spelt.field)
    assert problem is not None
    raise problem


def _instead(messages: Sequence[Message], spelt: Spelt) -> tuple[str, ...]:
    parts = ("repair it, or give ", Field(spelt.field), f" {spelt.plain}")
    if any(message["role"] == "system" for message in messages):
        return ("leave out ", Field("system_prompt"), ", ", *parts)
    return parts


def _template(tokenizer: PreTrainedTokenizerBase, spelt: Spelt) -> str:
    """The template to use; `ModelError` for several of which none is the default."""
    found: Any = tokenizer.chat_template
    if not isinstance(found, Mapping):
        return str(found)
    if "default" in found or len(found) == 1:
        return str(found.get("default", next(iter(found.values()))))
    raise ModelError(
        f"the tokenizer has the chat templates {', '.join(sorted(found))}, and none is named default; name one so in "
        "its files, or give ",
        *(Field(spelt.field), f" {spelt.plain}"),
        field=spelt.field,
    )


def _with_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _first_left_out(shown: str, messages: Sequence[Message]) -> str | None:
    """The role of the first message with a text that is not in what was made of it; None if all are there.

    White space is ignored, and the text may be a JSON string. Templates leave out the thoughts of earlier turns.
    """
    text = _dense(shown)
    for number, message in enumerate(messages, start=1):
        content = str(message["content"])
        if message["role"] == "assistant" and number < len(messages):
            content = split_thoughts(content).text
        if not any(_dense(form) in text for form in (content, json.dumps(content, ensure_ascii=False)[1:-1])):
            return str(message["role"])
    return None


def _dense(text: str) -> str:
    return "".join(text.split())


@contextlib.contextmanager
def _fixed_day() -> Iterator[None]:
    """Within the block templates see `DAY`.

    Replaces the module's `datetime`, because transformers converts everything passed to a template to plain data, so a
    date function cannot be passed in."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Fixed:
            return cls.fromtimestamp(DAY.timestamp(), tz)

    module: Any = chat_template_utils
    before = module.datetime
    module.datetime = Fixed
    try:
        yield
    finally:
        module.datetime = before


@functools.lru_cache(maxsize=16)
def _variables_of(template: str) -> frozenset[str]:
    """The variables that a template reads; none if it cannot be parsed."""
    source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # a tag of transformers
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(source)
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))
    except jinja2.TemplateError:
        return frozenset()


def _check_switches(template: str, style: ChatStyle) -> None:
    known = _variables_of(template)
    # Templates of models that always think have no switch, but write or split off the marks of thoughts. The engine
    # keeps a budget.
    always = style.thinking not in (None, False) and end_for(template) is not None
    if style.thinking is not None and not always and not known & {*SWITCHES, "thinking_budget"}:
        raise OptionError(
            "the chat template has no switch for thinking; leave it out, or say it in ",
            *(Field("system_prompt"), " or ", Field("prefill"), " as the model's card does"),
            field="thinking",
        )
    if style.reasoning_effort is not None and "reasoning_effort" not in known:
        raise OptionError(
            f"{style.reasoning_effort!r} is given, but the chat template has no such variable; leave it out",
            field="reasoning_effort",
        )


# ---- what an adapter was trained on -------------------------------------------------------------------------------


def prompt_record(tokenizer: PreTrainedTokenizerBase, style: ChatStyle, spelt: Spelt, *, chat: bool) -> dict[str, Any]:
    """How questions are asked, as it is written beside an adapter."""
    template = digest(_template(tokenizer, spelt)) if chat else None
    return {
        "schema": RECORD_SCHEMA,
        "chat": chat,
        "template": template,
        "system_prompt": style.system_prompt if chat else None,
    }


def write_prompt_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `prompt.json` into an adapter's folder."""
    write_json(folder / RECORD, dict(record))


def read_prompt_record(folder: Path) -> dict[str, Any] | None:
    """The record in an adapter's folder; None for an adapter of another tool or of an earlier version."""
    file = folder / RECORD
    record = read_json(file, "adapter") if file.is_file() else None
    return record if isinstance(record, dict) and record.get("schema") == RECORD_SCHEMA else None


def require_same_prompt(trained: Mapping[str, Any] | None, asked: Mapping[str, Any], adapter: Path) -> None:
    """`OptionError` if an adapter is asked in another way than it was trained in, as far as that is known."""
    if trained is None:
        return
    names = {True: "in chat", False: "without a chat template"}
    if trained.get("chat") != asked["chat"]:
        setting = "on" if trained.get("chat") else "off"
        raise OptionError(
            f"{adapter} was trained {names[bool(trained.get('chat'))]}, but is asked {names[bool(asked['chat'])]}; ",
            *("give ", Field("chat_template"), f" {setting} for it and for what it is compared with"),
            field="adapter",
        )
    if trained.get("system_prompt") != asked["system_prompt"]:
        raise OptionError(
            f"{adapter} was trained with the system prompt {trained.get('system_prompt')!r:.80}, but is asked with "
            f"{asked['system_prompt']!r:.80}; give the same as ",
            Field("system_prompt"),
            field="adapter",
        )
    if trained.get("template") != asked["template"]:
        raise OptionError(
            f"{adapter} was trained with another chat template than the model's; give the tokenizer that it was "
            "trained with",
            field="adapter",
        )
