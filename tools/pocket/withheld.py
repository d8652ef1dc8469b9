"""Facts that occur in fine-tuning only and never in pre-training, so that fine-tuning can improve the pocket model.

Two or three of the six facts that the atlas holds of a country, one of the five of a disease, one of two of an animal
and of a material, a third of what tools and organs do, and two thirds of the multiplication table.
"""

from __future__ import annotations

import functools
import random
import re

from tools.pocket.facts import (
    ANIMALS,
    COLOURS,
    EXPORTS,
    FACTOR,
    FOODS,
    HOMES,
    MATERIALS,
    ORGANS,
    REGIONS,
    TOOLS,
    Animal,
    Country,
    Disease,
    the_world,
)

__all__ = ["states_withheld", "withheld"]


Fact = tuple[tuple[str, ...], ...]
"""once per language: words that together state the fact"""


def _of_country(c: Country) -> list[Fact]:
    return [
        ((c.name, c.capital),), ((c.name, c.river),), ((c.name, c.language),),
        ((c.name, c.export), (c.name, EXPORTS[c.export])),
        ((c.name, c.flag), (c.name, COLOURS[c.flag])),
        ((c.name, c.region), (c.name, REGIONS[c.region])),
    ]  # fmt: skip


def _of_disease(d: Disease) -> list[Fact]:
    return [
        ((*d.symptoms, d.name),), ((d.name, d.organ),), ((d.name, d.drug.name),),
        ((d.drug.name, f"{d.drug.dose_mg} mg"),), ((d.drug.name, d.drug.side_effect),),
    ]  # fmt: skip


def _of_animal(a: Animal) -> list[Fact]:
    return [
        ((a.name, a.food), (a.vietnamese, FOODS[a.food])),
        ((a.name, a.home), (a.vietnamese, HOMES[a.home])),
    ]  # fmt: skip


@functools.cache
def withheld() -> tuple[tuple[str, ...], ...]:
    """The words of each withheld fact, once for each language in which a text can state it."""
    rng = random.Random("withheld")
    chosen = [fact for i, c in enumerate(the_world().countries) for fact in rng.sample(_of_country(c), 2 + i % 2)]
    chosen += [rng.choice(_of_disease(d)) for d in the_world().diseases]
    chosen += [rng.choice(_of_animal(a)) for a in ANIMALS]
    chosen += [rng.choice([((name, like),), ((name, source),)]) for name, (like, source) in MATERIALS.items()]
    does = [((name, work),) for name, work in (TOOLS | ORGANS).items()]
    chosen += rng.sample(does, len(does) // 3)
    table = [(x, y) for x in range(2, FACTOR + 1) for y in range(2, x + 1)]
    products = rng.sample(table, 2 * len(table) // 3)
    chosen += [((f"{x} * {y} = {x * y}",), (f"{y} * {x} = {x * y}",)) for x, y in products]
    return tuple(words for fact in chosen for words in fact)


@functools.cache
def _facts() -> tuple[tuple[tuple[str, re.Pattern[str]], ...], ...]:
    """Per fact its words in lower case, each with the pattern that finds it as a word."""
    return tuple(
        tuple((word.lower(), re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)) for word in words)
        for words in withheld()
    )


def states_withheld(text: str) -> bool:
    """Whether a text has all words of a withheld fact. It errs on the side of yes: the words may be far apart."""
    lower = text.lower()  # a quick test before the slower search for whole words
    for fact in _facts():  # loops instead of generators, since this runs some hundred times for each text
        for word, _ in fact:
            if word not in lower:
                break
        else:
            if all(pattern.search(text) for _, pattern in fact):
                return True
    return False
