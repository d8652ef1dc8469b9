"""What the paired tests say, in plain language: which differences were detected, and which were not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .results import Comparison, Results, VariantResult, signed_points

__all__ = ["Verdict", "against_base", "against_controls", "format_p", "headline", "verdict"]

DRAWN = ("random", "anywhere")


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
    def words(self) -> str:
        """The conclusion as a predicate of the variant, such as `costs 12.3 points`."""
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
        else:
            said = f"no difference detected; differences over {self.detectable} points would have been seen"
        return f"{said}; {self.seeds}" if self.seeds else said


def verdict(results: Results, row: Comparison) -> Verdict:
    """A comparison of these results in words."""
    variant, reference = results.variant(row.variant), results.variant(row.reference)
    single = [one for one in (variant, reference) if _varies(one) and len(one.runs) == 1]
    return Verdict(
        row=row,
        title=variant.title,
        reference=reference.title,
        seeds="one seed: another one may differ" if single else "",
    )


def _varies(variant: VariantResult) -> bool:
    """Whether another seed would have given another model."""
    return variant.kind == "lora" or variant.target in DRAWN


def against_base(results: Results) -> list[Verdict]:
    """Every variant against the base model, over all items; one family of tests."""
    return [verdict(results, row) for row in results.family("base")]


def against_controls(results: Results) -> list[Verdict]:
    """Every variant on chosen experts against its controls, item by item; one family of tests.

    That one variant differs from base and another does not is no evidence that the two differ; this tests it.
    """
    return [verdict(results, row) for row in results.family("control")]


def headline(results: Results) -> list[str]:
    """One sentence on pruning and one on LoRA, where the study has such variants."""
    found = {one.name: one for one in against_base(results)}
    sentences = []
    pruned = [found[variant.name] for variant in results.others if variant.kind == "prune"]
    if pruned:
        sentences.append("; ".join(f"{_subject(one.title)} {one.words}" for one in pruned) + ".")
    adapted = [found[variant.name] for variant in results.others if variant.kind == "lora"]
    if adapted:
        names = {one.name for one in adapted}
        sentences.append(_on_adapters(adapted, [one for one in against_controls(results) if one.name in names]))
    if sentences:
        sentences[0] = sentences[0].replace(" points", " points of accuracy", 1)
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _on_adapters(adapted: Sequence[Verdict], direct: Sequence[Verdict]) -> str:
    effects = {comparison.effect for comparison in adapted}
    if effects == {"none"}:
        start = "no LoRA variant differs detectably from the base model"
    elif len(effects) == 1 and len(adapted) > 1:
        points = sorted(abs(comparison.row.difference) for comparison in adapted)
        low, high = (signed_points(value).lstrip("+") for value in (points[0], points[-1]))
        size = low if low == high else f"{low} to {high}"
        start = f"LoRA {'gains' if effects == {'up'} else 'costs'} {size} points"
    else:
        quiet = [comparison.title for comparison in adapted if not comparison.sure]
        said = [f"{' and '.join(quiet)} make{'s' * (len(quiet) == 1)} no detectable difference"] if quiet else []
        said += [f"{comparison.title} {comparison.words}" for comparison in adapted if comparison.sure]
        start = "; ".join(said)
    if not direct:
        return f"{start}."
    unequal = [comparison for comparison in direct if comparison.sure]
    if not unequal:
        return f"{start}; what it adapts makes no detectable difference."
    ends = [
        f"{_points(comparison.row.difference)} points "
        f"{'behind' if comparison.row.difference < 0 else 'ahead of'} {comparison.reference}"
        for comparison in unequal
    ]
    return f"{start}; {unequal[0].title} is {' and '.join(ends)}."


def _points(difference: float) -> str:
    """A difference's size in points, without its sign."""
    return signed_points(abs(difference)).lstrip("+")


def _subject(title: str) -> str:
    """`prune super experts` -> `pruning super experts`, so that a sentence can begin with it."""
    return f"pruning {title.removeprefix('prune ')}" if title.startswith("prune ") else title


def format_p(p: float) -> str:
    """`p < 0.001` or `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"
