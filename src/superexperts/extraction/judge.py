"""A language model that says what an answer commits to, where the rules cannot or as a second opinion.

It sees the question, the choices and the answer, never the gold answer. The answer is untrusted text: it is put in a
fence that it cannot close, without terminal codes, template tokens or verdicts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superexperts.core.errors import ModelError, OutputError
from superexperts.core.runs import digest
from superexperts.core.thoughts import split_thoughts
from superexperts.extraction import find_numbers, normalise, plain
from superexperts.extraction.statements import Choices, Kind

if TYPE_CHECKING:  # torch takes 2 s to import, for which rules do not wait
    from superexperts.engines.journal import Given, Keeper

__all__ = ["Case", "Judge", "Replies", "Verdict", "message", "open_judge", "recorded_prompt", "verdict"]

LONGEST_ANSWER = 8000
LONGEST_QUESTION = 12000
LONGEST_LABEL = 20
MAX_NEW_TOKENS = 256
FENCE = "answer_to_read"

_VERDICTS: Mapping[Kind, str] = {
    "choice": "the label of the option that the answer commits to ({labels})",
    "yesno": "yes or no, whichever the answer commits to (true counts as yes, false as no)",
    "number": "the final number that the answer commits to, in digits, without unit or comma",
}
_PROMPT = (files(__package__) / "judge_prompt.txt").read_text(encoding="utf-8")
FIRST_PROMPT = "4e3ff6f67257579830745c18b111e8bcf55c493fca08d5cfed7b2da8c38edb03"
"""Digest of the prompt that was in use before manifests recorded it: their results are still those of this prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """All that a judge sees of an item. There is deliberately no field for the gold answer."""

    kind: Kind
    question: str
    choices: Choices
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of an answer."""

    value: str | None
    """A choice's label, "yes" / "no" or a number; None where the answer commits to nothing, or nothing was readable."""
    readable: bool


def recorded_prompt() -> dict[str, str]:
    """What a manifest records of the prompt, so that another one makes results anew."""
    found = digest([_PROMPT, FENCE, dict(_VERDICTS)])
    return {} if found == FIRST_PROMPT else {"prompt": found}


def message(case: Case) -> str:
    """The whole text that the judge is sent, as one user message: some chat templates drop a system message."""
    choices = [(neutral(label, LONGEST_LABEL), neutral(text, LONGEST_QUESTION)) for label, text in case.choices]
    labels = ", ".join(label for label, _ in choices)
    listed = "".join(f"{label}. {text}\n" for label, text in choices)
    return _PROMPT.format(
        question=neutral(case.question, LONGEST_QUESTION),
        choices=f"\nOptions:\n{listed}" if listed else "",
        fence=FENCE,
        answer=neutral(case.answer, LONGEST_ANSWER),
        wanted=_VERDICTS[case.kind].format(labels=labels),
    )


# What `plain` leaves: the C1 end of a line, and lone surrogates, which no encoding has.
_INVISIBLE = re.compile(r"[\x85\ud800-\udfff]")
# Every tag, and with it the fence and a template's <|im_end|> or </s>; then [INST].
_BRACKETS = str.maketrans("<>", "‹›")
_INSTRUCTION = re.compile(r"\[(/?[A-Z_]{2,30})\]")
_OWN_VERDICT = re.compile(r"(verdict[\s*_]{0,8})[:：=]", re.IGNORECASE)


def neutral(text: str, longest: int) -> str:
    """Makes untrusted text harmless in a prompt: no terminal codes, tags or verdict; long text is cut in the middle."""
    shown = _INVISIBLE.sub("", plain(text))
    shown = _OWN_VERDICT.sub(r"\1-", _INSTRUCTION.sub(r"(\1)", shown.translate(_BRACKETS)))
    if len(shown) > longest:
        half = longest // 2
        left_out = max(len(text), len(shown)) - 2 * half
        shown = f"{shown[:half]}\n[... {left_out:,} characters left out ...]\n{shown[-half:]}"
    return shown.strip()


_VERDICT = re.compile(r"verdict[\s*_`]{0,8}[:：][\s*_`]{0,8}([^\n]{0,400})", re.IGNORECASE)
_MARKS = " \t*_`\"'“”‘’()[]{}$"


# What a chat template puts at the end of a turn, where an engine leaves it in the reply.
_TURN_END = re.compile(
    r"\s*(?:<[|｜][\w\s▁]{1,30}[|｜]>|</?s>|<(?:end|start)_of_turn>|<eos>|\[/?INST\])", re.IGNORECASE
)


def verdict(case: Case, reply: str) -> Verdict:
    """The reply's last verdict. One that is not to the letter what was asked for is unreadable.

    A verdict in the judge's thoughts does not count, nor do marks of a chat template that stand behind a verdict.
    """
    found = _VERDICT.findall(plain(split_thoughts(reply).text[-20_000:]))
    said = _TURN_END.split(found[-1])[0].lstrip(_MARKS).rstrip(f"{_MARKS}.") if found else ""
    if said.casefold() == "none":
        return Verdict(value=None, readable=True)
    value = _READERS[case.kind](case, said)
    return Verdict(value=value, readable=value is not None)


def _choice(case: Case, said: str) -> str | None:
    for label, text in case.choices:
        named = re.match(rf"{re.escape(label)}(?![\w'’])", said, re.IGNORECASE)
        if named and normalise(said[named.end() :]) in ("  ", normalise(text)):
            return label
    return None


def _yes_no(_: Case, said: str) -> str | None:
    return {"yes": "yes", "true": "yes", "no": "no", "false": "no"}.get(said.casefold())


def _number(_: Case, said: str) -> str | None:
    numbers = [value for *_, value in find_numbers(said)]
    return numbers[0] if len(numbers) == 1 else None


_READERS: Mapping[Kind, Callable[[Case, str], str | None]] = {"choice": _choice, "yesno": _yes_no, "number": _number}


class Replies:
    """Replies by the hash of what was asked: a file of JSON lines, one whole line written at a time.

    Two processes may append to one file; a line that a kill left half is skipped. Without a file it is a memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._by_key: dict[str, str] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                row = json.loads(line)
                self._by_key[row["key"]] = row["reply"]

    def get(self, key: str) -> str | None:
        """The reply, None where it was not asked for."""
        reply = self._by_key.get(key)
        return reply if isinstance(reply, str) else None

    def put(self, key: str, reply: str) -> None:
        """Keeps a reply and syncs it to disk."""
        self._by_key[key] = reply
        if self.path is None:
            return
        line = json.dumps({"key": key, "reply": reply}).encode() + b"\n"
        try:
            with self.path.open("ab+", buffering=0) as stream:
                if stream.seek(0, os.SEEK_END):
                    stream.seek(-1, os.SEEK_END)
                    line = line if stream.read(1) == b"\n" else b"\n" + line
                stream.write(line)
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path} ({error.strerror}); make room or choose another", field="folder"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Keeping:
    """Hands the answers of a harness model to the replies, as a journal would take them."""

    replies: Replies
    keys: Sequence[str]
    answers: Mapping[int, Given] = dataclasses.field(default_factory=dict)

    def add(self, answers: Mapping[int, Given], *, sync: bool = True) -> None:
        for number, reply in answers.items():
            self.replies.put(self.keys[number], str(reply))


Ask = Callable[[Sequence[str], "Keeper"], Iterable[str]]
"""Messages -> replies, in order; each goes to the keeper as soon as it is there."""


class Judge:
    """A judge with its memory."""

    def __init__(self, name: str, identity: Any, ask: Ask, replies: Replies, max_tokens: int = MAX_NEW_TOKENS) -> None:
        self.name = name
        self.max_tokens = max_tokens
        self.identity = identity
        """What must be equal for a reply to stand: the model, not how it is reached."""
        self._ask = ask
        self._replies = replies

    def read(self, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict for each; nothing is asked twice."""
        messages = [message(case) for case in cases]
        keys = [digest([self.identity, self.max_tokens, text]) for text in messages]
        new = {key: text for key, text in zip(keys, messages, strict=True) if self._replies.get(key) is None}
        if new:
            asked = list(new)
            for key, reply in zip(asked, self._ask(list(new.values()), _Keeping(self._replies, asked)), strict=True):
                if self._replies.get(key) is None:
                    self._replies.put(key, reply)
        return [verdict(case, self._replies.get(key) or "") for case, key in zip(cases, keys, strict=True)]


def open_judge(
    model: str,
    replies: Path | None,
    *,
    base_url: str | None = None,
    engine: str = "hf",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    concurrency: int = 8,
    timeout: float = 300,
    retries: int = 3,
    max_tokens: int = MAX_NEW_TOKENS,
) -> Judge:
    """A judge: `model` on the server at `base_url`, or in this process, where it is loaded with the first question.

    `max_tokens` limits each of its replies, its thoughts included.

    `replies` is the file that keeps its replies, None to keep them in memory only.
    """
    # torch and the harness take seconds to import, and extraction by rules needs neither.
    from superexperts.checkpoints.source import JUDGE, resolve
    from superexperts.engines import ENGINES, Opening, open_engine, require_engine
    from superexperts.engines.harness import TransformersModel
    from superexperts.engines.server import api, chat_url
    from superexperts.models.loading import load_model, load_tokenizer

    kept = Replies(replies)
    if base_url is not None:
        url = chat_url(base_url)
        server = api(model, url, concurrency=concurrency, timeout=timeout, retries=retries, field="judge_base_url")
        return Judge(model, {"server": url, "name": model}, _asking(lambda: server, max_tokens), kept, max_tokens)
    require_engine(engine, "judge_engine")
    source = resolve(model, field="judge", what=JUDGE)

    def load() -> Any:
        try:
            if not ENGINES[engine].in_process:
                opening = Opening(
                    model=model,
                    folder=source.folder,
                    dtype=dtype,
                    batch_size=batch_size,
                    max_new_tokens=max_tokens,
                )
                return open_engine(engine, opening)
            return TransformersModel(
                load_model(source, device=device, dtype=dtype), load_tokenizer(source), batch_size, max_tokens
            )
        except ModelError as error:
            raise error.about("judge") from error

    return Judge(model, source.fingerprint, _asking(load, max_tokens), kept, max_tokens)


def _asking(load: Callable[[], Any], max_tokens: int) -> Ask:
    """Asks a harness model that is loaded with the first question."""
    loaded: list[Any] = []

    def ask(messages: Sequence[str], keeper: Keeper) -> Iterable[str]:
        from superexperts.engines.harness import instances, quiet
        from superexperts.engines.server import as_chat

        if not loaded:
            loaded.append(load())
        asker = loaded[0]
        with quiet(), asker.answering("judge", len(messages), keeper):
            answers: list[str] = asker.generate_until(instances(as_chat(asker, messages), max_tokens))
        return answers

    return ask
