"""From a raw record of any common format to text segments that say which of them are answers."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from corda.data import labelled, pictures
from corda.errors import DataError

# What models that continue text learn from, in the order in which fields are looked for.
TEXTS = ("messages", "sharegpt", "choice", "code", "prompt_completion", "qa", "alpaca", "text")
_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "choice": ("context", "choices", "label"),
    "code": ("prompt", "test", "entry_point"),
    "prompt_completion": ("prompt", "completion"),
    "qa": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "classification": ("label",),  # beside one of the sets of fields in `labelled`
    "tagged": ("tokens",),  # beside one of the fields with tags
}
_MAY_BE_NONE = {"answer", "output", "completion", "text"}  # such records are left out
_LOG = logging.getLogger(__name__)
_ALSO = {"classification": ("text",), "tagged": ("ner_tags",)}
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
# Words, with their vowel signs and accents; emoji; an operator with a number or a single letter behind it; the point
# inside a number.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x10000)) if unicodedata.category(mark)[0] == "M")
_SAID = re.compile(rf"[\w{_MARKS}]+|[\U0001f000-\U0001faff]|[-+−*/=<>^%](?=\s*(?:\d|[^\W\d_]\b))|(?<=\d)\.(?=\d)")
_ALPACA = "Below is an instruction that describes a task. Write a response that completes the request.\n\n"


@dataclass(frozen=True)
class Record:
    """A record in one form, whatever file format it came in.

    Attributes:
        prompt: Plain text up to the answer; empty for running text.
        response: The answer or the text itself; starts with the white space that separates it.
        words: Of tagged words, each of them.
        second: Of a pair of texts that belongs to a class, the second one.
        turns: (role, content) pairs for the chat template; the last one is the assistant's.
        answers: Accepted short answers, the first the canonical one; of a classified text the name of its class, of
            tagged words the name of the tag of each.
        is_text: Running text, all of which counts.
        choices: For multiple choice, the options; `label` is the right one's index.
        images: Paths, bytes or PIL images, in the order of their marks in prompt and turns.
        program: For code, what is run behind the prompt and the answer to check it.
    """

    prompt: str
    response: str
    turns: tuple[tuple[str, str], ...] = ()
    answers: tuple[str, ...] = ()
    is_text: bool = False
    choices: tuple[str, ...] = ()
    label: int = -1
    always_chat: bool = field(default=False)
    images: tuple[Any, ...] = ()
    program: str = ""
    second: str = ""
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Prompt (or text, or pair of texts) in lower case without punctuation and spacing, and what the images are:
        equal keys are the same record. Operators before numbers and single letters are no punctuation.
        """
        text = " ".join(_SAID.findall(f"{self.prompt or self.response} {self.second}".lower()))
        return " ".join([text, *(pictures.digest(image) for image in self.images)])


def to_records(
    raw: Sequence[Mapping[str, Any]],
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    where: str = "data",
    folder: Path | None = None,
    known: Sequence[str] = TEXTS,
) -> list[Record]:
    """Convert raw records.

    Args:
        raw: Dicts with equal fields.
        format: One of the recipe's record formats; "auto" decides on the fields of the first record.
        known: The formats that are of use, in the order in which "auto" tries them.
        columns: From a format's field to the name that the data uses.
        where: Named in messages.
        folder: Where relative paths of images start.

    Raises:
        DataError: the format is of no use here, the fields fit none, or a record has an empty or wrongly typed field.
    """
    columns = dict(columns or {})
    if format != "auto" and format not in known:
        raise DataError("the format is of no use here", where=where, got=format, expected=", ".join(known))
    mapped = [_renamed(record, columns, where, number) for number, record in enumerate(raw, start=1)]
    if not mapped:
        raise DataError("there are no records", where=where, expected="at least one")
    if format == "auto":
        format = _detect(mapped[0], columns, where, known)
    records: list[Record] = []
    unanswered: list[tuple[int, str]] = []
    for number, record in enumerate(mapped, start=1):
        missing = [n for n in _FIELDS[format] if record.get(n) is None and not (n in _MAY_BE_NONE and n in record)]
        if missing:
            wanted = f"format {format}: {', '.join(missing)}"
            raise _no_format(raw[number - 1], f"{where}, record {number}", wanted, known)
        try:
            one, images = _CONVERTERS[format](record), pictures.given(record, folder)
            changed = pictures.placed(one.prompt, one.response, one.turns, one.is_text, images) if images else {}
            records.append(replace(one, **changed))
        except _BlankError:
            continue
        except _NoAnswerError as error:
            unanswered.append((number, str(error)))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                f"a record does not fit the format {format}",
                where=f"{where}, record {number}",
                got=f"no field {error}" if isinstance(error, KeyError) else str(error),
                fix="correct the record or leave it out; `format:` beside `dataset:` names another format",
            ) from None
    if unanswered:
        _without(unanswered, len(mapped), where)
    if not records:
        raise DataError("all texts are blank", where=where, fix="check that the right column is mapped")
    return records


def _without(unanswered: Sequence[tuple[int, str]], total: int, where: str) -> None:
    """Say that records without an answer are left out; refuse where no others are left."""
    first, problem = unanswered[0]
    if len(unanswered) == total:
        raise DataError(
            "no record has an answer",
            where=f"{where}, record {first}",
            got=problem,
            fix="check that the right column is mapped",
        )
    _LOG.warning(
        "%s: %s of %s records have no answer and are left out; the first is record %s: %s",
        where,
        f"{len(unanswered):,}",
        f"{total:,}",
        first,
        problem,
    )


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str, number: int) -> dict[str, Any]:
    lost = [column for column in columns.values() if column not in record]
    if lost:
        raise DataError(
            f"a mapped column is not in the data: {', '.join(lost)}",
            where=f"{where}, record {number}",
            got=f"fields {', '.join(record)}",
            fix="correct `columns`",
        )
    taken = {column: name for name, column in columns.items()}
    return {taken.get(key, key): value for key, value in record.items() if key in taken or key not in columns}


def _detect(record: Mapping[str, Any], columns: Mapping[str, str], where: str, known: Sequence[str]) -> str:
    # What the user maps counts for more than a format that the data would fit besides.
    mapped = [name for name in known if set(columns) & {*_FIELDS[name], *_ALSO.get(name, ())}]
    for name in mapped or known:
        if name == "qa" and record.get("choices") is not None:
            continue  # its answer is the number or letter of a choice
        if all(record.get(f) is not None or (f in _MAY_BE_NONE and f in record) for f in _FIELDS[name]):
            return name
    inverse = {name: column for name, column in columns.items()}
    raise _no_format({inverse.get(k, k): v for k, v in record.items()}, where, "one of the known formats", known)


def _no_format(record: Mapping[str, Any], where: str, wanted: str, known: Sequence[str]) -> DataError:
    formats = "; ".join(f"{name} ({', '.join((*_ALSO.get(name, ()), *_FIELDS[name]))})" for name in known)
    first, *others = (*_ALSO.get(known[0], ()), *_FIELDS[known[0]]) if len(known) == 1 else _FIELDS["qa"]
    columns = {first: "your_column", others[-1]: "your_other_column"}
    if "choices" in record and "choice" in known:
        asked = "question" if "question" in record else "your_column"
        columns = {"context": asked, "label": next((n for n in ("answerKey", "answer") if n in record), "your_column")}
    mapped = ", ".join(f"{name}: {column}" for name, column in columns.items())
    return DataError(
        "the records fit no format",
        where=where,
        got=f"fields {', '.join(record)}",
        expected=f"{wanted}; known are {formats}",
        fix=f"map the fields: `columns: {{{mapped}}}` beside `dataset:` in the recipe, or on the command line "
        + " ".join(f"--set data.learn.columns.{name}={column}" for name, column in columns.items()),
    )


class _BlankError(ValueError):
    """A line of running text without any, as there is between paragraphs."""


class _NoAnswerError(ValueError):
    """A record that asks and has no answer, as some have in many data sets."""


def _answer(value: Any, name: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _NoAnswerError(f"{name} is {value!r}")
    return _text(value, name)


def _text(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)  # a column of integers with a gap is of floats
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}, expected text")
    return value


def _qa(record: Mapping[str, Any]) -> Record:
    question = _text(record["question"], "question").strip()
    given = record["answer"]
    if isinstance(given, Mapping):  # SQuAD and TriviaQA: {"text": [...]} or {"value": ..., "aliases": [...]}
        given = given["text"] if "text" in given else [given["value"], *given.get("aliases", [])]
    if isinstance(given, list | tuple):  # accepted answers, of which some sets have blank ones
        given = [one for one in given if one is not None and str(one).strip()]
        if not given:
            raise _NoAnswerError("answer is an empty list")
    answers = tuple(_answer(one, "answer").strip() for one in (given if isinstance(given, list) else [given]))
    passage = record.get("context")  # SQuAD's
    read = f"{passage.strip()}\n\n" if isinstance(passage, str) and passage.strip() else ""
    turns = (("user", f"{read}{question}"), ("assistant", answers[0]))
    return Record(f"{read}Question: {question}\nAnswer:", f" {answers[0]}", turns, answers)


def _alpaca(record: Mapping[str, Any]) -> Record:
    instruction = _text(record["instruction"], "instruction").strip()
    given = str(record.get("input") or "").strip()
    output = _answer(record["output"], "output").strip()
    prompt = f"{_ALPACA}### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{given}\n\n### Response:" if given else "### Response:"
    user = f"{instruction}\n\n{given}" if given else instruction
    return Record(prompt, f"\n{output}", (("user", user), ("assistant", output)), (output,))


def _prompt_completion(record: Mapping[str, Any]) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list):
        if not completion:
            raise _NoAnswerError(f"completion is {completion!r}")
        return _messages({"messages": [*prompt, *completion]})
    prompt, completion = _text(prompt, "prompt"), _answer(completion, "completion")
    turns = (("user", prompt.strip()), ("assistant", completion.strip()))
    return Record(prompt, completion, turns, (completion.strip(),))


def _messages(record: Mapping[str, Any]) -> Record:
    turns = [(_text(m["role"], "role"), pictures.flat(m["content"])) for m in record["messages"]]
    return _conversation([(role, said) for role, said in turns if said or role != "system"])


def _sharegpt(record: Mapping[str, Any]) -> Record:
    foreign = [m["from"] for m in record["conversations"] if m["from"] not in _ROLES]
    if foreign:
        raise ValueError(f"a turn is from {foreign[0]!r}, expected one of {', '.join(_ROLES)}")
    turns = [(_ROLES[m["from"]], m["value"]) for m in record["conversations"]]
    return _conversation([(role, said) for role, said in turns if said or role != "system"])


def _conversation(given: Sequence[tuple[str, Any]]) -> Record:
    while given and given[-1][0] != "assistant":
        given = given[:-1]
    if not given:
        raise _NoAnswerError("the conversation has no assistant turn")
    *earlier, (last, said) = given
    turns = tuple((role, _text(text, f"what {role} says")) for role, text in earlier)
    turns = (*turns, (last, _answer(said, f"what {last} says")))
    prompt = "\n".join(content for _, content in turns[:-1])
    return Record(prompt, turns[-1][1], turns, (turns[-1][1].strip(),), always_chat=True)


def _running_text(record: Mapping[str, Any]) -> Record:
    if record["text"] is None or (isinstance(record["text"], str) and not record["text"].strip()):
        raise _BlankError
    return Record("", _text(record["text"], "text"), is_text=True)


def _choice(record: Mapping[str, Any]) -> Record:
    given, names = record["choices"], None
    if isinstance(given, Mapping):  # ARC and OpenBookQA: {"text": [...], "label": ["A", ...]}
        given, names = given["text"], [str(name) for name in given["label"]]
    choices = tuple(_text(c, "choice") for c in given)
    label = str(record["label"]).strip().removesuffix(".0")
    context = _text(record["context"], "context")
    if names is None and not label.isdecimal():
        names = [chr(ord("A") + index) for index in range(len(choices))]
    known = names or [str(index) for index in range(len(choices))]
    at = known.index(label) if label in known else int(label) if names is None and label.isdecimal() else len(choices)
    if at >= len(choices):
        raise ValueError(f"label is {record['label']!r}, expected one of {', '.join(known)}")
    return Record(context, f" {choices[at]}", choices=choices, label=at, answers=(choices[at],))


def _classification(record: Mapping[str, Any]) -> Record:
    for fields in labelled.TEXTS:
        if all(record.get(name) is not None for name in fields):
            first, second = (*(_text(record[name], name) for name in fields), "")[:2]
            return Record(first, "", second=second, answers=(labelled.class_name(record["label"]),))
    raise ValueError(f"no text beside the label: expected {labelled.described()}")


def _tagged(record: Mapping[str, Any]) -> Record:
    words = tuple(str(word) for word in record["tokens"])
    given = next((record[name] for name in labelled.TAGS if record.get(name) is not None), None)
    if given is None:
        raise ValueError(f"no tags beside the tokens: expected {', '.join(labelled.TAGS)}")
    tags = tuple(labelled.class_name(tag) for tag in given)
    if len(tags) != len(words) or not words:
        raise ValueError(f"{len(tags)} tags for {len(words)} tokens")
    return Record(" ".join(words), "", words=words, answers=tags)


def _code(record: Mapping[str, Any]) -> Record:
    prompt, test, name = (_text(record[key], key) for key in ("prompt", "test", "entry_point"))
    if not name.isidentifier():
        raise ValueError(f"entry_point is {name!r}, expected the name of a function")
    solution = str(record.get("canonical_solution") or "")
    turns = (("user", prompt), ("assistant", solution))
    return Record(prompt, solution, turns, (solution,), program=f"\n{test}\ncheck({name})\n")


_CONVERTERS = {
    "qa": _qa,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "text": _running_text,
    "choice": _choice,
    "code": _code,
    "classification": _classification,
    "tagged": _tagged,
}
