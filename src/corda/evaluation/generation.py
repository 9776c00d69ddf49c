"""Exact match by greedy generation."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from corda.data.batches import Encoded, by_chat_template, encode_segments, pad_id, padded
from corda.data.formats import Record
from corda.data.rendering import Segment, Template, render
from corda.evaluation.scores import Score, mean
from corda.processing import tokenizer_of
from corda.progress import Progress, silent
from corda.sharding import device_of


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt.

    Attributes:
        prompt: The question, without shots.
        expected: Accepted answers.
        generated: The text produced, up to the stop.
        right: Whether it matches.
    """

    prompt: str
    expected: tuple[str, ...]
    generated: str
    right: bool

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    template: Template,
    shots: Sequence[Record] = (),
    stop: Sequence[str] = ("\n",),
    answer_after: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Progress = silent,
) -> tuple[Score, list[Answer]]:
    """Share of records whose greedy generation, normalised, equals an accepted answer.

    Normalised as for TriviaQA and NQ-open: lower case, without punctuation, articles and surplus space.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer or processor.
        records: Questions with accepted answers.
        template: "plain" or "chat".
        shots: Solved examples in front of each question.
        stop: The generation ends before the first of these, leading white space aside.
        answer_after: Compare only what follows the last occurrence of this, in both.
        max_new_tokens: Limit in tokens.
        batch_size: Rows; does not change the result.
        progress: Shows how far it is.
    """
    prompts = [prompt(record, tokenizer, template, shots) for record in records]
    texts = generate(model, tokenizer, prompts, list(stop), max_new_tokens, batch_size, progress)
    answers = [judged(record, text, answer_after) for record, text in zip(records, texts, strict=True)]
    return mean([float(answer.right) for answer in answers]), answers


def judged(record: Record, text: str, after: str | None) -> Answer:
    """A generated text beside the accepted answers, and whether it is one of them once both are normalised.

    Args:
        record: With its accepted answers.
        text: What the model said.
        after: Only what follows the last occurrence of this is compared, in both; None for everything.
    """
    said = _final(text, after)
    right = any(_same(_final(answer, after), said) for answer in record.answers)
    asked = next((text for role, text in reversed(record.turns) if role == "user"), record.prompt)
    return Answer(asked, record.answers, text, right)


def _same(one: str, other: str) -> bool:
    """Equal once normalised; where that leaves nothing, as of the answers "A" and "<", equal as they are."""
    first, second = normalise(one), normalise(other)
    return first == second if first and second else one.strip().lower() == other.strip().lower()


def prompt(record: Record, tokenizer: Any, template: Template, shots: Sequence[Record] = ()) -> Encoded:
    """A record up to its answer, with its images.

    Args:
        record: What to ask.
        tokenizer: Or the processor of a model with images.
        template: "plain" or "chat".
        shots: Solved examples in front.
    """
    text = "".join(segment.text for segment in render(record, tokenizer, template, shots)[:-1])
    shown = [image for one in (*shots, record) for image in one.images]
    chat = by_chat_template(record, template)
    return encode_segments([Segment(text, False)], tokenizer, shown=shown, bos=not chat)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Encoded],
    stop: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = silent,
    strip: bool = True,
) -> list[str]:
    """Greedy continuations of `prompts`, in order, cut before the first stop string.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer or processor; the model's end-of-sequence token ends a row too.
        prompts: Rendered text, special tokens and all; or the same with images, encoded.
        stop: Strings that end a row; they are looked for after leading white space.
        max_new_tokens: Limit in tokens.
        batch_size: Rows per call, neighbours in length, padded on the left.
        progress: Shows how far it is.
        strip: Leave out leading white space; code needs it.
    """
    device = device_of(model)
    given = [encode_segments([Segment(p, False)], tokenizer) if isinstance(p, str) else p for p in prompts]
    order = sorted(range(len(given)), key=lambda i: (-len(given[i]), i))
    pad = pad_id(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        pad_token_id=pad,
        eos_token_id=end_tokens(model, tokenizer),
        stop_strings=[s for s in stop if s.strip()] or None,
    )
    texts = [""] * len(given)
    starts = range(0, len(order), batch_size)
    for start in progress(starts, "generate", len(starts)):
        rows = order[start : start + batch_size]
        batch = padded([given[i] for i in rows], pad, padding_side="left").to(device)
        width = batch.input_ids.shape[1]
        whole: Any = model
        out = whole.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            tokenizer=tokenizer_of(tokenizer),
            **(batch.more or {}),
        )
        for r, i in enumerate(rows):
            said = tokenizer_of(tokenizer).decode(out[r, width:], skip_special_tokens=True)
            texts[i] = cut(said, stop, strip)
    return texts


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    A number keeps its sign, its decimal point and its slash, and loses its separators; .5 is 0.5.
    """
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(?<![\w)])[-−](?=\d)", " minus ", text)
    text = re.sub(rf"(?!(?<=\d)[./](?=\d))[{re.escape(string.punctuation)}]", " ", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: chat models often have one for the turn besides the tokenizer's own.

    Args:
        model: With its generation config.
        tokenizer: With its end mark.
    """
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = known if isinstance(known, list) else [known]
    return sorted({int(token) for token in (*known, tokenizer_of(tokenizer).eos_token_id) if token is not None})


def _final(text: str, after: str | None) -> str:
    return text.rpartition(after)[2] if after else text


def cut(text: str, stop: Sequence[str], strip: bool = True) -> str:
    """The text up to the first of some strings.

    Args:
        text: What the model said.
        stop: The strings; they are looked for after leading white space.
        strip: Leave out leading white space.
    """
    text = text.lstrip() if strip else text
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
