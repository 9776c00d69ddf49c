"""Read records from local files or the Hub, with errors that name file and line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from corda import artifact
from corda.data import pictures
from corda.errors import DataError
from corda.tasks import DataSource

HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "heldout", "eval")  # what files of held-out records are called
_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_LONGEST_CELL = 2**31 - 1  # characters


def local_file(source: DataSource, data_dir: Path | None) -> Path | None:
    """The local file that a source means, or None for a Hub id.

    Args:
        source: The data set.
        data_dir: Folder that relative files are looked up in first.

    Raises:
        DataError: it looks like a file but does not exist, or is a folder.
    """
    path = Path(source.dataset).expanduser()
    candidates = [path] if path.is_absolute() or data_dir is None else [data_dir / path, path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        if candidate.is_dir():
            inside = sorted(p.name for p in candidate.iterdir() if p.suffix in _FILES)
            raise DataError(
                "the data set is a folder",
                where=str(candidate),
                got=", ".join(inside[:5]) or "no data file in it",
                expected=f"a file: {', '.join(_FILES)}",
                fix="name one of its files, or write the data set there as one: Dataset.to_parquet",
            )
    if path.suffix in {*_FILES, ".txt"} or path.is_absolute() or source.dataset.startswith("."):
        raise DataError(
            "the data file does not exist",
            where=", ".join(str(c) for c in candidates),
            fix="check the name, or set data.data_dir to the folder that holds it",
        )
    return None


def read_records(source: DataSource, data_dir: Path | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """All records of a source as dicts; with `max_records` a sample drawn with `seed`, in the order drawn.

    A `part` is taken first, of an order that depends on no seed.

    Args:
        source: The data set.
        data_dir: Folder that relative files are looked up in first.
        seed: Of the sample that max_records draws.

    Raises:
        DataError: missing, empty or malformed (with the line), or the Hub cannot be reached.
    """
    path = local_file(source, data_dir)
    records = _from_hub(source) if path is None else _from_file(path)
    if not records:
        raise DataError("the data set is empty", where=source.dataset, expected="at least one record")
    if source.part is not None:
        order = random.Random(0).sample(records, len(records))
        if source.part[1] > len(records):
            raise DataError(
                "the part goes beyond the data",
                where=source.dataset,
                got=f"part {list(source.part)}",
                expected=f"at most {len(records)} records",
            )
        records = order[slice(*source.part)]
    if source.max_records is not None and source.max_records < len(records):
        records = random.Random(seed).sample(records, source.max_records)
    return records


def identity(source: DataSource, data_dir: Path | None, seed: int) -> dict[str, Any]:
    """What a source's records depend on: its settings and, for a local file, its bytes and those of its images.

    Args:
        source: The data set.
        data_dir: Folder that relative files are looked up in first.
        seed: Of the sample that max_records draws.
    """
    path = local_file(source, data_dir)
    drawn = {"seed": seed} if source.max_records is not None else {}
    if path is None:
        return source.model_dump(mode="json") | drawn
    # The content counts, not where it lies.
    settings = source.model_dump(mode="json", include={"format", "columns", "max_records", "part"})
    facts = settings | drawn | {"sha256": artifact.file_hash(path)}
    files = pictures.files(read_records(source, data_dir, seed), source.columns, path.parent)
    return facts | (
        {"images": artifact.fingerprint({name: artifact.file_hash(p) for name, p in files.items()})} if files else {}
    )


def _from_file(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                return _read_jsonl(path)  # as Dataset.to_json writes it
            raise DataError("the data file is not JSON", where=str(path), got=str(error)) from None
        if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
            raise DataError("the data file is not a list of objects", where=str(path), got=type(value).__name__)
        return value
    if path.suffix not in _FILES:
        raise DataError("unknown kind of data file", where=str(path), expected=", ".join(sorted(_FILES)))
    if path.suffix == ".csv":
        return _read_csv(path)
    import datasets

    try:
        table = datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets raises whatever its readers raise
        raise DataError("the data file cannot be read", where=str(path), got=str(error).splitlines()[0]) from None
    return [dict(record) for record in pictures.undecoded(table)]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Cells as text, empty ones as None: 007 and 1.10 are no numbers, and a column with a gap not one of floats."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError("the data file cannot be read", where=str(path), got=str(error)) from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(
                "a row has more cells than the first line names columns",
                where=f"{path}, row {number}",
                got=f"{len(row) - 1 + len(row[None])} cells",
                fix="put cells with commas or line breaks in double quotes",
            )
    return [{name: cell or None for name, cell in row.items()} for row in rows]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
    with path.open(encoding="utf-8-sig") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        "a line is not JSON", where=f"{path}, line {number}", got=f"{line.strip()[:60]!r}: {error.msg}"
                    ) from None
                if not isinstance(record, dict):
                    raise DataError(
                        "a line is not an object", where=f"{path}, line {number}", got=type(record).__name__
                    )
                records.append(record)
        except UnicodeDecodeError as error:
            raise DataError("the data file is not UTF-8", where=str(path), got=str(error)) from None
    return records


def _from_hub(source: DataSource) -> list[dict[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(source.dataset, source.name, split=source.split)
    except Exception as error:  # network, permissions, names: the library has many exception types here
        raise DataError(
            "the data set cannot be loaded from the Hub",
            where=source.dataset,
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="check the id, split and network, or give a local file",
        ) from None
    return [dict(record) for record in pictures.undecoded(table)]
