"""Texts that belong to classes: the fields that hold them, the names and numbers of the classes, and their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from corda.errors import DataError

# Names of the fields with a text or a pair of texts, as the usual benchmarks have them, in the order looked for.
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("sentence",),
    ("text",),
)

# The field with a tag for each of `tokens`.
TAGS = ("ner_tags", "tags", "labels", "pos_tags")

_NUMBER = re.compile(r"-\d+|-?\d+\.\d*")


def described() -> str:
    """The fields with texts in words."""
    return ", ".join(" + ".join(fields) for fields in TEXTS)


def class_name(value: Any) -> str:
    """The name of a class as data has it: a text, or a number from 0 on.

    Raises:
        ValueError: a label that no class can have.
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"label is {value!r}: a number between classes is a regression, which recipes do not train")
    if isinstance(value, int | float):
        if value < 0:
            raise ValueError(f"label is {value!r}: records without a label cannot be used")
        return str(int(value))
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):  # a cell of a table
        return class_name(float(value))
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError(f"label is {value!r}, expected the one class of the text, by name or number")


def found_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the classes by number, for names or numbers that data holds.

    Numbers keep their meaning; then the names are LABEL_0, LABEL_1, ..., as transformers has them. Names are sorted.
    """
    seen = set(names)
    if all(name.isdecimal() for name in seen):
        return tuple(f"LABEL_{i}" for i in range(max(map(int, seen), default=-1) + 1))
    return tuple(sorted(seen))


def class_number(name: str, classes: Sequence[str], where: str) -> int:
    """The number of a class.

    Args:
        name: As `class_name` gives it.
        classes: Names by number.
        where: Named in messages.

    Raises:
        DataError: there is no such class.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise DataError(
        "a label is none of the classes",
        where=where,
        got=name,
        expected=", ".join(classes) + f", or a number below {len(classes)}",
        fix="correct the label, or name all classes in model.id2label",
    )


def tokenised(
    first: str, second: str, tokenizer: Any, max_length: int | None, *, kinds: bool
) -> tuple[tuple[int, ...], Mapping[str, tuple[int, ...]]]:
    """Token ids of a text or a pair with the tokenizer's special tokens, and which of the two each token is of.

    Args:
        first: The text.
        second: The other one of a pair; empty for a single text.
        tokenizer: The model's.
        max_length: In tokens; the longer text of a pair is cut first.
        kinds: Whether the model tells the two apart by `token_type_ids`.

    Returns:
        Ids, length L, and `token_type_ids` of the same length where asked for.
    """
    made = tokenizer(
        first, second or None, truncation=max_length is not None, max_length=max_length, return_token_type_ids=kinds
    )
    return tuple(made["input_ids"]), {"token_type_ids": tuple(made["token_type_ids"])} if kinds else {}


def words_tokenised(
    words: Sequence[str], tokenizer: Any, max_length: int | None
) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Token ids of words with the tokenizer's special tokens, and the number of the word that each token is of.

    Args:
        words: Of one record.
        tokenizer: The model's; one of the fast ones.
        max_length: In tokens; the rest is cut.

    Raises:
        DataError: the tokenizer does not say which word a token is of.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer does not say which word a token is of",
            where=type(tokenizer).__name__,
            expected="a fast tokenizer, with a tokenizer.json",
        )
    made = tokenizer(list(words), is_split_into_words=True, truncation=max_length is not None, max_length=max_length)
    return tuple(made["input_ids"]), tuple(made.word_ids())
