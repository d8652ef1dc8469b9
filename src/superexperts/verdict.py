"""What the paired tests say, in plain language: which differences were detected, and which were not."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from .artifacts import Extraction
from .results import SIGNIFICANT, Results, VariantResult, adjusted, signed_points
from .stats import Paired, compare, detectable, holm

__all__ = ["Comparison", "against_base", "against_controls", "format_p", "headline"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One variant against another on the items of all benchmarks."""

    name: str
    title: str
    reference: str
    """Title of what it is compared with."""
    paired: Paired
    p: float
    """Adjusted by Holm within its family."""
    tests: int
    """Size of that family."""

    @property
    def sure(self) -> bool:
        """Whether a difference was detected at 5%."""
        return self.p < SIGNIFICANT

    @property
    def effect(self) -> str:
        """down, up or none: for the words and the colours."""
        return "none" if not self.sure else "down" if self.paired.difference < 0 else "up"

    @property
    def words(self) -> str:
        """The conclusion about the two, such as `costs 12.3 points`."""
        points = signed_points(abs(self.paired.difference)).lstrip("+")
        if self.sure:
            return f"{'costs' if self.paired.difference < 0 else 'gains'} {points} points"
        return "makes no detectable difference"

    @property
    def detectable(self) -> str:
        """The smallest difference in points that would have been seen with 80% power."""
        paired = self.paired
        smallest = detectable(paired.only_base + paired.only_variant, paired.n, self.tests)
        return signed_points(smallest).lstrip("+")

    @property
    def interval(self) -> str:
        """The difference's 95% interval in points."""
        return f"{signed_points(self.paired.low)} to {signed_points(self.paired.high)}"


def against_base(results: Results) -> list[Comparison]:
    """Every variant against the base model, over all items; one family of tests."""
    p_values = adjusted(results)
    return [
        Comparison(
            name=variant.name,
            title=variant.title,
            reference=results.base.title,
            paired=variant.pooled,
            p=p_values[variant.name, None],
            tests=len(results.others),
        )
        for variant in results.others
        if variant.pooled is not None
    ]


def against_controls(
    results: Results,
    chosen: Collection[str],
    extractions: Mapping[str, Mapping[str, Sequence[Extraction]]],
) -> list[Comparison]:
    """The variant on the `chosen` experts against each other variant of its kind, item by item; one family of tests.

    That one variant differs from base and another does not is no evidence that the two differ; this tests it.
    `chosen` are names such as L2E54, `extractions` are by variant and benchmark; empty where nothing matches.
    """
    pairs: list[tuple[VariantResult, VariantResult, Paired]] = []
    for treated in results.others:
        if treated.experts is None or set(treated.experts) != set(chosen):
            continue
        for control in results.others:
            if control.kind == treated.kind and control.name != treated.name:
                _, pooled = compare(extractions[control.name], extractions[treated.name])
                pairs.append((treated, control, pooled))
    p_values = holm([pooled.p for *_, pooled in pairs])
    return [
        Comparison(
            name=treated.name, title=treated.title, reference=control.title, paired=pooled, p=p, tests=len(pairs)
        )
        for (treated, control, pooled), p in zip(pairs, p_values, strict=True)
    ]


def headline(results: Results, controls: Sequence[Comparison]) -> list[str]:
    """One sentence on pruning and one on LoRA, where the study has such variants."""
    found = {comparison.name: comparison for comparison in against_base(results)}
    sentences = []
    pruned = [found[variant.name] for variant in results.others if variant.kind == "prune"]
    if pruned:
        sentences.append("; ".join(f"{_subject(comparison.title)} {comparison.words}" for comparison in pruned) + ".")
    adapted = [found[variant.name] for variant in results.others if variant.kind == "lora"]
    if adapted:
        names = {comparison.name for comparison in adapted}
        direct = [comparison for comparison in controls if comparison.name in names]
        sentences.append(_on_adapters(adapted, direct))
    if sentences:
        sentences[0] = sentences[0].replace(" points", " points of accuracy", 1)
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _on_adapters(adapted: Sequence[Comparison], direct: Sequence[Comparison]) -> str:
    effects = {comparison.effect for comparison in adapted}
    if effects == {"none"}:
        start = "no LoRA variant differs detectably from the base model"
    elif len(effects) == 1 and len(adapted) > 1:
        points = sorted(abs(comparison.paired.difference) for comparison in adapted)
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
        f"{signed_points(abs(comparison.paired.difference)).lstrip('+')} points "
        f"{'behind' if comparison.paired.difference < 0 else 'ahead of'} {comparison.reference}"
        for comparison in unequal
    ]
    return f"{start}; {unequal[0].title} is {' and '.join(ends)}."


def _subject(title: str) -> str:
    """`prune super experts` -> `pruning super experts`, so that a sentence can begin with it."""
    return f"pruning {title.removeprefix('prune ')}" if title.startswith("prune ") else title


def format_p(p: float) -> str:
    """`p < 0.001` or `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"
