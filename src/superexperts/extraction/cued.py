"""Patterns that need not be tried at every character."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["Cued", "Gated", "lowered", "strange"]


_ASCII = bytes((10, *range(32, 127)))


def strange(text: str) -> str:
    """The characters of a text that are neither printable ASCII nor the end of a line, in their order."""
    if text.isascii():
        return text.encode().translate(None, _ASCII).decode()
    return text.encode("utf-8", "surrogatepass").translate(None, _ASCII).decode("utf-8", "surrogatepass")


def lowered(text: str) -> str | None:
    """The text in lower case, character for character; None where ignoring case would see more than that."""
    if text.isascii():
        return text.lower()
    data = text.encode("utf-8", "surrogatepass")
    others = data.translate(None, _ASCII).decode("utf-8", "surrogatepass")
    if "ı" in others or "ſ" in others:  # i and s to a pattern, but not to `lower`
        return None
    if others.lower() == others:  # then only ASCII changes, and bytes are far faster
        return data.lower().decode("utf-8", "surrogatepass")
    lower = text.lower()
    return lower if len(lower) == len(text) else None


class Gated:
    """A pattern of which every match holds one of a few words (in lower case): without them it is not tried."""

    def __init__(self, pattern: re.Pattern[str], words: Sequence[str]) -> None:
        self._search = pattern.search
        self._words = tuple(words)
        self._ascii = tuple(filter(str.isascii, words))

    def search(self, text: str) -> re.Match[str] | None:
        """As the pattern's `search`."""
        lower = lowered(text)
        if lower is None:
            return self._search(text)
        words = self._ascii if lower.isascii() else self._words
        for word in words:
            if word in lower:
                return self._search(text)
        return None


_LONGEST_CUE = 20


class Cued:
    """A pattern (verbose, in lower case, found in any case) that always matches from a cue on.

    Cues are found by `str.find`, and only there the pattern is tried, on lower case: several times faster than one that
    ignores case and is tried at every character.
    """

    def __init__(
        self,
        source: str,
        words: Sequence[str],
        marks: str | None = None,
        where: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """The cues are `words`, what the pattern `marks` finds, and those that need not be looked for but `where`
        something stands: a part that they share, or what follows them. A mark with a group in it is a match already."""
        self._anywhere = re.compile(source, re.IGNORECASE | re.VERBOSE)
        self._at_cue = re.compile(source, re.VERBOSE)
        self._words = tuple(words)
        self._ascii = tuple(filter(str.isascii, words))
        self._where = tuple((sign, tuple(cues)) for sign, cues in (where or {}).items())
        self._marks = None if marks is None else re.compile(marks, re.VERBOSE)
        # Without the other characters in the pattern, ASCII text is searched twice as fast.
        ascii_marks = "".join(filter(str.isascii, marks or ""))
        self._ascii_marks = None if marks is None else re.compile(ascii_marks, re.VERBOSE | re.ASCII)

    def matches(self, text: str) -> list[re.Match[str]]:
        """As a pattern's `finditer`, in a list; the text of the matches is in lower case."""
        lower = lowered(text)
        return list(self._anywhere.finditer(text)) if lower is None else self.matches_lower(lower)

    def matches_lower(self, lower: str, begin: int = 0, stop: int | None = None) -> list[re.Match[str]]:
        """The matches that start from `begin` on and before `stop`, in a text that is `lowered` already."""
        part = lower if begin == 0 and stop is None else lower[begin : None if stop is None else stop + _LONGEST_CUE]
        words, marks = (self._ascii, self._ascii_marks) if part.isascii() else (self._words, self._marks)
        marked = {} if marks is None else {mark.start(): mark for mark in marks.finditer(part)}
        places = [*marked]
        present = [word for word in words if word in part]  # of most there is none
        for sign, cues in self._where:
            if sign in part:
                present += [word for word in cues if word in part]
        for word in present:
            at = part.find(word)
            while at >= 0:
                places.append(at)
                at = part.find(word, at + 1)
        if not places:  # as in most
            return []
        places.sort()
        found, passed, match_at = [], begin, self._at_cue.match
        for place in places:
            at = begin + place
            if at < passed:
                continue
            mark = marked.get(place)
            match = match_at(lower, at) if mark is None or mark.lastindex is None else mark
            if match:
                if stop is not None and at >= stop:
                    break
                found.append(match)
                passed = match.end()
        return found
