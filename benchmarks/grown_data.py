"""What the grown model knows, and two skills that it was never shown: everything generated, the same for a seed.

A world has people, towns and minerals with invented names; a fact is a subject, a relation and one of the relation's
values, asked as a question and told in sentences. Beside facts the model grows on short stories and a few small
skills. Word problems (from corda's demo) and programs on letters are kept from it, to be learnt afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from corda.demo import word_problems

Row = dict[str, str]

_ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "k", "kr", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_FIRST = (
    *("Ada", "Bela", "Ciro", "Dora", "Emil", "Fara", "Gus", "Hela", "Ivo", "Jana", "Kito", "Lea", "Milo", "Nora"),
    *("Otto", "Pia", "Quin", "Rosa", "Sami", "Tilda", "Ugo", "Vera", "Wim", "Xena", "Yusuf", "Zora"),
)
_TRADES = (
    *("miller", "weaver", "baker", "tanner", "cooper", "mason", "tailor", "potter", "smith", "scribe", "sailor"),
    *("farmer", "healer", "hunter", "glazier", "painter", "carpenter", "fisher", "gardener", "cobbler"),
)
_FOODS = (
    *("plums", "bread", "cheese", "beans", "nuts", "pears", "soup", "honey", "onions", "rice", "fish", "berries"),
    *("dumplings", "olives", "figs", "leeks"),
)
_INSTRUMENTS = ("harp", "flute", "drum", "lute", "horn", "fiddle", "zither", "bells", "pipe", "lyre", "oboe", "tuba")
_GOODS = (
    *("glass", "wool", "salt", "paper", "candles", "ropes", "clocks", "carpets", "knives", "cider", "baskets"),
    *("saddles", "lace", "boats", "lamps", "tiles"),
)
_COLOURS = ("red", "green", "blue", "grey", "white", "black", "yellow", "violet", "brown", "pink", "silver", "amber")
_ANIMALS = ("fox", "goat", "crow", "hare", "mule", "otter", "heron", "badger", "wolf", "hen", "cat", "dog")
_TEMPERS = ("old", "shy", "proud", "tired", "clever", "hungry", "small", "brave", "quiet", "lazy")
_PLACES = ("river", "mill", "forest", "bridge", "market", "hill", "well", "barn", "road", "garden")
_THINGS = ("eggs", "cups", "plates", "pencils", "bottles", "coins", "stamps", "cards", "shells", "stones")
_UNITS = ("dozen", "hours", "weeks", "metres", "kilograms", "quarters", "years", "minutes", "cents", "dollars")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Relation:
    """One thing that can be known of a subject.

    Attributes:
        question: With a place for the subject.
        statement: With places for the subject and the value.
        values: What the answer is drawn from.
    """

    question: str
    statement: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Subjects of one kind with what is true of them.

    Attributes:
        relations: In the order told.
        facts: Subject -> the value of each relation.
    """

    relations: tuple[Relation, ...]
    facts: dict[str, tuple[str, ...]]

    def rows(self, subjects: list[str] | None = None) -> list[Row]:
        """Question and answer of every fact of the subjects (default: all).

        Args:
            subjects: Whose.
        """
        return [
            {"question": relation.question.format(subject), "answer": value}
            for subject in subjects or self.facts
            for relation, value in zip(self.relations, self.facts[subject], strict=True)
        ]

    def told(self, subject: str, rng: random.Random) -> str:
        """The subject's facts as sentences, in some order.

        Args:
            subject: Whose.
            rng: Of the order.
        """
        pairs = list(zip(self.relations, self.facts[subject], strict=True))
        rng.shuffle(pairs)
        return " ".join(relation.statement.format(subject, value) for relation, value in pairs)


@dataclass(frozen=True)
class World:
    """All that is true.

    Attributes:
        families: "people", "towns" and "minerals".
        calibration: The people whose facts calibration may draw from; those of the others are measured.
    """

    families: dict[str, Family]
    calibration: tuple[str, ...]

    def measured(self, name: str) -> list[Row]:
        """Facts of a family that calibration never draws from.

        Args:
            name: Of the family.
        """
        family = self.families[name]
        return family.rows([subject for subject in family.facts if subject not in self.calibration])


def world(seed: int = 0, people: int = 200, towns: int = 80, minerals: int = 80, measured: int = 60) -> World:
    """A world of so many subjects.

    Args:
        seed: Of names and facts.
        people: How many.
        towns: How many.
        minerals: How many.
        measured: How many of the people calibration never draws from.
    """
    rng = random.Random(seed)
    words = _words(rng)
    surnames, places = _taken(words, 60), _taken(words, 24)
    rivers, hills = (_taken(words, 16) for _ in range(2))
    pairs = list(product(_FIRST, surnames))
    rng.shuffle(pairs)
    kinds = {
        "people": (
            [f"{first} {last}" for first, last in pairs[:people]],
            (
                Relation("Where was {} born?", "{} was born in {}.", places),
                Relation("What is the trade of {}?", "{} works as a {}.", _TRADES),
                Relation("What does {} like to eat?", "{} likes to eat {}.", _FOODS),
                Relation("Which instrument does {} play?", "{} plays the {}.", _INSTRUMENTS),
            ),
        ),
        "towns": (
            _taken(words, towns),
            (
                Relation("On which river does {} lie?", "{} lies on the river {}.", rivers),
                Relation("Which goods does {} sell?", "{} sells {}.", _GOODS),
            ),
        ),
        "minerals": (
            [f"{name}ite" for name in _taken(words, minerals)],
            (
                Relation("Which colour has {}?", "{} is {}.", _COLOURS),
                Relation("In which hills is {} found?", "{} is found in the hills of {}.", hills),
            ),
        ),
    }
    families = {
        name: Family(relations, {subject: tuple(rng.choice(r.values) for r in relations) for subject in subjects})
        for name, (subjects, relations) in kinds.items()
    }
    return World(families, tuple(families["people"].facts)[measured:])


def story(rng: random.Random) -> str:
    """Four sentences on one animal.

    Args:
        rng: Of the words.
    """
    animal, temper, place, friend = (rng.choice(some) for some in (_ANIMALS, _TEMPERS, _PLACES, _ANIMALS))
    thing, other, day, unit = (rng.choice(some) for some in (_THINGS, _PLACES, _DAYS, _UNITS))
    middle = rng.choice(
        (
            f"There it met the {friend} with {rng.randrange(2, 10)} {thing}.",
            f"It waited {rng.randrange(2, 60)} {unit} for the {friend}.",
            f"The {friend} had lost its {thing} near the {other}.",
        )
    )
    end = rng.choice(
        (
            f"On {day} they went to the {other} together.",
            f"So the {animal} gave the {thing} to the {friend} and went home.",
            f"The {friend} said that the {other} was no place for a {temper} {animal}.",
        )
    )
    return f"The {temper} {animal} went to the {place}. {middle} {end}"


def small_skill(rng: random.Random) -> Row:
    """A question that needs no knowledge: spelling backwards, counting on, the next letter, a small sum.

    Args:
        rng: Of the question.
    """
    kind = rng.randrange(4)
    if kind == 0:
        letters = [rng.choice(_LETTERS) for _ in range(rng.randrange(2, 5))]
        return {"question": f"Spell {' '.join(letters)} backwards.", "answer": " ".join(reversed(letters))}
    if kind == 1:
        number = rng.randrange(10, 300)
        return {"question": f"Which number comes after {number}?", "answer": str(number + 1)}
    if kind == 2:
        place = rng.randrange(25)
        return {"question": f"Which letter comes after {_LETTERS[place]}?", "answer": _LETTERS[place + 1]}
    one, two = rng.randrange(1, 10), rng.randrange(1, 10)
    return {"question": f"How much is {one} + {two}?", "answer": f"{one} + {two} = {one + two}"}


def programs(n: int, seed: int, split: str) -> list[Row]:
    """Distinct programs of two or three commands on a word of letters; the answer is the trace.

    Args:
        n: How many.
        seed: Of the programs.
        split: "train" or "test"; they share none.
    """
    rng, seen, found = random.Random(f"{split} {seed}"), set[str](), list[Row]()
    while len(found) < n:
        letters = [rng.choice(_LETTERS) for _ in range(rng.randrange(3, 5))]
        commands = [rng.choice(sorted(_COMMANDS)) for _ in range(rng.randrange(2, 4))]
        question = f"Run {', '.join(commands)} on {' '.join(letters)}."
        if question in seen or (sum(map(ord, letters)) % 4 == 0) != (split == "test"):
            continue
        seen.add(question)
        trace = []
        for command in commands:
            letters = _COMMANDS[command](letters)
            trace.append(f"{command}: {' '.join(letters)}")
        found.append({"question": question, "answer": "; ".join(trace)})
    return found


_COMMANDS = {
    "turn": lambda letters: letters[1:] + letters[:1],
    "twin": lambda letters: [*letters, letters[-1]],
    "drop": lambda letters: letters[1:],
    "swap": lambda letters: [letters[-1], *letters[1:-1], letters[0]] if len(letters) > 1 else letters,
}


def tasks(seed: int = 0) -> dict[str, list[Row]]:
    """The two skills to be learnt: name of a file -> its records."""
    return {
        "problems/train": list(word_problems(2400, seed, "train")),
        "problems/test": list(word_problems(240, seed, "test")),
        "programs/train": programs(2400, seed, "train"),
        "programs/test": programs(240, seed, "test"),
    }


def _words(rng: random.Random) -> Iterator[str]:
    """Invented names of two or three syllables, none twice."""
    seen = set[str]()
    while True:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))]
        word = "".join(syllables).capitalize()
        if word not in seen:
            seen.add(word)
            yield word


def _taken(words: Iterator[str], n: int) -> tuple[str, ...]:
    return tuple(next(words) for _ in range(n))
