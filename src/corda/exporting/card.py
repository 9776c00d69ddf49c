"""README.md of an export in the Hub's format: metadata that its search reads, then text for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from corda.architectures import loader_name
from corda.options import ExportOptions, ModelTask

_PLACE = "path/to/this/folder"
_RELATION = {"lora": "adapter", "merged": "finetune"}  # a residual base is neither
_METRICS = {"answer_loss": "loss", "pass_at_1": "pass@1"}  # the Hub's names where they are others
_UNITS = {"answer_loss": "loss, nats per token", "loss": "loss, nats per label", "perplexity": "perplexity"}
# As the Hub files models, by what they are for.
_PIPELINES: dict[ModelTask, str] = {
    "causal-lm": "text-generation",
    "image-text-to-text": "image-text-to-text",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
}


@dataclass(frozen=True)
class CardScore:
    """One measured value for a card.

    Attributes:
        task: The recipe's name of the task.
        metric: answer_loss (nats per token), loss (per label), exact_match, accuracy or f1 (shares), or perplexity.
        dataset: Hub id, or name of a file.
        side: "learn" or "keep".
        before: Of the base: (mean, standard error).
        after: Of the trained model.
        change: After minus before, with the error of paired differences.
        n: Records.
    """

    task: str
    metric: str
    dataset: str
    side: str
    before: tuple[float, float]
    after: tuple[float, float]
    change: tuple[float, float]
    n: int


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        method: In words, e.g. "CorDA, knowledge-preserved mode".
        base: The original base as the user named it.
        note: What a reader must know of its weights.
        task: What the model is for.
        classes: Names of a classifier's classes by number.
        tags: For the Hub's search.
        datasets: Names of data sets; only Hub ids go into the metadata.
        license: As the Hub names it.
        facts: (name, value) for the list of facts.
        scores: What was measured.
        recipe: The whole recipe as YAML.
    """

    method: str
    base: str
    note: str | None = None
    task: ModelTask = "causal-lm"
    classes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    license: str | None = None
    facts: tuple[tuple[str, str], ...] = ()
    scores: tuple[CardScore, ...] = ()
    recipe: str | None = None


def hub_card(known: CardFacts, options: ExportOptions) -> str:
    """The whole README.md.

    Args:
        known: What it says.
        options: Which form the export has and where it goes.
    """
    merged = options.format == "merged"
    kind = "model from" if merged else "adapter for"
    title = f"{known.method} {kind} {Path(known.base).name if _is_path(known.base) else known.base}"
    data = ModelCardData(
        base_model=known.base if hub_id(known.base) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=_PIPELINES[known.task],
        tags=list(dict.fromkeys(["lora", "corda", *known.tags])),
        datasets=[name for name in dict.fromkeys(known.datasets) if hub_id(name)] or None,
        license=options.license or known.license,
        metrics=list(dict.fromkeys(_METRICS.get(score.metric, score.metric) for score in known.scores)) or None,
        model_name=title if known.scores else None,
        eval_results=[_result(score, _PIPELINES[known.task]) for score in known.scores] or None,
        base_model_relation=_RELATION.get(options.format) if hub_id(known.base) else None,
    )
    base = (Path(known.base).name if _is_path(known.base) else known.base) + (f" ({known.note})" if known.note else "")
    licence = options.license or known.license or "not stated; the licences of the base model and of the data apply"
    facts = [("Base model", base), *known.facts, ("Licence", licence)]
    parts = [
        f"# {title}",
        _what_it_is(options),
        "## Use",
        load_snippet(known, options),
        "## How it was made",
        "\n".join(f"- {name}: {value}" for name, value in facts),
    ]
    if known.scores:
        parts += ["## Scores", _table(known.scores)]
    if known.recipe:
        parts += ["## Recipe", f"```yaml\n{known.recipe.strip()}\n```"]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def load_snippet(known: CardFacts, options: ExportOptions) -> str:
    """Three lines of Python that load the export, fenced.

    Args:
        known: For the base and what it is for.
        options: For form and place of the export.
    """
    loader = loader_name(known.task)
    original = known.base if hub_id(known.base) or Path(known.base).is_dir() else "path/to/the/base/model"
    place = options.push_to_hub or _PLACE
    head = ""
    if known.classes and options.format != "merged":
        named = known.classes != tuple(f"LABEL_{i}" for i in range(len(known.classes)))
        head = f", id2label={dict(enumerate(known.classes))}" if named else f", num_labels={len(known.classes)}"
    model = f'{loader}.from_pretrained("{original if options.format == "lora" else place}"{head})'
    lines = [f"from transformers import {loader}", f"model = {model}"]
    if options.format != "merged":
        beside = f'"{place}"' if options.format == "lora" else f'"{place}", subfolder="adapter"'
        lines = [
            "from peft import PeftModel",
            f"from transformers import {loader}",
            f"model = PeftModel.from_pretrained({model}, {beside})",
        ]
    return "\n".join(["```python", *lines, "```"])


def hub_id(name: str) -> bool:
    """Whether a name can be a repository of the Hub's and is no file or folder here."""
    return not _is_path(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def license_of(model: str) -> str | None:
    """The licence that a base model's own card states, where that card is on this machine.

    Args:
        model: Hub id or folder.
    """
    card = Path(model) / "README.md"
    if not card.is_file() and hub_id(model):
        cached = try_to_load_from_cache(model, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    if not card.is_file():
        return None
    try:
        stated = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError):
        return None
    return stated if isinstance(stated, str) else None


def _is_path(name: str) -> bool:
    return (
        Path(name).exists()
        or Path(name).is_absolute()
        or name.endswith((".gguf", ".json", ".jsonl", ".csv", ".parquet"))
    )


def _what_it_is(options: ExportOptions) -> str:
    if options.format == "merged":
        return "These are full weights with the adapter merged in; no adapter has to be loaded."
    if options.format == "residual":
        return (
            "The weights here are the residual base, with the initial components taken out; the adapter in `adapter/` "
            "puts them back as they are after training. Neither is of use without the other."
        )
    text = "It is a plain LoRA on the unchanged base model"
    if options.rank is not None:
        text += f", the best approximation of rank {options.rank} of what was trained; manifest.json says what it lost"
    if options.layout == "uniform":
        text += ". One rank and one alpha hold for all layers, as servers such as vLLM expect"
    return text + "."


def _result(score: CardScore, pipeline: str) -> EvalResult:
    return EvalResult(
        task_type=pipeline,
        dataset_type=score.dataset if hub_id(score.dataset) else "local-file",
        dataset_name=score.task,
        dataset_config=score.task,  # without it, tasks of one data set would be taken for one
        metric_type=_METRICS.get(score.metric, score.metric),
        metric_name=f"{score.metric} on {'the task learnt' if score.side == 'learn' else 'what was to be kept'}",
        metric_value=score.after[0],
    )


def _table(scores: Sequence[CardScore]) -> str:
    lines = ["| task | measures | metric | n | base | tuned | change |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for score in scores:
        unit = _UNITS.get(score.metric, f"{score.metric}, %")
        percent = score.metric not in _UNITS
        cells = [_value(one, percent) for one in (score.before, score.after)] + [_value(score.change, percent, "+")]
        side = "learn" if score.side == "learn" else "keep"
        lines.append(f"| {score.task} | {side} | {unit.replace('_', ' ')} | {score.n} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Mean ± standard error over records; of the change: of paired differences."])


def _value(found: tuple[float, float], percent: bool, sign: str = "") -> str:
    factor, digits = (100, 1) if percent else (1, 3)
    return f"{found[0] * factor:{sign}.{digits}f} ± {found[1] * factor:.{digits}f}"
