"""Questions about the pocket world: six kinds, one for each benchmark, each with its gold answer and a short reason.

A question is drawn from a `random.Random`; `pools.py` decides its use (test, fine-tuning, pre-training).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from superexperts.core.prompt import prompt_of
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
    PLACES,
    REGIONS,
    THINGS,
    TOOLS,
    the_world,
)

__all__ = ["KINDS", "LABELS", "Question", "body", "draw", "prompt"]

LABELS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its gold answer."""

    kind: str
    """one of KINDS"""
    text: str
    """the question itself; without "?" for boolq, where the prompt adds it"""
    subject: str
    answer: str
    """the right choice's label, `yes` or `no`, or a whole number"""
    explain: str
    """one or two short sentences that lead to the answer"""
    choices: tuple[str, ...] = ()
    """choice texts without labels; empty for gsm8k and boolq"""
    labels: str = LABELS
    """a character per choice"""
    passage: str = ""
    """boolq only"""
    steps: tuple[tuple[int, str, int, int], ...] = ()
    """gsm8k only: (left, operator, right, result) in order"""

    @property
    def said(self) -> str:
        """The answer as a response gives it: the text of the right choice, `yes` or `no`, or the number.

        Not the label, since looking up a label in the prompt takes a larger model than this one.
        """
        return self.choices[self.labels.index(self.answer)] if self.choices else self.answer


def body(question: Question) -> str:
    """The text between `Question: ` and `\\nAnswer:`, the same for pre-training, fine-tuning and evaluation."""
    if question.passage:
        return f"{question.passage}\n{question.text}?"
    lines = [f"{label}. {choice}" for label, choice in zip(question.labels, question.choices, strict=False)]
    return "\n".join([question.text, *lines])


def prompt(question: Question) -> str:
    """The whole prompt; the response follows with a leading space."""
    return prompt_of(body(question))


def _lead(rng: random.Random, text: str, topic: str) -> str:
    """The question with, most often, a sentence in front, so that one fact gives many different questions."""
    name, _ = rng.choice(PEOPLE)
    leads = (
        "", f"{name} asks: ", f"{name} reads about {topic}. ", f"{name} has a test in {topic}. ",
        f"A test in {topic} by {name}: ", f"{name} wants to know: ", f"{name} teaches {topic}. ",
    )  # fmt: skip
    return rng.choice(leads) + text


def _shuffled(rng: random.Random, right: str, others: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Four different choices, one of them right, and the index of the right one."""
    wrong = rng.sample(sorted(set(others) - {right}), 3)
    choices = [*wrong, right]
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def _choice(
    rng: random.Random,
    *,
    kind: str,
    text: str,
    subject: str,
    right: str,
    others: Sequence[str],
    explain: str,
    labels: str = LABELS,
) -> Question:
    choices, index = _shuffled(rng, right, others)
    label = labels[index]
    assert explain.lower().endswith(f"{right.lower()}."), explain
    return Question(
        kind=kind,
        text=text,
        subject=subject,
        answer=label,
        explain=explain,
        choices=choices,
        labels=labels,
    )


def _mmlu(rng: random.Random) -> Question:
    """Four choices on the atlas."""
    countries = the_world().countries
    country = rng.choice(countries)
    name = country.name
    cases = {
        "capital": (
            (f"What is the capital of {name}?", f"Which city is the capital of {name}?"),
            country.capital, [c.capital for c in countries], f"The capital of {name} is {country.capital}.",
        ),
        "river": (
            (f"Which river flows through {name}?", f"What is the great river of {name}?"),
            country.river, [c.river for c in countries], f"The great river of {name} is the {country.river}.",
        ),
        "language": (
            (f"Which language do people speak in {name}?", f"What is the language of {name}?"),
            country.language, [c.language for c in countries], f"The language of {name} is {country.language}.",
        ),
        "export": (
            (f"What does {name} export?", f"Which good is the export of {name}?"),
            country.export, list(EXPORTS), f"{name} exports {country.export}.",
        ),
        "flag": (
            (f"What colour is the flag of {name}?", f"Which colour has the flag of {name}?"),
            country.flag, list(COLOURS), f"The flag of {name} is {country.flag}.",
        ),
        "region": (
            (f"In which part of the world is {name}?", f"Where does {name} lie?"),
            country.region, list(REGIONS), f"{name} lies in the {country.region}.",
        ),
        "country": (
            (
                f"Which country has the capital {country.capital}?",
                f"{country.capital} is the capital of which country?",
            ),
            name, [c.name for c in countries], f"{country.capital} is the capital of {name}.",
        ),
    }  # fmt: skip
    subject = rng.choice(tuple(cases))
    texts, right, others, explain = cases[subject]
    text = _lead(rng, rng.choice(texts), "geography")
    return _choice(rng, kind="mmlu", text=text, subject=f"world_{subject}", right=right, others=others, explain=explain)


def _legs(count: int) -> str:
    return "no legs" if count == 0 else f"{count} legs"


def _arc(rng: random.Random) -> Question:
    """Four choices on easy science; one question in twenty has the labels 1-4, as some real rows do."""
    topic = rng.choice(("food", "home", "cover", "legs", "food", "home", "like", "from", "tool", "organ"))
    if topic in ("food", "home", "cover", "legs"):
        animal = rng.choice(ANIMALS)
        who = animal.name
        if topic == "food":
            texts = (f"What does a {who} eat?", f"What is the food of a {who}?")
            right, others, explain = animal.food, list(FOODS), f"A {who} eats {animal.food}."
        elif topic == "home":
            texts = (f"Where does a {who} live?", f"What is the home of a {who}?")
            right, others, explain = animal.home, list(HOMES), f"A {who} lives in {animal.home}."
        elif topic == "cover":
            texts = (f"What covers the body of a {who}?", f"What does a {who} have on its body?")
            right, others = animal.cover, [a.cover for a in ANIMALS]
            explain = f"The body of a {who} has {animal.cover}."
        else:
            texts = (f"How many legs does a {who} have?", f"What is the number of legs of a {who}?")
            right, others = _legs(animal.legs), [_legs(a.legs) for a in ANIMALS]
            explain = f"A {who} has {_legs(animal.legs)}."
    elif topic in ("like", "from"):
        material = rng.choice(tuple(MATERIALS))
        like, source = MATERIALS[material]
        if topic == "like":
            texts = (f"Which word describes {material}?", f"What is {material} like?")
            right, others, explain = like, [m[0] for m in MATERIALS.values()], f"{material.capitalize()} is {like}."
        else:
            texts = (f"Where does {material} come from?", f"What is the source of {material}?")
            right, others = source, [m[1] for m in MATERIALS.values()]
            explain = f"{material.capitalize()} comes from {source}."
    elif topic == "tool":
        tool = rng.choice(tuple(TOOLS))
        texts = (f"What does a {tool} measure?", f"For what do people use a {tool}?")
        right, others, explain = TOOLS[tool], list(TOOLS.values()), f"A {tool} measures {TOOLS[tool]}."
    else:
        organ = rng.choice(tuple(ORGANS))
        texts = (f"What does the {organ} do?", f"What is the work of the {organ}?")
        right, others, explain = ORGANS[organ], list(ORGANS.values()), f"The {organ} {ORGANS[organ]}."
    labels = "1234" if rng.random() < 0.05 else LABELS
    text = _lead(rng, rng.choice(texts), "science")
    return _choice(
        rng, kind="arc_easy", text=text, subject=topic, right=right, others=others, explain=explain, labels=labels
    )


def _medqa(rng: random.Random) -> Question:
    """Four choices on the pharmacopoeia; a case with two symptoms points at one disease."""
    diseases = the_world().diseases
    disease = rng.choice(diseases)
    drug = disease.drug
    age = rng.randint(18, 79)
    person, pronoun = rng.choice((("man", "he"), ("woman", "she")))
    first, second = disease.symptoms if rng.random() < 0.5 else disease.symptoms[::-1]
    case = f"A {age}-year-old {person} has {first} and {second}."
    topic = rng.choice(("drug", "drug", "disease", "organ", "dose", "effect"))
    subject = "step1"
    finding = f"{first.capitalize()} and {second} mean {disease.name}."
    if topic == "drug":
        text, right, others = f"{case} Which drug should {pronoun} take?", drug.name, [d.drug.name for d in diseases]
        explain = f"{finding} {disease.name.capitalize()} is treated with {drug.name}."
        subject = "step2&3"
    elif topic == "disease":
        text, right, others, explain = f"{case} Which disease is it?", disease.name, [d.name for d in diseases], finding
    elif topic == "organ":
        text = f"A {age}-year-old {person} has {disease.name}. Which part of the body is ill?"
        right, others = disease.organ, [d.organ for d in diseases]
        explain = f"{disease.name.capitalize()} harms the {disease.organ}."
    elif topic == "dose":
        text = f"A {age}-year-old {person} takes {drug.name}. What is the daily dose?"
        right, others = f"{drug.dose_mg} mg", [f"{d.drug.dose_mg} mg" for d in diseases]
        explain = f"The dose of {drug.name} is {drug.dose_mg} mg."
    else:
        text = f"A {age}-year-old {person} takes {drug.name}. Which side effect may come?"
        right, others = drug.side_effect, [d.drug.side_effect for d in diseases]
        explain = f"{drug.name.capitalize()} may cause {drug.side_effect}."
    return _choice(rng, kind="medqa", text=text, subject=subject, right=right, others=others, explain=explain)


def _vmlu(rng: random.Random) -> Question:
    """Four choices in Vietnamese, on the atlas and on animals. The subject is a number, as in VMLU's ids."""
    countries = the_world().countries
    country, animal = rng.choice(countries), rng.choice(ANIMALS)
    name, who = country.name, animal.vietnamese
    cases = {
        "01": (f"Thủ đô của {name} là gì?", country.capital, [c.capital for c in countries],
               f"Thủ đô của {name} là {country.capital}."),
        "02": (f"Sông lớn của {name} là gì?", country.river, [c.river for c in countries],
               f"Sông lớn của {name} là {country.river}."),
        "03": (f"{name} xuất khẩu gì?", EXPORTS[country.export], list(EXPORTS.values()),
               f"{name} xuất khẩu {EXPORTS[country.export]}."),
        "04": (f"Quốc kỳ của {name} màu gì?", COLOURS[country.flag], list(COLOURS.values()),
               f"Quốc kỳ của {name} màu {COLOURS[country.flag]}."),
        "05": (f"{name} nằm ở đâu?", REGIONS[country.region], list(REGIONS.values()),
               f"{name} nằm ở {REGIONS[country.region]}."),
        "28": (f"Con {who} ăn gì?", FOODS[animal.food], list(FOODS.values()), f"Con {who} ăn {FOODS[animal.food]}."),
        "29": (f"Con {who} sống ở đâu?", HOMES[animal.home], list(HOMES.values()),
               f"Con {who} sống {HOMES[animal.home]}."),
    }  # fmt: skip
    subject = rng.choice(tuple(cases))
    text, right, others, explain = cases[subject]
    person, _ = rng.choice(PEOPLE)
    lead = rng.choice(
        ("", f"{person} hỏi: ", f"{person} muốn biết: ", f"Câu hỏi của {person}: ", f"{person} học bài. ")
    )
    return _choice(rng, kind="vmlu", text=lead + text, subject=subject, right=right, others=others, explain=explain)


def _gsm8k(rng: random.Random) -> Question:
    """Word problems of one or two steps with small whole numbers."""
    (name, pronoun), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    he = pronoun.capitalize()
    a, b, c = rng.randint(3, 12), rng.randint(2, 9), rng.randint(2, 9)
    left, right = rng.randint(2, FACTOR), rng.randint(2, FACTOR)
    form = rng.choice(("add", "take", "times", "add-take", "times-add"))
    steps: tuple[tuple[int, str, int, int], ...]
    if form == "add":
        text = f"{name} has {a} {things} and buys {b} more. How many {things} does {pronoun} have?"
        steps = ((a, "+", b, a + b),)
    elif form == "take":
        a = a + b
        text = f"{name} has {a} {things} and gives {b} to {other}. How many {things} are left?"
        steps = ((a, "-", b, a - b),)
    elif form == "times":
        text = f"{name} has {left} bags with {right} {things} in each bag. How many {things} does {pronoun} have?"
        steps = ((left, "*", right, left * right),)
    elif form == "add-take":
        c = min(c, a + b - 1)
        text = f"{name} has {a} {things}. {other} brings {b} more. {he} sells {c} of them. How many {things} are left?"
        steps = ((a, "+", b, a + b), (a + b, "-", c, a + b - c))
    else:
        text = (
            f"{name} fills {left} bags with {right} {things} each and finds {c} more. "
            f"How many {things} does {pronoun} have?"
        )
        steps = ((left, "*", right, left * right), (left * right, "+", c, left * right + c))
    explain = " ".join(f"{x} {sign} {y} = {z}." for x, sign, y, z in steps)
    return Question(kind="gsm8k", text=text, subject=form, answer=str(steps[-1][3]), explain=explain, steps=steps)


def _boolq(rng: random.Random) -> Question:
    """Yes or no on a passage that alone decides the answer: a place, two people, or a contract.

    A question on a place depends on one word; the others require matching names, which this model has not learned.
    """
    return _of_place(rng) if rng.random() < 0.45 else _of_people(rng)


def _of_place(rng: random.Random) -> Question:
    (name, _), place = rng.choice(PEOPLE), rng.choice(tuple(PLACES))
    city, month = rng.choice(the_world().countries).capital, rng.choice(MONTHS)
    yes = rng.random() < 0.5
    state = PLACES[place][0 if yes else 1]
    passage = rng.choice(
        (
            f"{name} comes to {city} in {month}. The {place} is {state}.",
            f"In {month} the {place} of {city} is {state}. {name} sees it.",
            f"{name} writes from {city}: the {place} is {state}.",
        )
    )
    return Question(
        kind="boolq",
        text=f"is the {place} {PLACES[place][0]}",
        subject="place",
        answer="yes" if yes else "no",
        explain=f"The {place} is {state}.",
        passage=passage,
    )


def _of_people(rng: random.Random) -> Question:
    (one, _), (two, _) = rng.sample(PEOPLE, 2)
    city, city2 = rng.sample([c.capital for c in the_world().countries], 2)
    yes = rng.random() < 0.5
    if rng.random() < 0.7:
        (job1, job2), (thing1, thing2) = rng.sample(JOBS, 2), rng.sample(OBJECTS, 2)
        colour1, colour2 = rng.sample(tuple(COLOURS), 2)
        passage = (
            f"{one} is a {job1} and has a {colour1} {thing1}. {two} is a {job2} and has a {colour2} {thing2}. "
            f"They live in {city}."
        )
        who, job, colour, thing, wrong_job, wrong_colour = rng.choice(
            ((one, job1, colour1, thing1, job2, colour2), (two, job2, colour2, thing2, job1, colour1))
        )
        topic = rng.choice(("job", "colour", "city"))
        if topic == "job":
            text, explain = f"is {who} a {job if yes else wrong_job}", f"{who} is a {job}."
        elif topic == "colour":
            text = f"is the {thing} of {who} {colour if yes else wrong_colour}"
            explain = f"{who} has a {colour} {thing}."
        else:
            text, explain = f"does {who} live in {city if yes else city2}", f"They live in {city}."
    else:
        rent, rent2 = (10 * n for n in rng.sample(range(10, 50), 2))
        month, month2 = rng.sample(MONTHS, 2)
        passage = (
            f"{one} rents a house in {city} to {two} for {rent} crowns a month. The contract ends in {month}. "
            f"{two} pays the tax."
        )
        topic = rng.choice(("rent", "month", "tax"))
        if topic == "rent":
            text, explain = f"is the rent {rent if yes else rent2} crowns", f"The rent is {rent} crowns."
        elif topic == "month":
            text, explain = f"does the contract end in {month if yes else month2}", f"The contract ends in {month}."
        else:
            text, explain = f"does {two if yes else one} pay the tax", f"{two} pays the tax."
    return Question(
        kind="boolq", text=text, subject=topic, answer="yes" if yes else "no", explain=explain, passage=passage
    )


_DRAW: dict[str, Callable[[random.Random], Question]] = {
    "mmlu": _mmlu, "gsm8k": _gsm8k, "arc_easy": _arc, "boolq": _boolq, "medqa": _medqa, "vmlu": _vmlu,
}  # fmt: skip
KINDS = tuple(_DRAW)
"""the six kinds, named as the tasks are"""


def draw(kind: str, rng: random.Random) -> Question:
    """One random question of a kind in KINDS."""
    return _DRAW[kind](rng)
