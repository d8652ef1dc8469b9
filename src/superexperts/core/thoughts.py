"""The thoughts of a reasoning model, split from what it says: one table of marks, for every model.

Thoughts are split off before anything else looks at a response: before stop texts, before turns, before answers are
read. Thoughts that do not end commit to nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["MARKS", "Parts", "before_stop", "end_for", "is_mark", "leaves_open", "split_thoughts"]

# Words that models and their templates write between brackets around thoughts. Those of the first group are mixed by
# models that were taught one and prompted with another: `<think> ... </thinking>`.
_THINK = r"think|thinking|thoughts?"
_OTHER = (
    r"reasoning|reason|reflection|scratchpad|cot|analysis|thought_process|thinking_process|chain_of_thought"
    r"|inner_thoughts?|inner_monologue|internal_monologue"
)

MARKS: tuple[tuple[str, str], ...] = (
    # <think> (Qwen, DeepSeek, GLM, OLMo, Kimi, MiniMax, Nemotron), <thinking>, <thought> (EXAONE Deep), <seed:think>
    # (Seed-OSS), <longcat_think>, <reasoning> (GRPO recipes, Reka); tags may hold attributes
    (
        rf"<(?:[a-z]{{2,12}}[:_])?(?:{_THINK}|{_OTHER})(?:\s[\w-]{{1,20}}=[^<>\n]{{0,60}})?>",
        rf"</(?:[a-z]{{2,12}}[:_])?(?:{_THINK}|{_OTHER})\s?>",
    ),
    (r"(?-i:\[(?:THINK|THINKING|REASONING)\])", r"(?-i:\[/(?:THINK|THINKING|REASONING)\])"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi-VL
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1, OpenThinker
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|(?:think|thinking|thought)_(?:start|begin)\|>", r"<\|(?:think|thinking|thought)_end\|>"),
    (r"<\|channel>\s?thought\b", r"<channel\|>"),  # Gemma 4
    (r"<unused94>(?:\s?thought\b)?", r"<unused95>"),  # MedGemma
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|think\|>", r"<\|content\|>"),  # Solar
    (r"<\|im_start\|>think\b", r"<\|im_start\|>answer\b"),  # s1
    (r"<details\stype=\"reasoning\"[^<>\n]{0,80}>", r"</details>"),  # Open WebUI
)
"""(what opens thoughts, what ends them), as patterns without regard to case."""

# At the very beginning of a response only: headings in words.
_HEADINGS = (
    (r"here(?:'s| is) my thought process:", r"\n\s*here(?:'s| is) my response:"),  # Granite 3.2
    (r"\#\#\s?thinking\b", r"\n\#\#\s?final\sresponse\b"),  # HuatuoGPT-o1
)
_HEADED = tuple((re.compile(rf"\s*{a}", re.I), re.compile(b, re.I)) for a, b in _HEADINGS)
_WORDS_BEGIN = re.compile(r"\s*(?:here|\#\#|a(?:ssistant|nalysis)|final)", re.IGNORECASE)
"""Matches responses that may begin with a mark in words, such as a heading."""
_ANY_MARK = re.compile(r"[<\[◁](?=[/|]?[A-Za-z|][\w:|/]{2})")
_FIRST_LETTERS = frozenset("h#")

# gpt-oss: <|channel|>analysis<|message|> ... <|end|><|start|>assistant<|channel|>final<|message|> ... <|return|>
_CHANNEL = re.compile(
    r"(?:<\|start\|>\w{0,20}\s?)?<\|channel\|>\s?(\w{1,20})[^<\n]{0,80}(?:<\|constrain\|>\w{0,20})?(?:<\|message\|>)?"
)
_CHANNEL_TOKENS = frozenset(("<|channel|>", "<|message|>", "<|constrain|>", "<|channel>", "<|start|>", "<|end|>"))
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start)\|>")
# The same where special tokens were left out: "analysisWe pick iron.assistantfinalC".
_BARE_FINAL = re.compile(r"(?<=\S)\s?assistant\s?final(?![a-z])")
_BARE_ANALYSIS = re.compile(r"\s*(?:assistant)?analysis(?=[A-Z\d\"'“(*])")
_BARE_ONLY_FINAL = re.compile(r"\s*(?:assistant)?final(?=[A-Z\d*\\$])")

_ENDS = (
    *(("begin", "end"), ("START", "END"), ("start", "end"), ("<|channel>", "<channel|>"), ("unused94", "<unused95>")),
    *(("prefix", "suffix"), ("<|think|>", "<|content|>"), ("<|im_start|>think", "<|im_start|>answer")),
)
"""(part of an opening mark, its replacement in the closing mark). A replacement that begins with `<` is the whole
closing mark. A mark without an entry is closed as in XML, with a slash."""

_ANSWER_LINE = re.compile(
    r"\n\s{0,8}<answer>(?:(?!<answer>).){1,2000}</answer>\s*(?:<[|｜][\w▁]{1,30}[|｜]>\s*)?\Z"
    r"|\n[\s*]{0,8}(?:(?:therefore|thus|so|hence),?\s)?(?:the\s)?(?:final\s)?answer\b[^\n\w]{0,8}(?:is\b)?[^\n\w]{0,8}"
    r"\\boxed\{[^\n]{1,200}\Z",
    re.I | re.S,
)
"""What ends thoughts without a closing mark, at the end of the response: an answer in a tag on separate lines, or the
last line "Therefore, the answer is \\boxed{34", which scripts that limit the length of thoughts put there."""
_LAST_LETTERS = frozenset(">]▷tTkK")  # of what opens thoughts
_WORD = re.compile(r"\w")


class Parts(NamedTuple):
    """A response in its parts."""

    thoughts: str
    """All thoughts, blocks joined by an empty line; "" without any."""
    text: str
    """What is said outside them."""
    finished: bool
    """False where thoughts do not end and nothing was said before them: the response commits to nothing."""


@functools.lru_cache(maxsize=64)
def _pattern(own: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Returns a pattern that matches every mark, and one that finds where marks may begin. The name of the group that
    matched is the side, `o` (opens) or `c` (closes), and the row of the table: `o1`, `c1`, ...

    Looking for beginnings first is several times as fast.
    """
    rows = [*((re.escape(opens), re.escape(ends)) for opens, ends in own), *MARKS]
    sides = [f"(?P<{side}{i}>{row[at]})" for i, row in enumerate(rows) for at, side in enumerate("oc")]
    firsts = {case for row in own for mark in row for case in (mark[:1].lower(), mark[:1].upper())}
    begins = "|".join([_ANY_MARK.pattern, *map(re.escape, sorted(firsts))])
    return re.compile("|".join(sides), re.IGNORECASE), re.compile(begins)


def _marks(text: str, own: Sequence[tuple[str, str]] = ()) -> list[re.Match[str]]:
    """Every mark in a text, in order."""
    pattern, begins = _pattern(tuple(own))
    found: list[re.Match[str]] = []
    for begin in begins.finditer(text):
        if (not found or begin.start() >= found[-1].end()) and (mark := pattern.match(text, begin.start())):
            found.append(mark)
    return found


_WORD_OF_MARK = re.compile(rf"</?(?:[a-z]{{2,12}}[:_])?(?:({_THINK})|({_OTHER}))[\s>]", re.IGNORECASE)


def _meaning(found: re.Match[str]) -> str:
    """Returns what an opening mark and its closing mark have in common: the row of the table or, for tags, their word.

    All words for thinking are alike: `<think> ... </thinking>`.
    """
    word = _WORD_OF_MARK.match(found[0])
    if word is None:
        return (found.lastgroup or "")[1:]
    return "think" if word[1] else word[2].lower()


def split_thoughts(text: str, *, opened: bool = False, own: Sequence[tuple[str, str]] = ()) -> Parts:
    """Splits a response into thoughts and what is said outside them.

    Args:
        text: The response as it was generated.
        opened: The prompt ends inside thoughts, since the model's template opens them; see `leaves_open`.
        own: (opening, end) of the model's own, as plain text, beside the table `MARKS`.

    A mark that ends thoughts without one that opens them ends thoughts too: templates open them in the prompt.
    """
    if not (opened or own or "assistant" in text or _ANY_MARK.search(text) or _WORDS_BEGIN.match(text)):
        return Parts("", text, True)  # as most
    if "<|channel|>" in text:
        return _channels(text)
    if (final := _last(_BARE_FINAL, text)) is not None:
        return Parts(_bare(text[: final.start()]), text[final.end() :].strip(), True)
    if not opened and (bare := _BARE_ANALYSIS.match(text)):
        return Parts(text[bare.end() :].strip(), "", False)
    if not opened and (bare := _BARE_ONLY_FINAL.match(text)):
        return Parts("", text[bare.end() :].strip(), True)
    if text.lstrip()[:1].lower() in _FIRST_LETTERS:
        for heading, end in _HEADED:
            if begun := heading.match(text):
                ended = end.search(text, begun.end())
                if ended is None:
                    return Parts(text[begun.end() :].strip(), "", False)
                return Parts(text[begun.end() : ended.start()].strip(), text[ended.end() :].strip(), True)
    return _marked(text, opened, tuple(own))


def _marked(text: str, opened: bool, own: tuple[tuple[str, str], ...]) -> Parts:
    marks = _marks(text, own)
    if not marks and not opened:
        return Parts("", text, True)
    thoughts: list[str] = []
    said: list[str] = []
    inside = "" if opened else None  # the meaning of what is open; "" was opened by the prompt
    start = 0
    for mark in marks:
        ends, meaning = (mark.lastgroup or "")[0] == "c", _meaning(mark)
        if inside is not None:
            if ends and inside in ("", meaning):
                thoughts.append(text[start : mark.start()])
                inside, start = None, mark.end()
            elif not ends and inside == "" and not _WORD.search(text, start, mark.start()):
                inside, start = meaning, mark.end()  # the model opens again what the prompt has opened
        elif not ends:
            said.append(text[start : mark.start()])
            inside, start = meaning, mark.end()
        elif thoughts and not _WORD.search(text, mark.end()):
            said.append(text[start : mark.start()])  # one end too many, behind the answer
            start = mark.end()
        else:
            thoughts += [*said, text[start : mark.start()]]
            said, start = [], mark.end()
    rest = text[start:]
    if inside is not None and (answer := _ANSWER_LINE.search(rest)):
        thoughts.append(rest[: answer.start()])
        inside, rest = None, rest[answer.start() :]
    (said if inside is None else thoughts).append(rest)
    whole = _joined(said)
    return Parts(_joined(thoughts), whole, inside is None or bool(_WORD.search(whole)))


def _channels(text: str) -> Parts:
    """The parts of gpt-oss's format: the channel `final` is said, all others are thoughts."""
    thoughts: list[str] = []
    said: list[str] = []
    channels = list(_CHANNEL.finditer(text))
    if not channels:
        return Parts("", text, True)
    thoughts.append(_MESSAGE_END.sub("", text[: channels[0].start()]))
    for number, channel in enumerate(channels):
        stop = channels[number + 1].start() if number + 1 < len(channels) else len(text)
        end = _MESSAGE_END.search(text, channel.end(), stop)
        part = text[channel.end() : end.start() if end else stop]
        (said if channel[1].lower() == "final" else thoughts).append(part)
        if said and end is not None and end[0] == "<|return|>":
            break  # what follows is another turn
    return Parts(_joined(thoughts), _joined(said), bool(said))


def _bare(text: str) -> str:
    begun = _BARE_ANALYSIS.match(text)
    return text[begun.end() if begun else 0 :].strip()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    if "assistant" not in text or "final" not in text:
        return None
    return next(iter([*pattern.finditer(text)][-1:]), None)


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def is_mark(token: str) -> bool:
    """Whether a special token marks thoughts or channels, so that a response cannot be split without it."""
    return token in _CHANNEL_TOKENS or _pattern(())[0].fullmatch(token) is not None


def leaves_open(prompt: str, own: Sequence[tuple[str, str]] = ()) -> bool:
    """Whether a prompt ends inside thoughts, as where the template ends with `<think>`."""
    end = prompt[-200:].rstrip()
    if not own and end[-1:] not in _LAST_LETTERS:
        return False  # most prompts, without the slower patterns
    channel = list(_CHANNEL.finditer(end))
    if channel and not end[channel[-1].end() :].strip():
        return channel[-1][1].lower() != "final"
    marks = _marks(end, own)
    return bool(marks) and (marks[-1].lastgroup or "")[0] == "o" and not end[marks[-1].end() :].strip()


def end_for(text: str) -> str | None:
    """What ends the thoughts that a text leaves open: the mark that fits its last opening one; None without any."""
    channels = list(_CHANNEL.finditer(text))
    if channels:
        return "<|end|><|start|>assistant<|channel|>final<|message|>"
    marks = [mark[0] for mark in _marks(text) if (mark.lastgroup or "")[0] == "o"]
    if not marks:
        return None
    bare = re.sub(r"(?<=\w)\s[^>]*", "", marks[-1])  # attributes
    for opening, end in _ENDS:
        if opening in bare:
            return end if end[0] == "<" else bare.replace(opening, end)
    return f"{bare[0]}/{bare[1:]}"


def before_stop(text: str, stops: Sequence[str], *, opened: bool = False, own: Sequence[tuple[str, str]] = ()) -> str:
    """A response up to the first stop text outside thoughts; thoughts are never cut."""
    parts = split_thoughts(text, opened=opened, own=own)
    if not parts.text:
        return text
    begin = text.rfind(parts.text) if parts.thoughts else 0
    if begin < 0:  # said in several pieces
        begin = text.rfind(parts.text.rpartition("\n\n")[2])
    places = [at for stop in stops if stop and (at := text.find(stop, begin)) >= 0]
    return text[: min(places)] if places else text
