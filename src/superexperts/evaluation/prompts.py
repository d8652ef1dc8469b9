"""How the text of an item becomes what an engine is sent: as it is, or in a chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.core.thoughts import leaves_open
from superexperts.data.chat import (
    EVALUATED,
    PLAIN_STYLE,
    ChatStyle,
    Message,
    chat_asked,
    conversation,
    prompt_record,
    render,
)
from superexperts.engines.replies import Request
from superexperts.engines.server import is_chat

__all__ = ["PLAIN", "Prompts", "chat_parameters", "how_to_ask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """How questions are asked, the same for all of them."""

    chat: bool = False
    style: ChatStyle = PLAIN_STYLE
    tokenizer: Any = None
    """None for a server, which applies the template itself."""

    def request(self, text: str, max_new_tokens: int, stop: Sequence[str]) -> Request:
        """The request for the answer to a text. A chat ends its answer itself, so it has no stop texts."""
        style = self.style
        if not self.chat:
            whole = text + style.prefill
            return Request(prompt=whole, max_new_tokens=max_new_tokens, stop=tuple(stop), prefill=style.prefill)
        messages = conversation(text, style)
        if self.tokenizer is None:
            begun = [{"role": "assistant", "content": style.prefill}] if style.prefill else []
            return Request(prompt=(*messages, *begun), max_new_tokens=max_new_tokens, prefill=style.prefill)
        opened = render(self.tokenizer, messages, style, EVALUATED)
        return Request(
            prompt=opened + style.prefill,
            max_new_tokens=max_new_tokens,
            opened=leaves_open(opened),
            prefill=style.prefill,
            thinking_budget=style.thinking if type(style.thinking) is int else None,
        )

    @property
    def template(self) -> Callable[..., str] | None:
        """The function with which the harness renders examples and question in a chat; None without a chat.

        `OptionError` from that function where the prompt ends inside thoughts, in which no choice can be scored.
        """
        return self._rendered if self.chat else None

    def _rendered(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        begun = "" if add_generation_prompt else str(messages[-1]["content"])
        asked = messages if add_generation_prompt else messages[:-1]
        try:
            text = render(self.tokenizer, asked, self.style, EVALUATED)
        except ModelError:
            if asked[0]["role"] != "system" or self.style.system_prompt is not None:
                raise
            # The harness's description of the task; a template that has no system message takes it with the question.
            first = asked[1] | {"content": f"{asked[0]['content']}\n\n{asked[1]['content']}"}
            text = render(self.tokenizer, [first, *asked[2:]], self.style, EVALUATED)
        if leaves_open(text):
            raise OptionError(
                "missing: the chat template lets the model think first, and no choice can be compared there; give off",
                field="thinking",
            )
        return text + begun

    @property
    def record(self) -> dict[str, Any]:
        """How questions are asked, to compare with how an adapter was trained."""
        return prompt_record(self.tokenizer, self.style, EVALUATED, chat=self.chat)


PLAIN = Prompts()


def how_to_ask(setting: str, style: ChatStyle, *, tokenizer: Any = None, url: str | None = None) -> Prompts:
    """How to ask a model with this tokenizer, or the server at this URL; `setting` is auto, on or off.

    `ModelError` or `OptionError` for a template or URL that does not fit.
    """
    if url is None:
        chat = chat_asked(tokenizer, setting, EVALUATED)
    else:
        chat = is_chat(url)
        if setting != "auto" and chat != (setting == "on"):
            kind = "chat completions" if chat else "completions"
            raise OptionError(
                f"{setting!r} does not fit a URL of {kind}; give another as ",
                *(Field("base_url"), ", or leave it out"),
                field="chat_template",
            )
    given = {
        "system_prompt": style.system_prompt,
        "thinking": style.thinking,
        "reasoning_effort": style.reasoning_effort,
    }
    for field, value in given.items():
        if value is not None and not chat:
            what = "the URL of chat completions" if url else "a model with a chat template"
            raise OptionError(f"{value!r} needs a chat; give {what}, or leave it out", field=field)
    return Prompts(chat=chat, style=style, tokenizer=tokenizer)


def chat_parameters(style: ChatStyle) -> dict[str, Any]:
    """What a server is sent beside the messages: the template's variables as vLLM and SGLang take them."""
    found: dict[str, Any] = {}
    variables = style.variables
    if effort := variables.pop("reasoning_effort", None):
        found["reasoning_effort"] = effort
    if variables:
        found["chat_template_kwargs"] = variables
    if style.prefill:
        found |= {"add_generation_prompt": False, "continue_final_message": True}
    return found
