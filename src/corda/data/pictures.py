"""The images of a record: which they are, where they stand in its text, and what is in them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda.errors import DataError

# What stands for an image in a record's text, whatever the model's own mark is.
MARK = "<image>"

_COLUMNS = ("images", "image")


def given(raw: Mapping[str, Any], folder: Path | None) -> tuple[Any, ...]:
    """The images of a raw record's `image` or `images` column, paths made absolute.

    Args:
        raw: The record as the data has it.
        folder: Where relative paths start.

    Raises:
        ValueError: a file that does not exist.
        TypeError: something that is no image.
    """
    name = next((name for name in _COLUMNS if raw.get(name) is not None), None)
    if name is None:
        return ()
    value = raw[name]
    images = value if isinstance(value, list | tuple) else [value]
    return tuple(_placed(image, folder) for image in images)


def files(raw: Sequence[Mapping[str, Any]], columns: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """The image files that records name, by the names in the data; those that are not there are left out.

    Args:
        raw: Records as they were read.
        columns: From a format's field to the name that the data uses.
        folder: That the names are looked up in.
    """
    wanted = [columns.get(name, name) for name in _COLUMNS]
    found = {}
    for record in raw:
        for name in wanted:
            value = record.get(name)
            for image in value if isinstance(value, list | tuple) else [value]:
                path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
                if isinstance(path, str) and (folder / path).is_file():
                    found[path] = folder / path
    return found


def placed(
    prompt: str, response: str, turns: tuple[tuple[str, str], ...], is_text: bool, images: tuple[Any, ...]
) -> dict[str, Any]:
    """The fields of a record that its images change.

    Images stand where the text has a mark for each of them, else before the first turn. What follows the last image
    of a running text is what the model has to produce.

    Args:
        prompt: As in `Record`.
        response: As in `Record`.
        turns: As in `Record`.
        is_text: As in `Record`.
        images: At least one.

    Raises:
        ValueError: another number of marks than of images, or a mark in an answer.
    """
    marks = (response if is_text else prompt).count(MARK)
    if marks not in {0, len(images)}:
        raise ValueError(f"{marks} image marks {MARK} in the text, but {len(images)} images")
    lead = "" if marks else f"{MARK}\n" * len(images)
    if is_text:
        before, mark, after = (lead + response).rpartition(MARK)
        if not after.strip():
            raise ValueError("no text behind the last image")
        prompt, response = before + mark, after
        turns = (("user", prompt), ("assistant", after.strip()))
        return {
            "prompt": prompt,
            "response": response,
            "turns": turns,
            "answers": (after.strip(),),
            "is_text": False,
            "images": images,
        }
    if MARK in response:
        raise ValueError(f"an image mark {MARK} in an answer")
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
    marked = tuple((role, lead + text if i == first else text) for i, (role, text) in enumerate(turns))
    return {"prompt": lead + prompt, "turns": marked, "images": images}


def flat(content: Any) -> Any:
    """A turn's content as text with marks, where it comes as a list of text and image parts.

    Raises:
        ValueError: a part that is neither.
    """
    if not isinstance(content, list | tuple):
        return content
    kinds = {part.get("type") for part in content}
    if not kinds <= {"text", "image"}:
        raise ValueError(f"parts of the types {sorted(map(str, kinds))}, expected text and image")
    return "".join(MARK if part["type"] == "image" else str(part["text"]) for part in content)


def parts(content: str, marked: bool) -> list[dict[str, str]]:
    """Inverse of `flat`, as the chat templates of processors want it; white space around marks goes.

    Args:
        content: A turn's text.
        marked: Whether marks in it mean images.
    """
    found: list[dict[str, str]] = []
    pieces = content.split(MARK) if marked else [content]
    for index, piece in enumerate(pieces):
        text = piece.strip() if len(pieces) > 1 else piece
        if text:
            found.append({"type": "text", "text": text})
        if index < len(pieces) - 1:
            found.append({"type": "image"})
    return found


def opened(image: Any) -> Any:
    """The image as PIL has it, in RGB.

    Args:
        image: A path, bytes, a dict with `path` or `bytes` as datasets has it, or a PIL image.

    Raises:
        DataError: it cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(image, Mapping):
            image = image["bytes"]
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str):
            image = Image.open(image)
        return image.convert("RGB")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError("an image cannot be read", where=str(image)[:200], got=str(error)) from None


def digest(image: Any) -> str:
    """sha256 of an image: of the file, the bytes or the pixels."""
    if isinstance(image, Mapping):
        image = image["bytes"]
    if isinstance(image, str):
        image = Path(image).read_bytes()
    content = image if isinstance(image, bytes) else opened(image).tobytes()
    return hashlib.sha256(content).hexdigest()


def undecoded(table: Any) -> Any:
    """A table of datasets whose image columns hold the files' bytes: decoded images would fill the memory."""
    import datasets

    for name, feature in table.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table


def _placed(image: Any, folder: Path | None) -> Any:
    """A path made absolute, and known to be there; anything else as it is."""
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return {"bytes": image["bytes"]}
        image = image.get("path")
    if isinstance(image, bytes) or hasattr(image, "convert"):
        return image
    if not isinstance(image, str | Path):
        raise TypeError(f"an image is {type(image).__name__}, expected a path, bytes or a PIL image")
    path = Path(image) if folder is None else folder / image
    if not path.is_file():
        raise ValueError(f"the image {path} does not exist")
    return str(path)
