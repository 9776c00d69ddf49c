"""From records to text: plain, or by the tokenizer's chat template, with solved examples in front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from corda.data import pictures
from corda.data.formats import Record
from corda.errors import DataError
from corda.processing import framed_mark, takes_images, tokenizer_of

Template = Literal["plain", "chat"]

# In front of templates that print today's date: scores before and after are then of the same text on any day.
_A_DAY = (
    "{%- macro strftime_now(format) -%}{% if format == '%Y-%m-%d' %}2024-07-26{% else %}26 Jul 2024{% endif %}"
    "{%- endmacro -%}"
)


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
        own = "give questions and answers or prompts and completions, which need none" if record.always_chat else None
        raise DataError(
            "the tokenizer has no chat template",
            where="a conversation, which is rendered by one" if own else "data.template",
            got=f"one that begins {record.turns[0][1][:60]!r}" if own else "chat",
            fix=f"use {'a tokenizer that has one' if own else 'template: plain'}, or "
            f"{own or 'a tokenizer that has one'}",
        )
    turns = [turn for shot in shots for turn in shot.turns] + list(record.turns)
    first = len(turns) - len(record.turns)
    # What an assistant says before anybody has asked is context, as in many ShareGPT conversations.
    if "assistant" not in {role for role, _ in turns[max(first, 1) :]}:
        return []
    chat = _Chat(tokenizer, turns, visual=visual, marked=marked)
    segments = _turn_by_turn(chat, first, end=end) or _as_a_whole(chat, first, end=end)
    if not segments:
        raise DataError(
            "the chat template changes earlier turns when a later one is added",
            where="tokenizer.chat_template",
            got=f"a conversation that begins {turns[0][1][:60]!r}",
            fix="keep one answer per conversation, or use a template that only appends",
        )
    return segments


class _Chat:
    """A conversation under a tokenizer's template."""

    def __init__(self, tokenizer: Any, turns: Sequence[tuple[str, str]], *, visual: bool, marked: bool) -> None:
        self.tokenizer, self.turns, self.visual, self.marked = tokenizer, turns, visual, marked

    def text(self, count: int, contents: Mapping[int, str] | None = None, *, asked: bool = False) -> str:
        """The first turns as text, some with other contents; with `asked` up to where an answer begins."""
        contents = contents or {}
        messages: list[dict[str, Any]] = []
        for index, (role, content) in enumerate(self.turns[:count]):
            said = contents.get(index, content)
            # Processors' templates go through a list of parts; a string they would take apart letter by letter.
            messages.append({"role": role, "content": pictures.parts(said, self.marked) if self.visual else said})
        own = {}
        if not self.visual and "strftime_now" in (template := str(self.tokenizer.get_chat_template())):
            own["chat_template"] = _A_DAY + template
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked, **own))
        except (TemplateError, ValueError) as error:
            roles = ", ".join(role for role, _ in self.turns[:count])
            raise DataError(
                "the chat template refuses a conversation",
                where=f"turns: {roles}; the first begins {self.turns[0][1][:60]!r}",
                got=str(error),
                fix="change the roles or their order to what the model's template knows",
            ) from None

    def common(self, one: str, two: str) -> str:
        """What two texts of the template both begin with, no token of the tokenizer's own cut in half."""
        differ = (index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        cut = next(differ, min(len(one), len(two)))
        for token in tokenizer_of(self.tokenizer).get_added_vocab():
            start = one.rfind(token, 0, cut + len(token) - 1)
            if 0 <= start < cut < start + len(token):
                cut = start
        return one[:cut]


def _turn_by_turn(chat: _Chat, first: int, *, end: bool) -> list[Segment]:
    """Segments of the answers from a turn on, where the template only appends; none where it does not."""
    segments: list[Segment] = []
    done = ""
    for index, (role, content) in enumerate(chat.turns):
        if role != "assistant" or index < max(first, 1):
            continue
        before, after = chat.text(index, asked=True), chat.text(index + 1)
        if not before.startswith(done) or not after.startswith(before):
            return []
        said = after[len(before) :]
        if not said.lstrip().startswith(content.strip()):
            lead = _lead(chat, index, before)
            before, said = before + lead, said.removeprefix(lead)
        if not end and (found := next((text for text in (content, content.strip()) if text in said), "")):
            said = said[: said.index(found) + len(found)]
        segments += [Segment(before[len(done) :], False), Segment(said, True)]
        done = after
    return segments


def _lead(chat: _Chat, index: int, before: str) -> str:
    """What the template itself puts between the prompt and an answer, e.g. an empty <think></think>.

    A reply that the template is to be asked for begins after it, as in training.
    """
    (mark,) = _marks([index])
    said = chat.text(index + 1, {index: mark}).removeprefix(before)
    lead = said.partition(mark)[0] if mark in said else ""
    return lead if lead.strip() and chat.text(index + 1).startswith(before + lead) else ""


def _as_a_whole(chat: _Chat, first: int, *, end: bool) -> list[Segment]:
    """Segments where the template renders earlier turns in another way once there are later ones; none if in vain.

    The template is shown marks in place of contents. What comes back between the marks is its own, and has to give the
    conversation's text again with the contents in their places.
    """
    last = max(index for index, (role, _) in enumerate(chat.turns) if role == "assistant")
    marks = _marks(range(last + 1))
    text = chat.text(last + 1, dict(enumerate(marks)))
    between: list[str] = []
    for mark in marks:
        lead, found, text = text.partition(mark)
        if not found or mark in text:
            return []
        between.append(lead)
    between.append(text)
    said = [content for _, content in chat.turns[: last + 1]]
    whole = chat.text(last + 1)
    for contents in (said, [content.strip() for content in said]):
        if "".join(lead + content for lead, content in zip(between, [*contents, ""], strict=True)) == whole:
            break
    else:
        return []
    segments: list[Segment] = []
    prompt = ""
    for index, content in enumerate(contents):
        prompt += between[index]
        if chat.turns[index][0] != "assistant" or index < max(first, 1):
            prompt += content
            continue
        closing = chat.common(between[index + 1], between[-1])
        segments += [Segment(prompt, False), Segment(content + (closing if end else ""), True)]
        prompt = ""
        if end:
            between[index + 1] = between[index + 1].removeprefix(closing)
    return segments


def _marks(numbers: Iterable[int]) -> list[str]:
    return [f"<<turn {number} of corda>>" for number in numbers]
