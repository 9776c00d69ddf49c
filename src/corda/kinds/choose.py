"""The one place that decides which kind of training a recipe asks for."""

from __future__ import annotations

from corda import models
from corda.architectures import task_of
from corda.errors import ModelError
from corda.kinds.classes import Classes
from corda.kinds.kind import Kind
from corda.kinds.text import Text
from corda.options import ModelTask
from corda.recipe import Recipe

_KINDS: dict[ModelTask, type[Kind]] = {
    "causal-lm": Text,
    "image-text-to-text": Text,
    "sequence-classification": Classes,
}
_NEEDED = {
    "token-classification": "records of words with a tag each, and an F1 over spans",
    "seq2seq-lm": "answers as the decoder's labels in training and evaluation",
}


def kind_of(recipe: Recipe, source: models.Source) -> Kind:
    """What a recipe trains its model for, by `model.task` or the checkpoint's config.

    Args:
        recipe: What to do.
        source: Where the base model's files are.

    Raises:
        ModelError: the config cannot be read, or is one that recipes do not train.
    """
    task = task_of(models.config_of(source, recipe.model), recipe.model.task)
    if task not in _KINDS:
        raise ModelError(
            f"recipes do not train models for {task}",
            where=f"model.model_name_or_path, {recipe.model.model_name_or_path}",
            expected=", ".join(_KINDS),
            fix="use collect, make_plan, attach and export on a model that you loaded, and a trainer of your own: "
            f"docs/encoders.md; a recipe would need {_NEEDED[task]}",
        )
    return _KINDS[task](recipe, source, task)
