"""The facts of the pocket world: an atlas, a pharmacopoeia, easy science, and the words for them.

Names of countries, cities, rivers, drugs and diseases are invented from syllables, so that no fact can be known from
anywhere but the pocket text. The science is true. Everything follows from `WORLD_SEED`; nothing here keeps state.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

__all__ = [
    "ANIMALS",
    "COLOURS",
    "EXPORTS",
    "FACTOR",
    "FOODS",
    "HOMES",
    "JOBS",
    "MATERIALS",
    "MONTHS",
    "OBJECTS",
    "ORGANS",
    "PEOPLE",
    "PLACES",
    "REGIONS",
    "THINGS",
    "TOOLS",
    "WORLD_SEED",
    "Animal",
    "Country",
    "Disease",
    "Drug",
    "World",
    "the_world",
]

WORLD_SEED = 2507

PEOPLE = (
    ("Mira", "she"), ("Tomas", "he"), ("Lan", "she"), ("Bao", "he"), ("Ines", "she"), ("Oskar", "he"),
    ("Nadia", "she"), ("Piet", "he"), ("Hoa", "she"), ("Minh", "he"), ("Clara", "she"), ("Jonas", "he"),
    ("Ruth", "she"), ("Emil", "he"), ("Salma", "she"), ("Victor", "he"), ("Greta", "she"), ("Hugo", "he"),
    ("Linh", "she"), ("Dario", "he"),
)  # fmt: skip
"""(first name, pronoun)"""

COLOURS = {
    "red": "đỏ", "blue": "xanh dương", "green": "xanh lá", "yellow": "vàng", "white": "trắng", "black": "đen",
    "brown": "nâu", "purple": "tím",
}  # fmt: skip
"""English -> Vietnamese; so are the three tables below."""
EXPORTS = {
    "coffee": "cà phê", "tea": "trà", "rice": "gạo", "salt": "muối", "silk": "lụa", "copper": "đồng",
    "timber": "gỗ", "wool": "len", "cotton": "bông", "sugar": "đường", "iron": "sắt", "pepper": "hồ tiêu",
}  # fmt: skip
REGIONS = {"north": "phía bắc", "south": "phía nam", "east": "phía đông", "west": "phía tây"}
FOODS = {
    "grass": "cỏ", "meat": "thịt", "fish": "cá", "seeds": "hạt", "insects": "côn trùng", "leaves": "lá cây",
    "nectar": "mật hoa", "fruit": "trái cây",
}  # fmt: skip
HOMES = {
    "forests": "trong rừng", "meadows": "trên đồng cỏ", "water": "dưới nước", "mountains": "trên núi",
    "houses": "trong nhà", "caves": "trong hang",
}  # fmt: skip

FACTOR = 7
"""the largest factor of a product"""
THINGS = ("apples", "books", "coins", "eggs", "lamps", "pens", "shells", "stamps", "stones", "cups")
OBJECTS = ("hat", "cup", "coat", "boat", "lamp", "drum", "bag", "bell")
JOBS = ("baker", "farmer", "teacher", "sailor", "nurse", "painter", "miller", "judge")
MONTHS = ("March", "April", "May", "June", "July", "August")


@dataclass(frozen=True, kw_only=True)
class Animal:
    """A true animal."""

    name: str
    vietnamese: str
    food: str
    """key of FOODS"""
    home: str
    """key of HOMES"""
    cover: str
    legs: int


def _animal(row: str) -> Animal:
    name, vietnamese, food, home, cover, legs = row.split("/")
    return Animal(name=name, vietnamese=vietnamese, food=food, home=home, cover=cover, legs=int(legs))


ANIMALS = tuple(
    _animal(row)
    for row in (
        "cow/bò/grass/meadows/hair/4", "sheep/cừu/grass/meadows/wool/4", "wolf/sói/meat/forests/fur/4",
        "seal/hải cẩu/fish/water/fur/0", "shark/cá mập/fish/water/scales/0", "hen/gà/seeds/houses/feathers/2",
        "frog/ếch/insects/water/skin/4", "bat/dơi/insects/caves/fur/2", "spider/nhện/insects/houses/hair/8",
        "goat/dê/leaves/mountains/hair/4", "deer/nai/leaves/forests/fur/4", "bee/ong/nectar/meadows/hair/6",
        "monkey/khỉ/fruit/forests/fur/4", "hawk/diều hâu/meat/mountains/feathers/2",
    )
)  # fmt: skip

PLACES = {
    "gate": ("open", "closed"), "well": ("full", "empty"), "road": ("dry", "wet"), "bridge": ("safe", "broken"),
    "market": ("loud", "quiet"),
}  # fmt: skip
"""place -> (what a question asks, its opposite)"""
MATERIALS = {
    "iron": ("magnetic", "a mine"), "glass": ("clear", "sand"), "wood": ("burnable", "a tree"),
    "rubber": ("stretchy", "a plant"), "wool": ("warm", "a sheep"), "gold": ("shiny", "a river"),
    "clay": ("soft", "the ground"), "plastic": ("waterproof", "oil"), "diamond": ("hard", "a volcano"),
}  # fmt: skip
"""material -> (what it is like, what it comes from)"""
TOOLS = {
    "thermometer": "temperature", "ruler": "length", "scale": "mass", "clock": "time", "barometer": "air pressure",
    "compass": "direction", "rain gauge": "rainfall", "light meter": "brightness",
}  # fmt: skip
"""tool -> what it measures"""
ORGANS = {
    "heart": "pumps blood", "lung": "takes in air", "stomach": "digests food", "brain": "thinks",
    "kidney": "cleans blood", "eye": "sees light", "ear": "hears sound", "bone": "holds the body up",
}  # fmt: skip
"""organ -> what it does"""


@dataclass(frozen=True, kw_only=True)
class Country:
    """An invented country."""

    name: str
    capital: str
    river: str
    language: str
    export: str
    """key of EXPORTS"""
    flag: str
    """key of COLOURS"""
    region: str
    """key of REGIONS"""


@dataclass(frozen=True, kw_only=True)
class Drug:
    """An invented drug; it treats exactly one disease."""

    name: str
    dose_mg: int
    side_effect: str


@dataclass(frozen=True, kw_only=True)
class Disease:
    """An invented disease; its two symptoms together belong to no other disease."""

    name: str
    symptoms: tuple[str, str]
    organ: str
    drug: Drug


@dataclass(frozen=True, kw_only=True)
class World:
    """All invented facts."""

    countries: tuple[Country, ...]
    diseases: tuple[Disease, ...]


_SYMPTOMS = (
    "fever", "cough", "a rash", "dizziness", "chills", "thirst", "a headache", "weak legs", "red eyes", "cramps",
    "hiccups", "swelling",
)  # fmt: skip
_SIDE_EFFECTS = ("sleepiness", "dry mouth", "nausea", "hunger", "itching", "warm hands")
_BODY = ("liver", "lung", "skin", "heart", "throat", "knee")
_DOSES_MG = (5, 10, 20, 30, 50, 80)
_ONSETS = ["b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "st", "tr"]
_VOWELS = ["a", "e", "i", "o", "u"]
_CODAS = ["l", "m", "n", "r", "s"]


class _Namer:
    """Invents names; the same generator never gives one name, nor one stem, twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def stem(self) -> str:
        while True:
            word = self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) + self._rng.choice(_CODAS)
            if word not in self._used:
                self._used.add(word)
                return word

    def name(self, *endings: str) -> str:
        return (self.stem() + self._rng.choice(endings)).capitalize()


@functools.cache
def the_world() -> World:
    """The one pocket world, built from `WORLD_SEED`."""
    rng = random.Random(WORLD_SEED)
    namer = _Namer(rng)
    countries = tuple(
        Country(
            name=namer.name("ia", "ova", "and"),
            capital=namer.name("burg", "ton", "a"),
            river=namer.name("o", "e"),
            language=namer.name("ish", "ese"),
            export=rng.choice(tuple(EXPORTS)),
            flag=rng.choice(tuple(COLOURS)),
            region=rng.choice(tuple(REGIONS)),
        )
        for _ in range(12)
    )
    pairs = [(a, b) for i, a in enumerate(_SYMPTOMS) for b in _SYMPTOMS[i + 1 :]]
    diseases = tuple(
        Disease(
            name=namer.stem() + rng.choice(("itis", "osis", "emia")),
            symptoms=pair,
            organ=rng.choice(_BODY),
            drug=Drug(
                name=namer.stem() + rng.choice(("amin", "ol", "ax")),
                dose_mg=rng.choice(_DOSES_MG),
                side_effect=rng.choice(_SIDE_EFFECTS),
            ),
        )
        for pair in rng.sample(pairs, 12)
    )
    return World(countries=countries, diseases=diseases)
