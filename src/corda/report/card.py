"""The model card of an export, in the Hub's format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from corda.recipe import Recipe

if TYPE_CHECKING:
    from corda.models import Source
    from corda.plan.plan import Plan

_NAMES = {"kpm": "CorDA, knowledge-preserved mode", "ipm": "CorDA, instruction-previewed mode", "lora": "LoRA"}


def method_name(mode: str) -> str:
    """A mode in words."""
    return _NAMES[mode]


def model_card(recipe: Recipe, plan: Plan, source: Source) -> str:
    """README.md of an exported adapter: how it was made and how to load it."""
    name = recipe.model.model_name_or_path
    header = yaml.safe_dump(
        {"base_model": name, "library_name": "peft", "tags": ["lora", "corda", plan.mode]}, sort_keys=True
    )
    learn, keep = recipe.data.learn, recipe.data.keep
    settings = recipe.adapter.model_dump(mode="json", exclude={"ranks"})
    edited = sum(layer.edited for layer in plan.layers)
    lines = [
        f"---\n{header}---",
        f"# {method_name(plan.mode)} adapter for {name}",
        f"- Base model: {name}" + (f" ({source.note})" if source.note else ""),
        f"- Task data: {learn.dataset if learn else 'none'}",
        f"- Knowledge to keep: {keep.dataset if keep else 'none'}",
        f"- Trained parameters: {plan.trainable_parameters:,} in {len(plan.layers)} layers"
        + (f", {edited} of them edited by hand" if edited else ""),
        f"- Settings: {yaml.safe_dump(settings, default_flow_style=True).strip()}",
        "\nIt is a plain LoRA on the unchanged base model:\n",
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "this/folder")\n```',
    ]
    return "\n".join(lines) + "\n"
