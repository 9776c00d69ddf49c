"""From records to text: plain, or by the tokenizer's chat template, with solved examples in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from corda.data import pictures
from corda.data.formats import Record
from corda.errors import DataError
from corda.processing import framed_mark, takes_images, tokenizer_of

Template = Literal["plain", "chat"]


@dataclass(frozen=True)
class Segment:
    """A piece of a record's text; `response` marks what the model has to produce."""

    text: str
    response: bool


def render(
    record: Record,
    tokenizer: Any,
    template: Template,
    shots: Sequence[Record] = (),
    *,
    end: bool = True,
) -> list[Segment]:
    """Segments of one record, solved examples before it as asked.

    Args:
        record: What to render.
        tokenizer: Or processor, for the chat template and the end-of-sequence token.
        template: "plain", or "chat" for the tokenizer's chat template (conversations always use it).
        shots: Solved examples put in front, none of which counts as a response.
        end: Whether the response includes the mark that ends it. Training needs it; an answer's loss does not count
            it, because a base model that was shown examples expects the next example there.

    Raises:
        DataError: the chat template is missing or does not render turn by turn, or images for a model that takes none.
    """
    visual, marked = takes_images(tokenizer), bool(record.images) or any(shot.images for shot in shots)
    if marked and not visual:
        raise DataError(
            "the records have images, and the model takes none",
            where=type(tokenizer).__name__,
            fix="use a vision-language model, or drop the column with the images",
        )
    if record.is_text:
        return [Segment(record.response, True)]
    mark = (tokenizer_of(tokenizer).eos_token or "") if end else ""
    if template == "plain" and not record.always_chat:
        context = "".join(f"{shot.prompt}{shot.response}\n\n" for shot in shots)
        prompt = context + record.prompt
        prompt = prompt.replace(pictures.MARK, framed_mark(tokenizer)) if marked else prompt
        return [Segment(prompt, False), Segment(record.response + mark, True)]
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where="data.template",
            fix="use template: plain, or a tokenizer that has one",
        )
    turns = [turn for shot in shots for turn in shot.turns] + list(record.turns)
    messages = [{"role": role, "content": content} for role, content in turns]
    first_learnt = len(messages) - len(record.turns)
    segments: list[Segment] = []
    done = ""
    # Processors' templates go through a list of parts; a string they would take apart letter by letter.
    shown: list[dict[str, Any]] = [
        m | {"content": pictures.parts(m["content"], marked)} if visual else dict(m) for m in messages
    ]
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_learnt:
            continue
        before = str(tokenizer.apply_chat_template(shown[:index], tokenize=False, add_generation_prompt=True))
        after = str(tokenizer.apply_chat_template(shown[: index + 1], tokenize=False))
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                "the chat template changes earlier turns when a later one is added",
                where="tokenizer.chat_template",
                fix="keep one answer per conversation, or use a template that only appends",
            )
        said = after[len(before) :]
        if not end and message["content"] in said:
            said = said[: said.index(message["content"]) + len(message["content"])]
        segments += [Segment(before[len(done) :], False), Segment(said, True)]
        done = after
    return segments
