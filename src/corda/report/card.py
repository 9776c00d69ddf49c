"""The model card of an export, in the Hub's format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from corda.options import ExportOptions
from corda.recipe import Recipe

if TYPE_CHECKING:
    from corda.models import Source
    from corda.plan.plan import Plan

_NAMES = {
    "kpm": "CorDA, knowledge-preserved mode",
    "ipm": "CorDA, instruction-previewed mode",
    "dual": "CorDA, two contexts (dual)",
    "contrast": "CorDA, two contexts (contrast)",
    "lora": "LoRA",
}


def method_name(mode: str) -> str:
    """A mode in words."""
    return _NAMES[mode]


def model_card(recipe: Recipe, plan: Plan, source: Source) -> str:
    """README.md of an export: how it was made and how to load it."""
    name, options = recipe.model.model_name_or_path, recipe.export
    library = "transformers" if options.format == "merged" else "peft"
    header = yaml.safe_dump(
        {"base_model": name, "library_name": library, "tags": ["lora", "corda", plan.mode]}, sort_keys=True
    )
    learn, keep = recipe.data.learn, recipe.data.keep
    settings = recipe.adapter.model_dump(mode="json", exclude={"ranks"})
    edited = sum(layer.edited for layer in plan.layers)
    lines = [
        f"---\n{header}---",
        f"# {method_name(plan.mode)} {'model from' if options.format == 'merged' else 'adapter for'} {name}",
        f"- Base model: {name}" + (f" ({source.note})" if source.note else ""),
        f"- Task data: {learn.dataset if learn else 'none'}",
        f"- Knowledge to keep: {keep.dataset if keep else 'none'}",
        f"- Trained parameters: {plan.trainable_parameters:,} in {len(plan.layers)} layers"
        + (f", {edited} of them edited by hand" if edited else ""),
        f"- Settings: {yaml.safe_dump(settings, default_flow_style=True).strip()}",
        "",
        _what_it_is(options),
        "",
        _how_to_load(options.format, name),
    ]
    return "\n".join(lines) + "\n"


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


def _how_to_load(form: str, name: str) -> str:
    model = name if form == "lora" else "this/folder"
    lines = [
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{model}")',
    ]
    if form != "merged":
        where = "this/folder" if form == "lora" else "this/folder/adapter"
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(model, "{where}")']
    return "\n".join(["```python", *lines, "```"])
