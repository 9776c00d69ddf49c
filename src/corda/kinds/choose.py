"""The one place that decides which kind of training a recipe asks for."""

from __future__ import annotations

from corda import models
from corda.architectures import task_of
from corda.kinds.classes import Classes
from corda.kinds.kind import Kind
from corda.kinds.seq2seq import Seq2Seq
from corda.kinds.tags import Tags
from corda.kinds.text import Text
from corda.options import ModelTask
from corda.recipe import Recipe

_KINDS: dict[ModelTask, type[Kind]] = {
    "causal-lm": Text,
    "image-text-to-text": Text,
    "sequence-classification": Classes,
    "token-classification": Tags,
    "seq2seq-lm": Seq2Seq,
}


def kind_of(recipe: Recipe, source: models.Source) -> Kind:
    """What a recipe trains its model for, by `model.task` or the checkpoint's config.

    Args:
        recipe: What to do.
        source: Where the base model's files are.

    Raises:
        ModelError: the config cannot be read, or does not say what the model is for.
    """
    task = task_of(models.config_of(source, recipe.model), recipe.model.task)
    return _KINDS[task](recipe, source, task)
