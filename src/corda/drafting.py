"""A first recipe for a model and data: sizes and lengths are looked at, every value comes with its reason."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from corda import models
from corda.commenting import commented
from corda.data.batches import encode, load_records
from corda.data.formats import Record
from corda.data.rendering import Template
from corda.data.sources import HELD_OUT_NAMES, local_file
from corda.errors import DataError
from corda.inputs import Inputs
from corda.reading import apply_overrides, parse_recipe
from corda.recipe import Recipe
from corda.tasks import DataSource

_LOOKED_AT = 500  # records whose length is measured
_LONGEST = 1024  # tokens that a draft goes up to by itself
_COMFORTABLE = 8  # calibration tokens per input of the widest layer, see docs/footguns.md
_SHORT_ANSWER = 16  # tokens, up to which an answer can be compared word by word
_BILLION = 10**9
_MANY = 200  # optimiser steps, below which a decay of that product would take away a tenth of B and more at each
# Small and large models: an adapter that starts in the weights' directions, one of them with the papers' balance, and
# one that starts at zero.
_RATES = {"start": (2e-4, 2e-5), "sigma": (1e-4, 2e-5), "zero": (1e-3, 3e-4)}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a data set's records.

    Attributes:
        records: How many there are.
        mean: Mean tokens of a record.
        most: The length that 99 % do not exceed.
        answer: The length that 95 % of the answers do not exceed.
    """

    records: int
    mean: float
    most: int
    answer: int


@dataclass(frozen=True)
class Draft:
    """A recipe as text, with what it was drafted from.

    Attributes:
        text: YAML with a comment on every key.
        facts: What was found out about model and data, as JSON.
        checked: What `corda run --dry-run` says of it.
    """

    text: str
    facts: Mapping[str, Any]
    checked: Mapping[str, Any]


def draft(
    model: str,
    learn: str,
    keep: str | None = None,
    *,
    learn_test: str | None = None,
    keep_test: str | None = None,
    mode: str | None = None,
    output_dir: Path = Path("runs/first"),
    overrides: Sequence[str] = (),
    launch: str = "corda run recipe.yaml",
) -> Draft:
    """Draft a recipe after looking at the model's config and at the data; no weights are loaded.

    Args:
        model: As model.model_name_or_path.
        learn: The task to learn: a file or Hub id.
        keep: The knowledge to keep; without it the mode is ipm.
        learn_test: Held-out records of the task; default: a file beside it that is named like one.
        keep_test: The same for what is to be kept.
        mode: One of adapter.mode; default: contrast with `keep` (kpm with images), else ipm.
        output_dir: Where the run goes.
        overrides: `key=value` for anything, which win over what is suggested.
        launch: Command named in the first line.

    Raises:
        CordaError: whatever is wrong with model, data or overrides, as `corda run --dry-run` finds it.
    """
    raw: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"model_name_or_path": model},
        "data": {"learn": learn} | ({"keep": keep} if keep else {}),
        "adapter": {"mode": mode} if mode else {},
    }
    apply_overrides(raw, overrides)
    free, keeps = "mode" not in raw["adapter"], "keep" in raw["data"]
    if free:
        raw["adapter"]["mode"] = "kpm" if keeps else "ipm"
    inputs = Inputs(parse_recipe(raw, "init-recipe"))
    if free and keeps and inputs.kind.task == "causal-lm":
        raw["adapter"]["mode"] = "contrast"
        inputs = Inputs(parse_recipe(raw, "init-recipe"))
    facts, notes = _look(inputs)
    suggested = _suggest(inputs, facts, notes)
    tasks = _tasks(inputs, facts, notes, {"learn": learn_test, "keep": keep_test})
    if tasks:
        suggested["evaluation"] = {"batch_size": 16 if facts["device"] == "cuda" else 8, "tasks": tasks}
    _merge(suggested, raw)
    recipe = parse_recipe(suggested, "the drafted recipe")
    checked = Inputs(recipe).dry_run()
    text = "\n".join([*_head(launch, facts), *commented(suggested, Recipe, notes), *_missing(suggested)])
    return Draft(text + "\n", facts, checked)


def held_out(source: str, data_dir: Path | None) -> str | None:
    """The name of a file of held-out records beside a training file, where one is named like that.

    Args:
        source: The training file as the recipe names it.
        data_dir: As in the recipe.
    """
    try:
        path = local_file(DataSource(dataset=source), data_dir)
    except DataError:
        return None
    if path is None:
        return None
    stem = path.stem
    names = [stem.replace("train", word) for word in HELD_OUT_NAMES] if "train" in stem else []
    names += [f"{stem}{mark}{word}" for mark in "_-." for word in HELD_OUT_NAMES]
    for name in names:
        if name != stem and path.with_stem(name).is_file():
            return str(Path(source).with_stem(name))
    return None


def lengths(records: Sequence[Record], tokenizer: Any, template: Template, seed: int = 0) -> Lengths:
    """Measure a sample of the records.

    Args:
        records: At least one.
        tokenizer: The model's.
        template: How they become text.
        seed: Of the sample.

    Raises:
        DataError: a record cannot be rendered.
    """
    sample = random.Random(seed).sample(list(records), min(_LOOKED_AT, len(records)))
    encoded = [encode(record, tokenizer, template=template) for record in sample]
    return Lengths(
        len(records),
        mean(len(one) for one in encoded),
        _quantile([len(one) for one in encoded], 0.99),
        _quantile([sum(one.response) for one in encoded], 0.95),
    )


def _look(inputs: Inputs) -> tuple[dict[str, Any], dict[str, str]]:
    """Facts as JSON, and the first notes."""
    inputs.kind.refuse_unless_text("corda init-recipe")
    recipe, tokenizer = inputs.recipe, inputs.tokenizer
    skeleton = models.skeleton(inputs.source, recipe.model)
    targets = inputs.targets
    chat = bool(tokenizer.chat_template)
    given = recipe.model_dump(exclude_unset=True)["data"].get("template")
    template: Template = given or ("chat" if chat else "plain")
    notes = {
        "model.model_name_or_path": f"{_size(skeleton.num_parameters())} parameters",
        "data.template": "the tokenizer has a chat template" if chat else "the tokenizer has no chat template",
    }
    seen: dict[str, Any] = {}
    for side, source in (("learn", recipe.data.learn), ("keep", recipe.data.keep)):
        if source is None:
            continue
        records = load_records(source, recipe.data.data_dir, recipe.seed)
        found = lengths(records, tokenizer, template, recipe.seed)
        final = all("####" in record.response for record in records)
        seen[side] = vars(found) | {"kind": _kind(records), "answer_after": "####" if final else None}
        notes[f"data.{side}"] = f"{found.records:,} records, {_kind(records)}, {found.mean:.0f} tokens each on average"
    facts = {
        "parameters": skeleton.num_parameters(),
        "layers": len(targets),
        "widest_input": max(layer.d_in for layer in targets),
        "largest_rank": min(layer.max_rank for layer in targets),
        "positions": getattr(skeleton.config.get_text_config(), "max_position_embeddings", None),
        "template": template,
        "device": models.pick_device(recipe.model.device).type,
        "data": seen,
    }
    return facts, notes


def _suggest(inputs: Inputs, facts: Mapping[str, Any], notes: dict[str, str]) -> dict[str, Any]:
    recipe, data = inputs.recipe, facts["data"]
    large, gpu = facts["parameters"] >= 3 * _BILLION, facts["device"] == "cuda"
    limit = min(_LONGEST, facts["positions"] or _LONGEST)
    longest = max(one["most"] for one in data.values())
    max_length = min(limit, -(-longest // 64) * 64)
    cut = "; longer ones are cut" if longest > max_length else ""
    notes["data.max_length"] = f"99 % of the records have at most {longest} tokens{cut}"

    source = data["learn" if recipe.adapter.mode in {"ipm", "lora"} else "keep"]
    tokens = min(source["mean"], max_length)
    wanted = math.ceil(_COMFORTABLE * facts["widest_input"] / tokens)
    samples = min(source["records"], max(32, -(-wanted // 8) * 8))
    notes["context.samples"] = f"about {samples * tokens:,.0f} tokens for a widest input of {facts['widest_input']}"
    if samples * tokens < 2 * facts["widest_input"]:
        notes["context.samples"] += ", which is few: give more records"

    rank = 16 if facts["widest_input"] < 4096 else 128 if large else 32
    while rank > max(1, facts["largest_rank"] // 4):
        rank //= 2
    notes["adapter.rank"] = f"the papers take 128 for 7 B; the narrowest layer here allows {facts['largest_rank']}"
    rows = max(1, min(16, (16384 if gpu else 2048) // max_length))
    total = 32 if large else 8
    accumulate = max(1, total // rows)
    steps = math.ceil(data["learn"]["records"] / (rows * accumulate))
    notes["training.num_train_epochs"] = f"one is {steps:,} optimiser steps of {rows * accumulate} records"
    adapter: dict[str, Any] = {"mode": recipe.adapter.mode, "rank": rank}
    kind = "zero" if not recipe.adapter.has_start else "start"
    why = {"start": "CorDA learns faster than LoRA at the same rate", "zero": "what starts at zero takes a higher rate"}
    if recipe.adapter.mode == "kpm" and "balance" not in recipe.adapter.model_fields_set and recipe.adapter.damp:
        adapter["balance"] = "sigma"
        notes["adapter.balance"] = "with it and its lower rate KPM kept more than with equal norms, see docs/log.md"
    if "sigma" in {adapter.get("balance"), recipe.adapter.balance} and kind == "start":
        kind, why["sigma"] = "sigma", "the papers' balance breaks models at rates that LoRA takes"
    rate = _RATES[kind][large]
    notes["training.learning_rate"] = f"a start, to be tried up and down; {why[kind]}"
    notes["training.save_steps"] = "an interrupted training continues from there"
    training: dict[str, Any] = {
        "learning_rate": rate,
        "num_train_epochs": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulate,
        "save_steps": max(10, steps // 10),
    }
    if recipe.adapter.mode == "contrast":
        training["weight_decay"] = 0.0
        notes["training.weight_decay"] = (
            "of B alone: where forgetting matters try more, up to a product with learning rate and steps of 4 to 12"
        )
        if steps >= _MANY:
            notes["training.weight_decay"] += f", {4 / (rate * steps):.2g} to {12 / (rate * steps):.2g} here"
    if large:
        training["gradient_checkpointing"] = True
    model: dict[str, Any] = {"model_name_or_path": recipe.model.model_name_or_path}
    if gpu and 2 * facts["parameters"] > 0.6 * torch.cuda.get_device_properties(0).total_memory:
        model["load_in_4bit"] = True
        notes["model.load_in_4bit"] = "in 16 bits the weights take more than 60 % of the GPU"
    suggested: dict[str, Any] = {
        "output_dir": str(recipe.output_dir),
        "seed": recipe.seed,
        "model": model,
        "data": {"learn": None, "keep": None, "template": facts["template"], "max_length": max_length},
        "context": {"samples": samples},
        "adapter": adapter,
        "training": training,
    }
    if recipe.data.keep is None:
        del suggested["data"]["keep"]
    if recipe.adapter.mode == "lora":
        del suggested["context"]
    return suggested


def _tasks(
    inputs: Inputs, facts: Mapping[str, Any], notes: dict[str, str], tests: Mapping[str, str | None]
) -> dict[str, Any]:
    """Held-out tasks, from what was given or lies beside the data."""
    recipe = inputs.recipe
    tasks: dict[str, Any] = {}
    for side, source in (("learn", recipe.data.learn), ("keep", recipe.data.keep)):
        file = tests[side] or (held_out(source.dataset, recipe.data.data_dir) if source else None)
        if file is None or source is None:
            continue
        seen = facts["data"][side]
        options: dict[str, Any] = {"dataset": {"dataset": file, "max_records": 200}, "measures": side}
        if source.columns:
            options["dataset"]["columns"] = dict(source.columns)
        options |= _metrics(seen)
        if "exact_match" in options["metrics"]:
            options |= _prompting(seen, facts["template"])
        name = Path(file).parent.name if Path(file).parent.name not in {"", "."} else side
        name = name if name not in tasks else f"{name}_{side}"
        tasks[name] = options
        notes[f"evaluation.tasks.{name}"] = f"held out: what is to be {'learnt' if side == 'learn' else 'kept'}"
    return tasks


def _prompting(seen: Mapping[str, Any], template: Template) -> dict[str, Any]:
    """Shots before a question that has a short answer, and where a long answer ends."""
    if seen["answer"] <= _SHORT_ANSWER:
        return {"shots": 3} if template == "plain" else {}
    return {"stop": ["Question:"] if template == "plain" else []}


def _metrics(seen: Mapping[str, Any]) -> dict[str, Any]:
    if seen["kind"] == "running text":
        return {"metrics": ["perplexity"]}
    if seen["kind"] == "multiple choice":
        return {"metrics": ["accuracy"]}
    if seen["answer_after"]:
        tokens = -(-seen["answer"] // 32) * 32
        return {
            "metrics": ["answer_loss", "exact_match"],
            "answer_after": seen["answer_after"],
            "max_new_tokens": tokens,
        }
    if seen["answer"] <= _SHORT_ANSWER:
        return {"metrics": ["answer_loss", "exact_match"], "max_new_tokens": _SHORT_ANSWER}
    return {"metrics": ["answer_loss"]}


def _kind(records: Sequence[Record]) -> str:
    first = records[0]
    if first.is_text:
        return "running text"
    if first.choices:
        return "multiple choice"
    return "conversations" if first.always_chat else "prompts with answers"


def _head(launch: str, facts: Mapping[str, Any]) -> list[str]:
    return [
        f"# {launch}",
        f"# Drafted after looking at a model of {_size(facts['parameters'])} parameters, {facts['layers']} "
        f"layers to adapt, on {facts['device']}.",
        "# Every key with its default: page Recipe of the documentation, or src/corda/recipe.py.",
    ]


def _missing(suggested: Mapping[str, Any]) -> list[str]:
    """What to fill in, where there are no held-out files."""
    measured = {task["measures"] for task in suggested.get("evaluation", {}).get("tasks", {}).values()}
    sides = [side for side in ("learn", "keep") if side in suggested["data"] and side not in measured]
    if not sides:
        return []
    lines = [
        "",
        "# Nothing held out was found for: " + ", ".join(f"data.{side}" for side in sides) + ". To measure it,",
    ]
    lines += ["# name records that are in neither data set (`corda init-recipe --learn-test FILE --keep-test FILE`):"]
    lines += [] if measured else ["# evaluation:", "#   tasks:"]
    for side in sides:
        lines += [f"#     {side}:", f"#       {{dataset: {side}_test.jsonl, measures: {side}, metrics: [answer_loss]}}"]
    return lines


def _merge(suggested: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Put what was given over what is suggested."""
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(suggested.get(key), dict):
            _merge(suggested[key], value)
        else:
            suggested[key] = value


def _quantile(values: Sequence[int], share: float) -> int:
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 10**6 else f"{count:,}"
