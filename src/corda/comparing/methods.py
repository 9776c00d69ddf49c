"""The methods that can be compared: each is a few settings of a recipe, or an adapter that PEFT makes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from corda.errors import RecipeError

Kind = Literal["corda", "peft", "null", "full"]


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        name: As in a study.
        label: On pages.
        kind: Who makes the adapter: "corda" the pipeline, "peft" PEFT itself, "null" LoRA-Null's factors, "full" none.
        settings: Dotted recipe keys and their values.
        peft: For kind "peft": what PEFT is asked for.
        frozen: A is not trained; the rank is raised to the same number of trainable parameters.
    """

    name: str
    label: str
    kind: Kind = "corda"
    settings: Mapping[str, Any] = field(default_factory=dict)
    peft: str = ""
    frozen: bool = False


_LORA = {"adapter.mode": "lora"}
_KPM = {"adapter.mode": "kpm"}
_IPM = {"adapter.mode": "ipm"}
_SELECT = {"context.rounds": 5, "context.selection": "dynamic", "adapter.compactness_scale": "unit"}
_ALLOCATE = {"adapter.allocation": "dynamic", "adapter.compactness_scale": "unit"}
_FOUR = {"model.load_in_4bit": True}
_CONTRAST = {"adapter.mode": "contrast"}

_ALL = (
    Method("full", "full fine-tuning", "full", _LORA),
    Method("lora", "LoRA", settings=_LORA),
    Method("lora_wd", "LoRA + weight decay", settings=_LORA | {"training.weight_decay": 0.1}),
    Method("lora_frozen_a", "LoRA, frozen A", "peft", _LORA, "lora", frozen=True),
    Method("rslora", "rsLoRA", settings=_LORA | {"adapter.use_rslora": True}),
    Method("dora", "DoRA", "peft", _LORA, "dora"),
    Method("pissa", "PiSSA", "peft", _LORA, "pissa"),
    Method("milora", "MiLoRA", settings=_KPM | {"adapter.exponent": 0.0}),
    Method("eva", "EVA", "peft", _LORA, "eva"),
    Method("lora_ga", "LoRA-GA", "peft", _LORA, "lora_ga"),
    Method("lora_null", "LoRA-Null", "null", _KPM),
    Method("peft_corda_kpm", "PEFT's CorDA, KPM", "peft", _KPM, "corda_kpm"),
    Method("peft_corda_ipm", "PEFT's CorDA, IPM", "peft", _IPM, "corda_ipm"),
    Method("kpm", "CorDA-KPM", settings=_KPM),
    Method("kpm_half", "CorDA-KPM, a = 1/2", settings=_KPM | {"adapter.exponent": 0.5}),
    Method("kpm_sigma", "CorDA-KPM, balance sigma", settings=_KPM | {"adapter.balance": "sigma"}),
    Method("ipm", "CorDA-IPM", settings=_IPM),
    Method("ipm_half", "CorDA-IPM, a = 1/2", settings=_IPM | {"adapter.exponent": 0.5}),
    Method("ipm_sigma", "CorDA-IPM, balance sigma", settings=_IPM | {"adapter.balance": "sigma"}),
    Method("kpm_selection", "CorDA++ KPM, selection alone", settings=_KPM | _SELECT),
    Method("kpm_allocation", "CorDA++ KPM, allocation alone", settings=_KPM | _ALLOCATE),
    Method("kpm_plus", "CorDA++ KPM", settings=_KPM | _SELECT | _ALLOCATE),
    Method("ipm_selection", "CorDA++ IPM, selection alone", settings=_IPM | _SELECT),
    Method("ipm_allocation", "CorDA++ IPM, allocation alone", settings=_IPM | _ALLOCATE),
    Method("ipm_plus", "CorDA++ IPM", settings=_IPM | _SELECT | _ALLOCATE),
    Method("contrast", "contrast, frozen A", settings=_CONTRAST),
    Method("contrast_a", "contrast, A trained", settings=_CONTRAST | {"adapter.train_a": True}),
    Method("dual", "dual", settings={"adapter.mode": "dual"}),
    Method("control_random", "control: random A, frozen", settings=_CONTRAST | {"adapter.directions": "random"}),
    Method("control_task", "control: A of the task alone", settings=_CONTRAST | {"adapter.directions": "task"}),
    Method("control_null", "control: A of the knowledge alone", settings=_CONTRAST | {"adapter.directions": "null"}),
    Method("qlora", "QLoRA", settings=_LORA | _FOUR),
    Method("kpm_4bit", "CorDA-KPM, 4 bits", settings=_KPM | _FOUR | {"adapter.correction": "frozen"}),
    Method("ipm_4bit", "CorDA-IPM, 4 bits", settings=_IPM | _FOUR | {"adapter.correction": "fit"}),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "there are: " + ", ".join(METHODS)
        raise RecipeError("there is no such method", where="methods", got=name, fix=hint)
    return METHODS[name]
