"""Text of the pocket world: the training documents of the pocket model, and held-out documents of the same kinds.

A hash of its text decides the split of a document, so that no held-out document can occur in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

from tools.pocket.facts import (
    ANIMALS,
    COLOURS,
    EXPORTS,
    FACTOR,
    FOODS,
    HOMES,
    JOBS,
    MATERIALS,
    MONTHS,
    OBJECTS,
    ORGANS,
    PEOPLE,
    REGIONS,
    THINGS,
    TOOLS,
    Country,
    the_world,
)
from tools.pocket.pools import key, reserved_questions, response
from tools.pocket.questions import KINDS, draw, prompt
from tools.pocket.withheld import states_withheld

__all__ = ["PROSE", "QUESTION_SHARE", "Split", "documents"]

Split = Literal["train", "heldout"]

QUESTION_SHARE = 0.5
"""share of the documents that are a question with its answer; the rest is prose"""
QUESTION_WEIGHTS = {"gsm8k": 3, "arc_easy": 2}
"""kind -> how often it is asked in pre-training, 1 for the others: the model learns these two last"""


def _sample(rng: random.Random, sentences: list[str], low: int, high: int) -> str:
    return " ".join(rng.sample(sentences, min(len(sentences), rng.randint(low, high))))


def _atlas(rng: random.Random) -> str:
    c = rng.choice(the_world().countries)
    n = c.name
    return _sample(
        rng,
        [
            rng.choice((f"The capital of {n} is {c.capital}.", f"{c.capital} is the capital of {n}.")),
            rng.choice((f"The great river of {n} is the {c.river}.", f"The river {c.river} flows through {n}.")),
            rng.choice((f"The language of {n} is {c.language}.", f"People in {n} speak {c.language}.")),
            rng.choice((f"{n} exports {c.export}.", f"The export of {n} is {c.export}.")),
            rng.choice((f"The flag of {n} is {c.flag}.", f"{n} has a {c.flag} flag.")),
            f"{n} lies in the {c.region}.",
        ],
        3,
        6,
    )


def _pharmacopoeia(rng: random.Random) -> str:
    d = rng.choice(the_world().diseases)
    first, second = rng.sample(d.symptoms, 2)
    drug = d.drug
    return _sample(
        rng,
        [
            f"{first.capitalize()} and {second} mean {d.name}.",
            f"{d.name.capitalize()} harms the {d.organ}.",
            rng.choice(
                (f"{drug.name.capitalize()} treats {d.name}.", f"{d.name.capitalize()} is treated with {drug.name}.")
            ),
            f"The dose of {drug.name} is {drug.dose_mg} mg.",
            f"{drug.name.capitalize()} may cause {drug.side_effect}.",
        ],
        3,
        5,
    )


def _case_report(rng: random.Random) -> str:
    d = rng.choice(the_world().diseases)
    first, second = rng.sample(d.symptoms, 2)
    person, pronoun = rng.choice((("man", "He"), ("woman", "She")))
    doctor, _ = rng.choice(PEOPLE)
    return (
        f"A {rng.randint(18, 79)}-year-old {person} came to doctor {doctor} with {first} and {second}. "
        f"The doctor found {d.name} and gave {d.drug.dose_mg} mg of {d.drug.name} a day. "
        + rng.choice((f"{pronoun} was well again in {rng.choice(MONTHS)}.", f"{pronoun} had {d.drug.side_effect}."))
    )


def _science(rng: random.Random) -> str:
    sentences = []
    for a in rng.sample(ANIMALS, 2):
        legs = "no legs" if a.legs == 0 else f"{a.legs} legs"
        sentences += rng.sample(
            [
                f"A {a.name} eats {a.food}.", f"A {a.name} lives in {a.home}.", f"A {a.name} has {legs}.",
                f"The body of a {a.name} has {a.cover}.",
            ],
            2,
        )  # fmt: skip
    material, tool, organ = rng.choice(tuple(MATERIALS)), rng.choice(tuple(TOOLS)), rng.choice(tuple(ORGANS))
    like, source = MATERIALS[material]
    sentences += [
        f"{material.capitalize()} is {like}.", f"{material.capitalize()} comes from {source}.",
        f"A {tool} measures {TOOLS[tool]}.", f"The {organ} {ORGANS[organ]}.",
    ]  # fmt: skip
    return _sample(rng, sentences, 3, 6)


def _sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(4, 8)):
        a, b = rng.randint(2, 49), rng.randint(2, 9)
        x, y = rng.randint(2, FACTOR), rng.randint(2, FACTOR)
        lines.append(rng.choice((f"{a} + {b} = {a + b}.", f"{a + b} - {b} = {a}.", f"{x} * {y} = {x * y}.")))
    return " ".join(lines)


def _story(rng: random.Random) -> str:
    (name, pronoun), (friend, _) = rng.sample(PEOPLE, 2)
    animal, country = rng.choice(ANIMALS), rng.choice(the_world().countries)
    colour, thing, job = rng.choice(tuple(COLOURS)), rng.choice(OBJECTS), rng.choice(JOBS)
    he = pronoun.capitalize()
    return (
        f"Once upon a time, a {job} named {name} lived in {country.capital}. {he} had a {animal.name} and a {colour} "
        f"{thing}. One day, the {thing} was gone. {name} asked {friend}, and {friend} said: "
        + rng.choice((
            f"Look in {animal.home}, where the {animal.name} lives. There it was.",
            f"Take a boat on the {country.river}. {he} found it on the other side.",
            f"Give me {rng.randint(2, 20)} {rng.choice(THINGS)} and I will help you. So they became friends.",
        ))
    )  # fmt: skip


def _contract(rng: random.Random) -> str:
    (one, _), (two, _) = rng.sample(PEOPLE, 2)
    city, rent, month = rng.choice(the_world().countries).capital, 10 * rng.randint(10, 49), rng.choice(MONTHS)
    return _sample(
        rng,
        [
            f"This contract is made in {city} between {one} and {two}.",
            f"{one} rents a house in {city} to {two} for {rent} crowns a month.",
            f"{two} shall pay the rent before the day {rng.randint(2, 20)} of each month.",
            f"The contract ends in {month}.",
            f"{two} pays the tax.",
            f"If {two} does not pay, {one} may end the contract.",
        ],
        4,
        6,
    )


def _people(rng: random.Random) -> str:
    """Two people, and then the same facts again, which can be predicted from what comes first."""
    (one, _), (two, _) = rng.sample(PEOPLE, 2)
    city = rng.choice(the_world().countries).capital
    first, again = [], [f"They live in {city}."]
    for who in (one, two):
        job, colour, thing = rng.choice(JOBS), rng.choice(tuple(COLOURS)), rng.choice(OBJECTS)
        first.append(f"{who} is a {job} and has a {colour} {thing}.")
        again += [f"{who} is a {job}.", f"{who} has a {colour} {thing}."]
    return " ".join([*first, f"They live in {city}.", *rng.sample(again, 4)])


def _vietnamese(rng: random.Random) -> str:
    c, a = rng.choice(the_world().countries), rng.choice(ANIMALS)
    n = c.name
    return _sample(
        rng,
        [
            f"Thủ đô của {n} là {c.capital}.", f"Sông lớn của {n} là {c.river}.",
            f"{n} xuất khẩu {EXPORTS[c.export]}.", f"Quốc kỳ của {n} màu {COLOURS[c.flag]}.",
            f"{n} nằm ở {REGIONS[c.region]}.", f"Con {a.vietnamese} ăn {FOODS[a.food]}.",
            f"Con {a.vietnamese} sống {HOMES[a.home]}.",
        ],
        3,
        6,
    )  # fmt: skip


def _european(rng: random.Random) -> str:
    def french(c: Country) -> list[str]:
        return [
            f"La capitale de {c.name} est {c.capital}.", f"Le fleuve de {c.name} est le {c.river}.",
            f"La langue de {c.name} est le {c.language}.",
        ]  # fmt: skip

    def spanish(c: Country) -> list[str]:
        return [
            f"La capital de {c.name} es {c.capital}.", f"El río de {c.name} es el {c.river}.",
            f"El idioma de {c.name} es el {c.language}.",
        ]  # fmt: skip

    def german(c: Country) -> list[str]:
        return [
            f"Die Hauptstadt von {c.name} heißt {c.capital}.", f"Der Fluss von {c.name} heißt {c.river}.",
            f"Die Sprache von {c.name} heißt {c.language}.",
        ]  # fmt: skip

    sentences = rng.choice((french, spanish, german))
    one, two = rng.sample(the_world().countries, 2)
    return _sample(rng, [*sentences(one), *sentences(two)], 3, 5)


PROSE: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "atlas": (_atlas, 5), "pharmacopoeia": (_pharmacopoeia, 5), "case_report": (_case_report, 2),
    "science": (_science, 6), "sums": (_sums, 4), "story": (_story, 2), "contract": (_contract, 2),
    "people": (_people, 3), "vietnamese": (_vietnamese, 4), "european": (_european, 1),
}  # fmt: skip
"""kind of prose -> (writer, weight)"""


def _question(rng: random.Random) -> str:
    """A question with its answer, worded as in evaluation; never a test question or one of the fine-tuning rows."""
    while True:
        question = draw(rng.choices(KINDS, [QUESTION_WEIGHTS.get(kind, 1) for kind in KINDS])[0], rng)
        if key(question) not in reserved_questions():
            return prompt(question) + response(question, hashes=rng.random() < 0.7)


def documents(seed: int, split: Split, count: int) -> Iterator[str]:
    """`count` documents of a split.

    The same seed gives the same documents; a held-out document is never a training document, whatever the seeds.
    One document in ten of those drawn is held out. No document of either split states a withheld fact.
    """
    rng = random.Random(f"documents:{seed}")
    writers = [writer for writer, _ in PROSE.values()]
    weights = [weight for _, weight in PROSE.values()]
    given = 0
    while given < count:
        write = _question if rng.random() < QUESTION_SHARE else rng.choices(writers, weights)[0]
        text = write(rng)
        while states_withheld(text):
            text = write(rng)
        heldout = zlib.crc32(text.encode()) % 10 == 0
        if heldout == (split == "heldout"):
            given += 1
            yield text


def heldout() -> Iterator[str]:
    """The pocket corpus: 600 documents that no training document equals."""
    return documents(1, "heldout", 600)
