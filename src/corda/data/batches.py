"""From records to token ids with masks: the same encoding for calibration, training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corda.data import images
from corda.data.formats import TEXTS, Record, to_records
from corda.data.rendering import Segment, Template, render
from corda.data.sources import local_file, read_records
from corda.errors import DataError
from corda.processing import takes_images, tokenizer_of
from corda.tasks import DataSource

_BLANK = "▁"  # how SentencePiece writes it
IGNORED = -100  # the label that torch's and transformers' losses leave out


@dataclass(frozen=True)
class Encoded:
    """One record as tokens.

    Attributes:
        ids: Token ids, length L.
        response: Which of them the model has to produce, length L.
        starts: Where each packed record begins; (0,) for a single record.
        kinds: More numbers per token that a model takes, length L each.
        visual: For a model of images and text, where the pixels come from.
        labels: Of a text that belongs to a class, the class's number; of tagged words a number per token, length L,
            -100 where there is none.
    """

    ids: tuple[int, ...]
    response: tuple[bool, ...]
    starts: tuple[int, ...] = (0,)
    kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    visual: images.Visual | None = None
    labels: tuple[int, ...] = ()

    @property
    def learnable(self) -> bool:
        """Whether there is anything in it that a model has to produce."""
        return bool(self.labels) or any(self.response)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 on real tokens.
        position_ids: (B, L) int64, counted from 0 in each record and again in the pads behind.
        counts: (B, L) bool, the tokens whose activations count.
        packed: Some row holds several records.
        more: What else the model takes: numbers per token, and for a model of images and text pixels; None for
            nothing.
        visual: The model is one of images and text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    counts: Tensor
    packed: bool
    more: Mapping[str, Tensor] | None = None
    visual: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.counts.to(device),
            self.packed,
            None if self.more is None else {name: value.to(device) for name, value in self.more.items()},
            self.visual,
        )


def load_records(source: DataSource, data_dir: Path | None, seed: int, known: Sequence[str] = TEXTS) -> list[Record]:
    """Read and convert a recipe's data source.

    Args:
        source: The data set.
        data_dir: Folder that relative files are looked up in.
        seed: Of the sample that max_records draws.
        known: The record formats that are of use, see `to_records`.

    Raises:
        DataError: see `read_records` and `to_records`.
    """
    raw, file = read_records(source, data_dir, seed), local_file(source, data_dir)
    return to_records(raw, source.format, source.columns, source.dataset, file.parent if file else None, known)


def encode(
    record: Record,
    tokenizer: Any,
    *,
    template: Template = "plain",
    max_length: int | None = None,
    shots: Sequence[Record] = (),
    end: bool = True,
) -> Encoded:
    """Tokenise a record segment by segment, so that prompt and answer never share a token; see `render`.

    With a processor of images and text, a record whose images do not fit into `max_length` has no tokens.

    Args:
        record: What to encode.
        tokenizer: For the ids, the chat template and the end mark.
        template: "plain" or "chat".
        max_length: Longest result, in tokens; the rest is cut off.
        shots: Solved examples put in front.
        end: Whether the mark that ends an answer is added.
    """
    shown = [image for one in (*shots, record) for image in one.images]
    segments = render(record, tokenizer, template, shots, end=end)
    return encode_segments(segments, tokenizer, max_length, shown, bos=not by_chat_template(record, template))


def by_chat_template(record: Record, template: Template) -> bool:
    """Whether the tokenizer's chat template renders a record, which then begins with what the template gives alone."""
    return not record.is_text and (template == "chat" or record.always_chat)


def encode_segments(
    segments: Sequence[Segment],
    tokenizer: Any,
    max_length: int | None = None,
    shown: Sequence[Any] = (),
    *,
    bos: bool = True,
) -> Encoded:
    """Token ids of segments, cut at the end to `max_length`; with a first token where the tokenizer adds one.

    Args:
        segments: Rendered text.
        tokenizer: Or a processor of images and text.
        max_length: In tokens.
        shown: The images that the text has marks for.
        bos: False for text of a chat template, to which nothing is added.
    """
    if takes_images(tokenizer):
        inner = tokenizer_of(tokenizer)
        if bos and segments and adds_bos(inner) and not segments[0].text.startswith(str(inner.bos_token)):
            segments = [Segment(f"{inner.bos_token}{segments[0].text}", segments[0].response), *segments[1:]]
        visual = images.Visual(tokenizer, tuple(segments), tuple(shown), max_length)
        found = images.tokens(visual)
        return Encoded(found.ids, found.response, kinds=found.kinds, visual=visual)
    ids: list[int] = []
    response: list[bool] = []
    for index, segment in enumerate(segments):
        special = index == 0 and not segment.text.startswith(tokenizer.bos_token or "\0")
        pieces = _pieces(segment.text, tokenizer, behind=bool(ids))
        if bos and special and adds_bos(tokenizer):
            ids.append(int(tokenizer.bos_token_id))
            response.append(False)
        ids += pieces
        response += [segment.response] * len(pieces)
    return Encoded(tuple(ids[:max_length]), tuple(response[:max_length]))


def _pieces(text: str, tokenizer: Any, *, behind: bool) -> list[int]:
    """Token ids of a segment; behind another one without the blank that SentencePiece puts in front of any text."""
    anchor = _anchor(tokenizer) if behind else None
    if anchor is not None:
        mark, known = anchor
        whole = tokenizer(mark + text, add_special_tokens=False)["input_ids"]
        if whole[: len(known)] == known:
            return list(whole[len(known) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def puts_blanks(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a blank in front of any text, which records in pieces are kept free of."""
    return not takes_images(tokenizer) and _anchor(tokenizer) is not None


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: Any) -> tuple[str, list[int]] | None:
    """A text that can stand in front of any other with its ids, where the tokenizer puts a blank before a text."""

    def tokens(text: str) -> tuple[list[int], list[str]]:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, tokenizer.convert_ids_to_tokens(ids)

    if not tokens("a")[1][:1] or not str(tokens("a")[1][0]).startswith(_BLANK):
        return None
    for mark in ("\n", ",", "."):
        known, both = tokens(mark)[0], tokens(f"{mark}a")
        apart = len(both[0]) > len(known) and both[0][: len(known)] == known
        if tokenizer.unk_token_id not in known and apart and not str(both[1][len(known)]).startswith(_BLANK):
            return mark, known
    return None


def calibration_rounds(
    records: Sequence[Record],
    tokenizer: Any,
    rounds: int = 1,
    *,
    template: Template = "plain",
    max_length: int = 1024,
    samples: int | None = 256,
    tokens: int | None = None,
    pack_to: int | None = None,
    seed: int = 0,
    order: Iterator[int] | None = None,
    encoding: Callable[[Record, int], Encoded] | None = None,
) -> list[list[Encoded]]:
    """Draw disjoint sets of calibration samples: records, or windows packed to `pack_to` tokens, until a limit is met.

    Args:
        records: Where to draw from, without replacement.
        tokenizer: The model's.
        rounds: How many sets.
        template: How records become text.
        max_length: Longest record, in tokens.
        samples: At most so many records (windows with `pack_to`) per round.
        tokens: At most so many tokens per round; the last record is cut to fit.
        pack_to: Window length; attention does not cross records.
        seed: Of the order drawn.
        order: Indices of records to draw, instead of `seed`; what is not drawn stays in it.
        encoding: Makes tokens of a record, so many at most, instead of `encode` with template and max_length.

    Raises:
        DataError: nothing is left after encoding, or not enough records for every round.
    """
    order = order if order is not None else drawing_order(records, seed)
    drawn: list[list[Encoded]] = []
    share = -(-len(records) // rounds) if samples is None and tokens is None else len(records)
    for number in range(rounds):
        chosen: list[Encoded] = []
        used = 0
        for _ in range(share):
            enough = samples is not None and (used >= samples * pack_to if pack_to else len(chosen) >= samples)
            if enough or (tokens is not None and used >= tokens):
                break
            index = next(order, None)
            if index is None:
                break
            room = None if tokens is None else tokens - used
            limit = min(x for x in (max_length, pack_to, room) if x is not None)
            if pack_to and takes_images(tokenizer):
                raise DataError(
                    "records are not packed for a model of images and text",
                    where="context.pack_to",
                    fix="leave pack_to out; context.tokens limits their number",
                )
            if encoding is not None:
                one = encoding(records[index], limit)
            else:
                one = encode(records[index], tokenizer, template=template, max_length=limit)
            if len(one):
                chosen.append(one)
                used += len(one)
            elif chosen and room is not None and room < max_length:
                break  # an image does not fit into what is left
        if not chosen:
            raise DataError(
                "there are not enough calibration records",
                where="context",
                got=f"{len(records)} records, all drawn before round {number + 1} of {rounds}",
                fix="give more records, or lower context.samples or context.rounds",
            )
        drawn.append(pack(chosen, pack_to)[:samples] if pack_to else chosen)
    return drawn


def drawing_order(records: Sequence[Record], seed: int) -> Iterator[int]:
    """Indices of all records in the order that calibration samples are drawn in.

    Args:
        records: Calibration records.
        seed: Of the order.
    """
    return iter(torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist())


def pack(encoded: Sequence[Encoded], length: int) -> list[Encoded]:
    """Fill windows of at most `length` tokens with whole records, in order.

    Args:
        encoded: Records.
        length: A window's, in tokens.
    """
    windows: list[Encoded] = []
    for one in encoded:
        last = windows[-1] if windows else None
        if last is not None and len(last) + len(one) <= length:
            starts = (*last.starts, len(last))
            windows[-1] = Encoded(last.ids + one.ids, last.response + one.response, starts)
        else:
            windows.append(one)
    return windows


def batches(
    encoded: Sequence[Encoded],
    pad_token_id: int,
    batch_size: int = 8,
    *,
    response_only: bool = False,
    padding_side: str = "right",
) -> Iterator[Batch]:
    """Padded batches of neighbours in length, so that few pads are computed on.

    Args:
        encoded: Records in any order; batches come longest first.
        pad_token_id: Filled in, and masked out of everything.
        batch_size: Rows.
        response_only: Only response tokens count.
        padding_side: "right" or "left"; does not change any result.
    """
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    for start in range(0, len(order), batch_size):
        rows = [encoded[i] for i in order[start : start + batch_size]]
        yield padded(rows, pad_token_id, response_only=response_only, padding_side=padding_side)


def pad_id(tokenizer: Any) -> int:
    """The padding token, or any token where there is none: pads are masked out."""
    tokenizer = tokenizer_of(tokenizer)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def padded(
    rows: Sequence[Encoded], pad_token_id: int, *, response_only: bool = False, padding_side: str = "right"
) -> Batch:
    """One batch of these records, in their order; see `batches`.

    Args:
        rows: Records as tokens.
        pad_token_id: Filled in, and masked out of everything.
        response_only: Only response tokens count.
        padding_side: "right" or "left".
    """
    width, side = max(map(len, rows)), padding_side
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    kinds = {name: torch.zeros_like(ids) for row in rows for name in row.kinds}
    for r, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[r, place] = torch.tensor(row.ids)
        mask[r, place] = 1
        ends = (*row.starts[1:], len(row))
        if side == "right":
            positions[r, len(row) :] = torch.arange(width - len(row))
        positions[r, place] = torch.cat([torch.arange(b - a) for a, b in zip(row.starts, ends, strict=True)])
        counts[r, place] = torch.tensor(row.response) if response_only else True
        for name, values in row.kinds.items():
            kinds[name][r, place] = torch.tensor(values)
    seen = [row.visual for row in rows if row.visual is not None]
    more = {**kinds, **images.joined([one.pixels() for one in seen])} if seen or kinds else None
    return Batch(ids, mask, positions, counts, any(len(row.starts) > 1 for row in rows), more, bool(seen))


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins any text with its mark for that."""
    if tokenizer.bos_token_id is None:
        return False
    probe = tokenizer("a")["input_ids"]
    return bool(probe) and probe[0] == tokenizer.bos_token_id
