"""What the paired tests say, in plain language: which differences were detected, and which were not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from superexperts.results.results import Comparison, Results, signed_points

__all__ = ["Verdict", "against_base", "against_controls", "format_p", "headline", "verdict"]

BLIND = 0.2
"""A test that detects nothing and would have seen only differences over this says nothing at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison in words."""

    row: Comparison
    title: str
    reference: str
    """Title of what it is compared with."""
    seeds: str
    """What the number of seeds leaves open; empty where nothing."""

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.row.variant

    @property
    def p(self) -> float:
        """Adjusted by Holm within its family."""
        return self.row.adjusted

    @property
    def sure(self) -> bool:
        """Whether a difference was detected at 5%."""
        return self.row.sure

    @property
    def effect(self) -> str:
        """down, up or none: for the words and the colours."""
        return "none" if not self.sure else "down" if self.row.difference < 0 else "up"

    @property
    def blind(self) -> bool:
        """Whether nothing was detected, and no difference that one expects would have been."""
        return not self.sure and self.row.detectable > BLIND

    @property
    def lacks(self) -> str:
        """What there are too few of where the test is blind: seeds or items."""
        return "seeds" if self.row.test == "seeds" else "items"

    @property
    def words(self) -> str:
        """The conclusion as a predicate of the variant, such as `costs 12.3 points`; for a test that is not blind."""
        if self.sure:
            return f"{'costs' if self.row.difference < 0 else 'gains'} {_points(self.row.difference)} points"
        return "makes no detectable difference"

    @property
    def detectable(self) -> str:
        """The smallest difference in points that would have been seen with 80% power."""
        return _points(self.row.detectable)

    @property
    def interval(self) -> str:
        """The difference's 95% interval in points."""
        return f"{signed_points(self.row.low)} to {signed_points(self.row.high)}"

    @property
    def sentence(self) -> str:
        """The whole verdict, such as `no difference detected; differences over 1.9 points would have been seen`."""
        if self.sure:
            side = "lower" if self.row.difference < 0 else "higher"
            said = f"{_points(self.row.difference)} points {side}, {self.interval}"
        elif self.blind:
            runs = f"{max(self.row.runs)} runs against {min(self.row.runs)}"
            given = runs if self.lacks == "seeds" else f"{self.row.n:,} items"
            none = self.row.detectable >= 0.995
            seen = "no difference at all" if none else f"only a difference over {self.detectable} points"
            said = f"this study cannot tell: with {given} it would have seen {seen}; give more {self.lacks}"
        else:
            said = f"no difference detected; differences over {self.detectable} points would have been seen"
        return f"{said}; {self.seeds}" if self.seeds else said


def verdict(results: Results, row: Comparison) -> Verdict:
    """A comparison of these results in words."""
    variant, reference = results.variant(row.variant), results.variant(row.reference)
    single = [one for one in (variant, reference) if one.random and len(one.runs) == 1]
    return Verdict(
        row=row,
        title=variant.title,
        reference=reference.title,
        seeds="one seed: another one may differ" if single else "",
    )


def against_base(results: Results) -> list[Verdict]:
    """Every variant against the base model, over all items; one family of tests."""
    return [verdict(results, row) for row in results.family("base")]


def against_controls(results: Results) -> list[Verdict]:
    """Every variant on chosen experts against its controls, item by item; one family of tests.

    That one variant differs from base and another does not is no evidence that the two differ; this tests it.
    """
    return [verdict(results, row) for row in results.family("control")]


def headline(results: Results) -> list[str]:
    """A sentence on pruning, one on LoRA, and one on what a single seed leaves open, each where there is something."""
    found = {one.name: one for one in against_base(results)}
    direct = against_controls(results)
    sentences = []
    pruned = [found[variant.name] for variant in results.others if variant.kind == "prune"]
    if pruned:
        quiet = [one.title.removeprefix("prune ") for one in pruned if not one.sure and not one.blind]
        said = [f"{_subject(one.title)} {one.words}" for one in pruned if one.sure]
        said += [f"pruning {_listed(quiet, 'or')} makes no detectable difference"] if quiet else []
        said += _untold(pruned)
        names = {one.name for one in pruned}
        sentences.append("; ".join([*said, *_unsaid(found, [one for one in direct if one.name in names])]))
    adapted = [found[variant.name] for variant in results.others if variant.kind == "lora"]
    if adapted:
        names = {one.name for one in adapted}
        sentences.append(_on_adapters(adapted, [one for one in direct if one.name in names]))
    if sentences:
        sentences[0] = sentences[0].replace(" points", " points of accuracy", 1)
    single = [variant.title for variant in results.others if variant.random and len(variant.runs) == 1]
    if single:
        sentences.append(f"{_listed(single)} {'has' if len(single) == 1 else 'have'} one seed: another one may differ")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def _unsaid(found: Mapping[str, Verdict], direct: Sequence[Verdict]) -> list[str]:
    """What the comparisons with controls say beyond those with base, or against what these suggest."""
    said = []
    for one in direct:
        own, other = found[one.name], found[one.row.reference]
        if one.sure and own.effect == other.effect:
            side = "below" if one.effect == "down" else "above"
            said.append(
                f"{_subject(one.title)} is {_points(one.row.difference)} points {side} {_subject(one.reference)}"
            )
        elif not one.sure and own.effect != other.effect:
            names = f"{_subject(one.title)} and {_subject(one.reference)}"
            nothing = (
                f"this study cannot tell whether {names} differ"
                if one.blind
                else f"no difference between {names} is detected"
            )
            said.append(f"compared directly, {nothing}")
    return said


def _untold(verdicts: Sequence[Verdict]) -> list[str]:
    """A clause for the variants of which the tests against base say nothing, by what there are too few of."""
    said = []
    for few in ("seeds", "items"):
        titles = [_subject(one.title) for one in verdicts if one.blind and one.lacks == few]
        if titles:
            does = "does" if len(titles) == 1 else "do"
            said.append(f"what {_listed(titles)} {does}, this study cannot tell: it has too few {few}")
    return said


def _on_adapters(adapted: Sequence[Verdict], direct: Sequence[Verdict]) -> str:
    effects = {one.effect for one in adapted}
    if effects == {"none"} and not any(one.blind for one in adapted):
        start = "no LoRA variant differs detectably from the base model"
    elif len(effects) == 1 and len(adapted) > 1 and "none" not in effects:
        points = sorted(abs(one.row.difference) for one in adapted)
        low, high = _points(points[0]), _points(points[-1])
        size = low if low == high else f"{low} to {high}"
        start = f"LoRA {'gains' if effects == {'up'} else 'costs'} {size} points"
    else:
        quiet = [one.title for one in adapted if not one.sure and not one.blind]
        said = [f"{_listed(quiet)} {'makes' if len(quiet) == 1 else 'make'} no detectable difference"] if quiet else []
        said += _untold(adapted)
        said += [f"{one.title} {one.words}" for one in adapted if one.sure]
        start = "; ".join(said)
    ends = []
    for title in dict.fromkeys(one.title for one in direct):
        own = [one for one in direct if one.title == title]
        sure = [
            f"{_points(one.row.difference)} points {'below' if one.effect == 'down' else 'above'} {one.reference}"
            for one in own
            if one.sure
        ]
        quiet = [one.reference for one in own if not one.sure and not one.blind]
        blind = [one.reference for one in own if one.blind]
        if sure:
            ends.append(f"{title} is {_listed(sure)}")
        if quiet:
            ends.append(f"no difference between {title} and {_listed(quiet, 'or')} is detected")
        if blind:
            ends.append(f"whether {title} differs from {_listed(blind, 'or')}, this study cannot tell")
    return "; ".join([start, *ends])


def _listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else words[0]


def _points(difference: float) -> str:
    """A difference's size in points, without its sign; with as many digits as show that it is not nothing."""
    size = abs(difference)
    return signed_points(size, 1 if size == 0 or size >= 0.0005 else 3).lstrip("+")


def _subject(title: str) -> str:
    """`prune super experts` -> `pruning super experts`, so that a sentence can begin with it."""
    return f"pruning {title.removeprefix('prune ')}" if title.startswith("prune ") else title


def format_p(p: float) -> str:
    """`p < 0.001` or `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"
