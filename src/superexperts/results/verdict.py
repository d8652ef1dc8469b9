"""The results of the paired tests as sentences: which differences were detected, and which were not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from superexperts.results.edges import edge_sentences, edges
from superexperts.results.results import Comparison, Results, signed_points

__all__ = ["Verdict", "against_base", "against_controls", "format_p", "headline", "verdict"]

INCONCLUSIVE = 0.2
"""A test that detects nothing, and would have missed even a difference of this size, is called inconclusive."""
SINGLE_SEED = "one seed only, so another seed may give another result"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A comparison in words."""

    row: Comparison
    title: str
    reference: str
    """Title of the variant it is compared with."""
    seeds: str
    """A caveat about the number of seeds; may be empty."""
    blind: bool = False
    """Whether the base is at the floor on all that is compared, so that a loss could not show."""

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.row.variant

    @property
    def p(self) -> float:
        """p-value, adjusted by Holm within its family."""
        return self.row.adjusted

    @property
    def detected(self) -> bool:
        """Whether a difference was detected at 5%."""
        return self.row.detected

    @property
    def effect(self) -> str:
        """down, up or none."""
        return "none" if not self.detected else "down" if self.row.difference < 0 else "up"

    @property
    def inconclusive(self) -> bool:
        """Whether nothing was detected, and even a large difference would not have been, or could not show."""
        return not self.detected and (self.blind or self.row.detectable > INCONCLUSIVE)

    @property
    def too_few(self) -> str:
        """What a study needs more of where the test is inconclusive: seeds or items."""
        return "seeds" if self.row.test == "seeds" else "items"

    @property
    def predicate(self) -> str:
        """The conclusion as a predicate, such as `costs 12.3 points`; for a test that is not inconclusive."""
        if self.detected:
            return f"{'costs' if self.row.difference < 0 else 'gains'} {_points(self.row.difference)} points"
        return "makes no detectable difference"

    @property
    def detectable(self) -> str:
        """The smallest difference in points that is detected with 80% power."""
        return _points(self.row.detectable)

    @property
    def interval(self) -> str:
        """The difference's 95% interval in points."""
        return f"{signed_points(self.row.low)} to {signed_points(self.row.high)}"

    @property
    def sentence(self) -> str:
        """The verdict, such as `no difference detected; one over 1.9 points would probably have been`."""
        if self.detected:
            side = "lower" if self.row.difference < 0 else "higher"
            said = f"{_points(self.row.difference)} points {side}, 95% interval {self.interval}"
        elif self.blind:
            said = "inconclusive: the base is at the floor, where a loss could not show"
        elif self.inconclusive:
            runs = f"{max(self.row.runs)} runs against {min(self.row.runs)}"
            given = runs if self.too_few == "seeds" else f"{self.row.n:,} items"
            # Shown as 100 points or more, no accuracy can differ by that much.
            whole = self.row.detectable >= 0.995
            found = "no difference would" if whole else f"only a difference over {self.detectable} points would"
            said = f"inconclusive: with {given}, {found} probably have been detected; use more {self.too_few}"
        else:
            said = f"no difference detected; one over {self.detectable} points would probably have been"
        return f"{said}; {self.seeds}" if self.seeds else said


def verdict(results: Results, row: Comparison) -> Verdict:
    """A comparison of these results in words."""
    variant, reference = results.variant(row.variant), results.variant(row.reference)
    single = [one for one in (variant, reference) if one.random and len(one.runs) == 1]
    floors = {task for task, at in edges(results).items() if at == "floor"}
    return Verdict(
        row=row,
        title=variant.title,
        reference=reference.title,
        seeds=SINGLE_SEED if single else "",
        blind=set(results.tasks if row.task is None else [row.task]) <= floors,
    )


def against_base(results: Results) -> list[Verdict]:
    """Every variant against the base model, over all items; one family of tests."""
    return [verdict(results, row) for row in results.family("base")]


def against_controls(results: Results) -> list[Verdict]:
    """Every variant on chosen experts against its controls, item by item; one family of tests.

    If one variant differs from base and another does not, that is not evidence that the two differ from each other.
    These tests compare them directly.
    """
    return [verdict(results, row) for row in results.family("control")]


def headline(results: Results) -> list[str]:
    """Sentences on pruning, on LoRA, on variants with a single seed, on super experts that do not stand out, and on
    benchmarks where the base is at the floor or at the ceiling."""
    found = {one.name: one for one in against_base(results)}
    direct = against_controls(results)
    sentences = []
    pruned = [found[variant.name] for variant in results.others if variant.kind == "prune"]
    if pruned:
        quiet = [one.title.removeprefix("prune ") for one in pruned if not one.detected and not one.inconclusive]
        said = [f"{_subject(one.title)} {one.predicate}" for one in pruned if one.detected]
        said += [f"pruning {_listed(quiet, 'or')} makes no detectable difference"] if quiet else []
        said += _inconclusive(pruned)
        names = {one.name for one in pruned}
        sentences.append("; ".join([*said, *_direct(found, [one for one in direct if one.name in names])]))
    adapted = [found[variant.name] for variant in results.others if variant.kind == "lora"]
    if adapted:
        names = {one.name for one in adapted}
        sentences.append(_on_adapters(adapted, [one for one in direct if one.name in names]))
    if sentences:
        sentences[0] = sentences[0].replace(" points", " points of accuracy", 1)
    single = [variant.title for variant in results.others if variant.random and len(variant.runs) == 1]
    if single:
        were = "was" if len(single) == 1 else "were"
        sentences.append(f"{_listed(single)} {were} run with {SINGLE_SEED}")
    said = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]
    caution = [f"{results.caution}."] if results.caution else []
    return said + caution + (edge_sentences(results) if results.others else [])


def _direct(found: Mapping[str, Verdict], direct: Sequence[Verdict]) -> list[str]:
    """Clauses for comparisons with controls that add to, or contradict, what the comparisons with base suggest."""
    said = []
    for one in direct:
        own, other = found[one.name], found[one.row.reference]
        if one.detected and own.effect == other.effect:
            side = "below" if one.effect == "down" else "above"
            said.append(
                f"{_subject(one.title)} is {_points(one.row.difference)} points {side} {_subject(one.reference)}"
            )
        # "One differs from base, the other does not" invites a conclusion that this direct test does not support.
        elif not one.detected and own.effect != other.effect:
            names = f"{_subject(one.title)} and {_subject(one.reference)}"
            nothing = (
                f"this study cannot tell whether {names} differ"
                if one.inconclusive
                else f"no difference between {names} is detected"
            )
            said.append(f"compared directly, {nothing}")
    return said


def _inconclusive(verdicts: Sequence[Verdict]) -> list[str]:
    """A clause for the variants with an inconclusive test against base, for each thing that there are too few of."""
    said = []
    if blind := [_subject(one.title) for one in verdicts if one.inconclusive and one.blind]:
        does = "does" if len(blind) == 1 else "do"
        said.append(f"this study cannot tell what {_listed(blind)} {does}, because the base is at the floor everywhere")
    for few in ("seeds", "items"):
        shown = [one for one in verdicts if one.inconclusive and not one.blind]
        titles = [_subject(one.title) for one in shown if one.too_few == few]
        if titles:
            said.append(
                f"this study has too few {few} to tell what {_listed(titles)} {'does' if len(titles) == 1 else 'do'}"
            )
    return said


def _on_adapters(adapted: Sequence[Verdict], direct: Sequence[Verdict]) -> str:
    effects = {one.effect for one in adapted}
    if effects == {"none"} and not any(one.inconclusive for one in adapted):
        start = "no LoRA variant differs detectably from the base model"
    elif len(effects) == 1 and len(adapted) > 1 and "none" not in effects:
        points = sorted(abs(one.row.difference) for one in adapted)
        low, high = _points(points[0]), _points(points[-1])
        size = low if low == high else f"{low} to {high}"
        start = f"LoRA {'gains' if effects == {'up'} else 'costs'} {size} points"
    else:
        quiet = [one.title for one in adapted if not one.detected and not one.inconclusive]
        said = [f"{_listed(quiet)} {'makes' if len(quiet) == 1 else 'make'} no detectable difference"] if quiet else []
        said += _inconclusive(adapted)
        said += [f"{one.title} {one.predicate}" for one in adapted if one.detected]
        start = "; ".join(said)
    ends = []
    for title in dict.fromkeys(one.title for one in direct):
        own = [one for one in direct if one.title == title]
        sure = [
            f"{_points(one.row.difference)} points {'below' if one.effect == 'down' else 'above'} {one.reference}"
            for one in own
            if one.detected
        ]
        quiet = [one.reference for one in own if not one.detected and not one.inconclusive]
        blind = [one.reference for one in own if one.inconclusive]
        if sure:
            ends.append(f"{title} is {_listed(sure)}")
        if quiet:
            ends.append(f"no difference between {title} and {_listed(quiet, 'or')} is detected")
        if blind:
            ends.append(f"this study cannot tell whether {title} differs from {_listed(blind, 'or')}")
    return "; ".join([start, *ends])


def _listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else words[0]


def _points(difference: float) -> str:
    """The size of a difference in points, without its sign; a small one gets more digits, so that it is not 0.0."""
    size = abs(difference)
    return signed_points(size, 1 if size == 0 or size >= 0.0005 else 3).lstrip("+")


def _subject(title: str) -> str:
    """`prune super experts` -> `pruning super experts`, as the subject of a sentence."""
    return f"pruning {title.removeprefix('prune ')}" if title.startswith("prune ") else title


def format_p(p: float) -> str:
    """`p < 0.001` or `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"
