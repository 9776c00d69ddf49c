"""Read YAML files, `--set` overrides and Python settings into a recipe, with help for what is wrong in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from corda.errors import RecipeError
from corda.options import ExportOptions, ModelOptions, number
from corda.recipe import AdapterOptions, Recipe, TrainingOptions

_Block = TypeVar("_Block", bound=BaseModel)

# Fields of TRL's that corda sets from elsewhere in the recipe.
_SET_BY = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "model.device",
    "max_length": "data.max_length",
    "save_strategy": "training.save_steps",
    "activation_checkpointing": "training.gradient_checkpointing",
    "max_seq_length": "data.max_length",
}
# Fields of TRL's that would change what is learnt from records that are tokens already.
_NOT_OFFERED = {
    "packing": "records are not packed for training",
    "assistant_only_loss": "the loss is always that of answers, every answer of a conversation",
    "push_to_hub": "it would publish checkpoints; export.push_to_hub publishes the adapter",
    "chat_template_path": "put the template into the tokenizer's files, so that every stage sees it",
    "eos_token": "put it into the tokenizer's files, so that every stage sees it",
}
# What other tools call it, or where it is looked for first.
_ALSO_CALLED = {"data.test": "evaluation.tasks", "data.eval": "evaluation.tasks", "path": "dataset", "file": "dataset"}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` overrides.

    Args:
        path: The file.
        overrides: `key.sub=value`.

    Raises:
        RecipeError: the file is missing or not YAML, or one or several keys or values are wrong; all are named.
    """
    raw = read_mapping(path, "recipe")
    apply_overrides(raw, overrides)
    return parse_recipe(raw, str(path))


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Args:
        path: The file.
        what: It is, for messages: "recipe", "study".

    Raises:
        RecipeError: the file is missing, not YAML, or not a mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Unique)
    except FileNotFoundError:
        raise RecipeError(f"the {what} does not exist", where=str(path), fix="check the path") from None
    except OSError as error:
        fix = f"name the {what}, a YAML file"
        raise RecipeError(f"the {what} cannot be read", where=str(path), got=error.strerror, fix=fix) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"the {what} is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(raw, dict):
        got = "an empty file" if raw is None else f"a {type(raw).__name__}"
        fix = "begin it with keys: model:, data:, adapter:" if what == "recipe" else "begin it with keys"
        raise RecipeError(f"the {what} is not a mapping", where=str(path), got=got, fix=fix)
    return raw


class _Unique(yaml.SafeLoader):
    """Of two equal keys YAML keeps the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose keys differ; those that `<<` merges in may be set again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name and name != "<<" and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return node


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `key.sub=value` items in a raw recipe; values are read as YAML.

    Args:
        raw: Changed in place.
        overrides: `key.sub=value`.

    Raises:
        RecipeError: an item is not of that form.
    """
    for item in overrides:
        _apply_override(raw, item)


def parse_recipe(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; `where` names its origin in messages.

    Args:
        raw: As YAML gives it.
        where: Its origin, named in messages.

    Raises:
        RecipeError: with every problem found, and a suggestion for each unknown key.
    """
    problems: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_describe(dict(problem)) for problem in error.errors()]
    training = raw.get("training")
    if isinstance(training, Mapping):
        problems += _unknown_training_keys(training)
    if problems or recipe is None:
        raise RecipeError(
            f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe: " + "; ".join(problems),
            where=where,
            fix="correct the named keys; `corda run RECIPE --dry-run` checks again without loading a model",
        )
    return recipe


def parse_adapter(settings: Mapping[str, Any]) -> AdapterOptions:
    """Adapter options by name, as Python callers give them.

    Raises:
        RecipeError: with every problem found, and a suggestion for each unknown name.
    """
    return _parse_block(AdapterOptions, "adapter", settings)


def parse_export(settings: Mapping[str, Any]) -> ExportOptions:
    """Export options by name, as Python callers give them.

    Raises:
        RecipeError: with every problem found, and a suggestion for each unknown name.
    """
    return _parse_block(ExportOptions, "export", settings)


def parse_model(settings: Mapping[str, Any]) -> ModelOptions:
    """Model options by name.

    Raises:
        RecipeError: with every problem found, and a suggestion for each unknown name.
    """
    return _parse_block(ModelOptions, "model", settings)


def _parse_block(block: type[_Block], name: str, settings: Mapping[str, Any]) -> _Block:
    try:
        return block.model_validate(dict(settings))
    except ValidationError as error:
        problems = [_describe(dict(problem), [name]) for problem in error.errors()]
        raise RecipeError("; ".join(problems), where=f"{name} options") from None


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError("an override is not of the form key=value", where="--set", got=repr(item))
    try:
        value = number(yaml.safe_load(text))
    except yaml.YAMLError:
        value = text
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if isinstance(child, str):
            child = node[parent] = {"dataset": child}
        if not isinstance(child, dict):
            raise RecipeError("an override goes below a value", where=f"--set {item}", got=f"{parent}={child!r}")
        node = child
    node[last] = value


def _describe(problem: dict[str, Any], inside: Sequence[str] = ()) -> str:
    location = [*inside, *(str(part) for part in problem["loc"])]
    key = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        meant = _ALSO_CALLED.get(key) or _ALSO_CALLED.get(location[-1])
        return f"unknown key {key!r}" + (
            f", did you mean {meant!r}?" if meant else _suggest(location[-1], _fields_at(location[:-1]))
        )
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = f"has keys of its own ({', '.join(_fields_at(location)[:3])}, …)"
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f" (got {problem['input']!r})"
    return f"{key}: {message}{shown}"


def _suggest(word: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    alike = (key for key in _keys(Recipe) if key.rpartition(".")[2] == word)
    elsewhere = {key.partition(".")[0]: key for key in reversed(list(alike))}  # the first of each block
    if elsewhere:
        return f", did you mean {' or '.join(map(repr, reversed(elsewhere.values())))}?"
    return f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(sorted(candidates))})"


def _keys(block: type[BaseModel], inside: str = "") -> Iterator[str]:
    """Every dotted key of a block and the blocks below it."""
    for name, field in block.model_fields.items():
        yield f"{inside}{name}"
        below = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        for part in below:
            if issubclass(part, BaseModel):
                named = "NAME." if get_origin(field.annotation) is dict else ""
                yield from _keys(part, f"{inside}{name}.{named}")


def _fields_at(location: Sequence[str]) -> list[str]:
    node: Any = Recipe
    for part in location:
        fields = getattr(node, "model_fields", None)
        node = fields[part].annotation if fields and part in fields else node
        while get_origin(node) is not None:  # Optional[...], dict[str, Task]
            inner = [arg for arg in get_args(node) if isinstance(arg, type) and issubclass(arg, BaseModel)]
            node = inner[0] if inner else Recipe
            if get_origin(node) is Union:
                break
    return list(getattr(node, "model_fields", {}))


def _unknown_training_keys(training: Mapping[str, Any]) -> list[str]:
    extra = [key for key in training if key not in TrainingOptions.model_fields]
    if not extra:
        return []
    from trl import SFTConfig  # slow to import, so only where a key has to be looked up

    known = [*SFTConfig.__dataclass_fields__, *TrainingOptions.model_fields]
    ours = [f"'training.{key}' is set by {_SET_BY[key]}" for key in extra if key in _SET_BY]
    ours += [f"'training.{k}' is not offered: {why}" for k, why in _NOT_OFFERED.items() if training.get(k)]
    if training.get("completion_only_loss") is False:
        ours.append("'training.completion_only_loss: false' is not offered: give the records as `text` instead")
    return ours + [
        f"unknown key 'training.{key}'{_suggest(key, known)}" for key in extra if key not in (*known, *_SET_BY)
    ]
