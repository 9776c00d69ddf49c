"""Text with images as a model's inputs: tokens, and the pixels that some of them stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corda.data.pictures import opened
from corda.data.rendering import Segment
from corda.errors import DataError
from corda.processing import image_mark, image_token_id, tokenizer_of


@dataclass(frozen=True)
class Visual:
    """Rendered text with its images, which are opened and computed on only when a batch needs them.

    Attributes:
        processor: The model's own.
        segments: Text with the processor's mark for each image.
        images: As the data gives them, in the order of the marks.
        max_length: Tokens that the record is cut to, or None.
    """

    processor: Any
    segments: tuple[Segment, ...]
    images: tuple[Any, ...]
    max_length: int | None = None

    def parts(self) -> list[tuple[str, bool, tuple[Any, ...]]]:
        """For each segment its text, whether it is a response, and its images."""
        mark, found, used = image_mark(self.processor), [], 0
        for segment in self.segments:
            count = segment.text.count(mark) if self.images else 0
            found.append((segment.text, segment.response, self.images[used : used + count]))
            used += count
        return found

    def pixels(self) -> dict[str, Tensor]:
        """What the model takes besides tokens, each (n, ...) for n images: pixel values, sizes, masks of pixels."""
        return joined([_processed(self.processor, text, images).pixels for text, _, images in self.parts() if images])


@dataclass(frozen=True)
class Tokens:
    """Text with images as tokens.

    Attributes:
        ids: Token ids, length L; an image is as many tokens as the processor makes of it.
        response: Which of them the model has to produce, length L.
        kinds: More numbers per token that the model takes, e.g. mm_token_type_ids, length L each.
    """

    ids: tuple[int, ...]
    response: tuple[bool, ...]
    kinds: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Processed:
    ids: list[int]
    kinds: dict[str, list[int]]
    pixels: dict[str, Tensor]


def tokens(visual: Visual) -> Tokens:
    """Tokenise segment by segment, so that prompt and answer never share a token.

    A record whose images do not fit into `max_length` has no tokens: half an image is none.

    Raises:
        DataError: an image token in text without an image, or images that the processor does not take.
    """
    tokenizer = tokenizer_of(visual.processor)
    special = image_token_id(visual.processor)
    ids: list[int] = []
    response: list[bool] = []
    kinds: dict[str, list[int]] = {}
    for text, produced, images in visual.parts():
        if images:
            found = _processed(visual.processor, text, images)
        else:
            found = _Processed(tokenizer(text, add_special_tokens=False)["input_ids"], {}, {})
            if special in found.ids:
                raise DataError(
                    "an image token without an image",
                    where="a record's text",
                    got=repr(text[:80]),
                    fix="give the record an `image`, or take the mark out of its text",
                )
        for name in found.kinds:
            kinds.setdefault(name, [0] * len(ids))
        ids += found.ids
        response += [produced] * len(found.ids)
        for name, values in kinds.items():
            values.extend(found.kinds.get(name, [0] * len(found.ids)))
    end = visual.max_length
    if end is not None and special in ids[end:]:
        return Tokens((), (), {})
    return Tokens(tuple(ids[:end]), tuple(response[:end]), {name: tuple(v[:end]) for name, v in kinds.items()})


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs one after the other along the first dimension, (n, ...), padded with zeros at the ends of the others."""
    result = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        given = [part[name] for part in parts if name in part]
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in given), strict=True)]
        result[name] = torch.cat([_padded(tensor, shape) for tensor in given])
    return result


def training_rows(visuals: Sequence[Visual]) -> list[dict[str, Any]]:
    """Rows of TRL's vision path: prompt, completion and images, one row per answer of a conversation."""
    rows = []
    for visual in visuals:
        prompt = ""
        shown: list[Any] = []
        for text, produced, images in visual.parts():
            if produced:
                rows.append({"prompt": prompt, "completion": text, "images": list(shown)})
            prompt += text
            shown += [opened(image) for image in images]
    return rows


def _processed(processor: Any, text: str, images: Sequence[Any]) -> _Processed:
    try:
        out = processor(
            text=[text], images=[[opened(image) for image in images]], add_special_tokens=False, return_tensors="pt"
        )
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise DataError(
            "the model's processor does not take a record's images",
            where=type(processor).__name__,
            got=f"{len(images)} images in {text[:80]!r}: {error}",
        ) from None
    shape = out["input_ids"].shape
    more = {k: v for k, v in out.items() if isinstance(v, Tensor) and k not in {"input_ids", "attention_mask"}}
    return _Processed(
        out["input_ids"][0].tolist(),
        {name: value[0].tolist() for name, value in more.items() if value.shape == shape},
        {name: value for name, value in more.items() if value.shape != shape},
    )


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if list(tensor.shape[1:]) == list(shape):
        return tensor
    out = tensor.new_zeros(tensor.shape[0], *shape)
    out[(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
    return out
