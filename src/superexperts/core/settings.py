"""Settings that several commands share (the model, the server), and checks of values."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from tyro.conf import Positional

from superexperts.core.errors import Field, OptionError

__all__ = [
    "SERVER_OPTIONS",
    "ChatConfig",
    "CheckpointConfig",
    "ModelConfig",
    "SeededConfig",
    "ServerConfig",
    "Switch",
    "plain_number",
    "require",
    "require_device",
    "require_positive",
    "require_sequences",
    "require_unused",
    "require_url",
    "thinking_of",
    "typed",
]

SERVER_OPTIONS = ("concurrency", "timeout", "retries")
"""The settings of `ServerConfig`, which do nothing where no server is asked."""

Switch = tyro.conf.FlagCreatePairsOff[bool]
"""An option without a value: --json, with no --no-json beside it."""


def require(condition: bool, field: str, value: object, *what_to_do: str) -> None:
    """Raises `OptionError` for `field` unless the condition holds; the message is the value and `what_to_do`."""
    if not condition:
        shown = "" if value is True else f"{value!r} "  # a switch has no value that a user has typed
        raise OptionError(shown, *what_to_do, field=field)


def require_unused(config: Any, names: Iterable[str], *why: str) -> None:
    """Raises `OptionError` for the first of these settings that is not at its default, since it would do nothing.

    `why` says when, such as `"without ", Field("perplexity")`. The value of a default is never an error, even if it was
    given.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        shown = str(value) if isinstance(value, Path) else value
        require(value == defaults[name], name, shown, "does nothing ", *why, "; leave it out")


def typed(value: Any, hint: Any) -> Any:
    """Converts a YAML value to the type `hint` of a setting; `ValueError` says what it should be.

    Numbers may be text, because YAML 1.1 reads 1e-4 as text.
    """
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        if isinstance(value, bool) and {"on", "off"} <= {*get_args(hint)}:
            value = "on" if value else "off"  # YAML 1.1 reads these words as true and false
        if value not in get_args(hint):
            raise ValueError(f"{value!r} is unknown; choose from {', '.join(map(str, get_args(hint)))}")
        return value
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if isinstance(number, int | float) and (hint is float or float(number).is_integer()):
            return hint(number)
    elif isinstance(value, str) and hint in (str, Path):
        return hint(value)
    elif hint is bool and isinstance(value, bool):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text")
    what_to_do = (
        "write it in quotes" if expected == "a text" and isinstance(value, bool | int | float) else "correct it"
    )
    raise ValueError(f"{value!r} is not {expected}; {what_to_do}")


def plain_number(text: str) -> str:
    """`10k` -> `10000`, `1.5M` -> `1500000`; any other text is returned as it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM])", text.strip())
    if found is None:
        return text
    number = Decimal(found[1]) * (1000 if found[2] in "kK" else 1000000)
    return str(int(number)) if number == int(number) else text


def _number(value: Any) -> Any:
    try:
        return float(plain_number(value)) if isinstance(value, str) else value
    except ValueError:
        return value


def require_sequences(tokens: int, seq_len: int) -> None:
    require(seq_len >= 2, "seq_len", seq_len, "is too short; give at least 2")
    short = ("is less than one sequence (", Field("seq_len"), f" {seq_len}); give at least {seq_len}")
    require(tokens >= seq_len, "tokens", tokens, *short)


def require_positive(field: str, value: float) -> None:
    require(not value <= 0, field, value, "is not positive; give more than 0")
    require(value < math.inf, field, value, "is not a finite number; give one")


def require_device(device: str) -> None:
    # torch accepts it as a device, but its tensors hold no values.
    require(device.partition(":")[0] != "meta", "device", device, "holds no values; use cpu or auto")


def require_seed(seed: int) -> None:
    # np.random.seed, which the libraries' `set_seed` calls, takes 32 bits.
    require(0 <= seed < 2**32, "seed", seed, "is out of range; give 0 to 4294967295")


def require_url(field: str, url: str) -> None:
    good = url.startswith(("http://", "https://"))
    require(good, field, url, "is not a URL; give one like http://localhost:8000/v1")
    # The URL is written to manifests and messages.
    secret = re.search(r"[?&][\w-]*(?:key|token|secret|sig|password)=", url, re.IGNORECASE)
    require(secret is None, field, url.partition("?")[0], "holds a key; give that as OPENAI_API_KEY instead")
    require("@" not in url, field, url.rpartition("@")[2], "holds a password; give that as OPENAI_API_KEY instead")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoint to use; for commands that read one."""

    model: Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]] = "pocket"
    """Checkpoint folder, Hub name, or `pocket` for the embedded one."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; a commit makes a run repeatable."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckpointConfig):
    """How a model is loaded and run; for commands that run one."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights in memory; `auto` is the checkpoint's own on a GPU or streamed, and float32 on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeededConfig(ModelConfig):
    """A model and a seed; for commands that draw random numbers."""

    seed: int = 0
    """Seed of everything random in this command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How requests are sent to an OpenAI-compatible server; for commands that can use one."""

    concurrency: int = 8
    """api: requests at a time."""
    timeout: float = 300
    """api: seconds that one request may take."""
    retries: int = 3
    """api: how often a request that failed is made again, after 1 to 10 seconds."""

    def __post_init__(self) -> None:
        require(self.concurrency > 0, "concurrency", self.concurrency, "is not positive; give at least 1")
        require_positive("timeout", self.timeout)
        require(self.retries >= 0, "retries", self.retries, "is negative; give 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How a question is put to a chat or reasoning model; for commands that ask questions."""

    chat_template: Literal["auto", "on", "off"] = "auto"
    """Whether each question is the user's message in the model's chat template; `auto`: where the tokenizer has one."""
    system_prompt: str | None = None
    """chat: text of the system's message; default: none."""
    thinking: str | None = None
    """chat: `on`, `off`, or a number of tokens after which thoughts are ended; default: the template's."""
    reasoning_effort: str | None = None
    """chat: a word that the template knows, such as low; default: the template's."""
    prefill: str = ""
    """First words of every answer, which the model continues."""

    def __post_init__(self) -> None:
        thinking_of(self.thinking)
        if self.chat_template == "off":
            for name in ("system_prompt", "thinking", "reasoning_effort"):
                value = getattr(self, name)
                require(value is None, name, value, "needs a chat, but ", Field("chat_template"), " is off")


def thinking_of(text: str | None) -> bool | int | None:
    """`on` -> True, `off` -> False, `2048` or `budget 2048` -> 2048; `OptionError` for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(?:(on|true)|(off|false)|(?:budget[\s:=]*)?(\d{1,7}))\s*", text, re.IGNORECASE)
    require(found is not None, "thinking", text, "is neither on, off nor a number of tokens; give one of the three")
    assert found is not None
    if found[3]:
        require(int(found[3]) > 0, "thinking", text, "is not a budget; give off to answer without thoughts")
        return int(found[3])
    return bool(found[1])
