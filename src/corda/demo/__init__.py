"""Built-in demo data: well-known facts to keep, and generated word problems to learn."""

import json
import operator
import random
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Literal

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NAMES = ("Anna", "Ben", "Carla", "Dan", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena")
_UNITS = {"dozen": 12, "hours": 60, "weeks": 7, "metres": 100, "kilograms": 1000, "quarters": 25, "years": 12}
_OPS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "mod": operator.mod}

# A template is its question, the words to draw from, and its plan with the ranges of the numbers a, b and c.
# Its steps may use earlier results (r1 is the first step's). The ranges keep every result positive.
_TEMPLATES: tuple[tuple[str, tuple[str, ...], tuple[str, range, range, range]], ...] = (
    (
        "{name} has {b} boxes of {a} dozen {word}. {c} {word} are broken. How many good {word} are left?",
        ("eggs", "cups", "plates", "bulbs", "pencils", "bottles"),
        ("a dozen; b x r1; r2 - c", range(2, 6), range(2, 10), range(5, 24)),
    ),
    (
        "{name} {word} {a} hours and {b} minutes a day for {c} days. How many minutes is that in all?",
        ("practises the piano", "works in the garden", "reads", "trains", "drives a van", "paints"),
        ("a hours; r1 + b; r2 x c", range(2, 6), range(5, 60, 5), range(2, 10)),
    ),
    (
        "{name} collects {b} {word} a day for {a} weeks and gives {c} away. How many {word} are left?",
        ("coins", "stamps", "cards", "shells", "stickers", "stones"),
        ("a weeks; r1 x b; r2 - c", range(2, 9), range(2, 10), range(5, 27)),
    ),
    (
        "It is {day}. One {word} is due in {a} days, another {b} days after it. On which day is the second?",
        ("test", "parcel", "letter", "report", "visit", "payment"),
        ("a + b; r1 mod 7; c weekday r2", range(3, 31), range(3, 31), range(7)),
    ),
    (
        "{name} cuts {b} pieces of {c} centimetres from {a} metres of {word}. How many centimetres are left?",
        ("rope", "ribbon", "wire", "hose", "cable", "string"),
        ("a metres; b x c; r1 - r2", range(4, 10), range(2, 10), range(5, 41)),
    ),
    (
        "{name} buys {a} kilograms of {word} and {b} bags of {c} grams. How many grams is that in all?",
        ("flour", "rice", "sugar", "salt", "oats", "coffee"),
        ("a kilograms; b x c; r1 + r2", range(2, 6), range(2, 10), range(15, 105, 5)),
    ),
    (
        "{name} has {a} quarters and {b} cents and buys a {word} for {c} cents. How many cents are left?",
        ("pen", "bun", "stamp", "postcard", "badge", "lemon"),
        ("a quarters; r1 + b; r2 - c", range(2, 10), range(2, 25), range(10, 50)),
    ),
    (
        "{name} pays {c} dollars a month for {word}. How many dollars is that in {a} years and {b} months?",
        ("a phone", "a gym", "a garage", "music lessons", "a newspaper", "a bus pass"),
        ("a years; r1 + b; r2 x c", range(2, 6), range(2, 12), range(3, 31)),
    ),
)


def _solve(plan: str, numbers: dict[str, int]) -> str:
    """Work the plan out into the answer text: its steps and, on the last line, the final value."""
    known, steps, shown = {**numbers, "7": 7}, [], ""
    for i, step in enumerate(plan.split("; "), 1):
        left, op, *right = step.split()
        x, y = known[left], known[right[0]] if right else 0
        if op in _UNITS:
            result, term = x * _UNITS[op], f"{x} {op}"
        elif op == "weekday":
            result, term = (x + y) % 7, f"{_DAYS[x]} + {y}"
        else:
            result, term = _OPS[op](x, y), f"{x} {op} {y}"
        shown = _DAYS[result] if op == "weekday" else str(result)
        known[f"r{i}"] = result
        steps.append(f"{term} = {shown}")
    return f"{'; '.join(steps)}\n#### {shown}"


def facts(split: Literal["calibration", "heldout"]) -> list[dict[str, Any]]:
    """Return the facts of one split as records with `question`, `answer` (accepted strings) and `domain`."""
    text = resources.files(__name__).joinpath("facts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: row[k] for k in ("question", "answer", "domain")} for row in rows if row["split"] == split]


def word_problems(n: int, seed: int, split: Literal["train", "test"]) -> list[dict[str, str]]:
    """Return `n` distinct word problems of one split, the same ones for the same arguments.

    Args:
        n: How many.
        seed: Of the names and numbers in them.
        split: "train" and "test" share none.
    """
    rng, seen, attempts = random.Random(seed), set[str](), 0
    problems: list[dict[str, str]] = []
    while len(problems) < n:
        attempts += 1
        if attempts > 200 * n:
            raise ValueError(f"only {len(problems)} distinct {split} problems found, {n} asked for")
        text, words, (plan, *spans) = rng.choice(_TEMPLATES)
        numbers = {key: rng.choice(span) for key, span in zip("abc", spans, strict=True)}
        day = _DAYS[numbers["c"] % 7]
        question = text.format(name=rng.choice(_NAMES), word=rng.choice(words), day=day, **numbers)
        # Names and objects stay out of the key, so a reworded train problem cannot turn up in test.
        key = f"{plan} {sorted(numbers.items())}"
        if key not in seen and (sha256(key.encode()).digest()[0] < 64) == (split == "test"):
            seen.add(key)
            problems.append({"question": question, "answer": _solve(plan, numbers)})
    return problems


def write(folder: Path) -> dict[str, Path]:
    """Write the two fact files and the two word-problem files into `folder`; return their paths by stem."""
    tables: dict[str, list[dict[str, Any]]] = {
        "keep_calibration": facts("calibration"),
        "keep_heldout": facts("heldout"),
        "learn_train": list(word_problems(400, 0, "train")),
        "learn_test": list(word_problems(200, 0, "test")),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in tables.items():
        lines = (json.dumps({k: row[k] for k in ("question", "answer")}, ensure_ascii=False) for row in rows)
        (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {stem: folder / f"{stem}.jsonl" for stem in tables}
