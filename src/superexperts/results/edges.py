"""Benchmarks on which the base model is at the floor or at the ceiling, so that a change could not show there."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Literal

from superexperts.benchmarks import BENCHMARKS
from superexperts.core.types import Answer
from superexperts.results.results import Results, VariantScore

__all__ = ["chance_of", "edge", "edge_sentences", "edges"]

Edge = Literal["floor", "ceiling"]

NARROW = 0.02
"""Less room than this, in accuracy, is none: 2 points are within what most studies cannot detect."""
MOSTLY = 0.5
"""A share of unparsed answers above which the base does not do the task, whatever its accuracy is."""


def chance_of(answers: Sequence[Answer]) -> float | None:
    """The accuracy without looking at a question: of picking choices at random, of always saying the more frequent of
    yes and no, 0 for numbers; None without gold answers."""
    graded = [answer for answer in answers if answer.gold is not None]
    if not graded:
        return None
    golds = collections.Counter(answer.gold for answer in graded if answer.kind == "yesno")
    guessed = sum(1 / len(answer.choices) for answer in graded if answer.kind == "choice" and answer.choices)
    return (guessed + max(golds.values(), default=0)) / len(graded)


def edge(score: VariantScore) -> Edge | None:
    """`floor` where the accuracy is no better than guessing or most answers were unparsed, `ceiling` where next to
    nothing is left to gain."""
    if score.unparsed_share > MOSTLY:
        return "floor"
    if score.chance is not None and (score.low <= score.chance or score.accuracy < score.chance + NARROW):
        return "floor"
    return "ceiling" if score.accuracy > 1 - NARROW else None


def edges(results: Results) -> Mapping[str, Edge]:
    """Benchmark -> the edge that the base is at, for the benchmarks where it is at one."""
    found = {score.task: edge(score) for score in results.base.scores}
    return {task: at for task, at in found.items() if at is not None}


def edge_sentences(results: Results) -> list[str]:
    """A sentence for each benchmark at an edge: where the base is, and what could not show there."""
    said = []
    for task, at in edges(results).items():
        score = results.base.score(task)
        assert score is not None, "the base has every benchmark"
        facts = [f"{100 * score.accuracy:.1f}% right"]
        if at == "floor" and score.chance is not None:
            facts.append(f"guessing gives {100 * score.chance:.1f}%")
        if score.unparsed:
            facts.append(f"{100 * score.unparsed_share:.0f}% unparsed")
        title = BENCHMARKS[task].title if task in BENCHMARKS else task
        lost = "loss" if at == "floor" else "gain"
        said.append(f"The base is at the {at} on {title} ({', '.join(facts)}), so a {lost} could not show there.")
    return said
